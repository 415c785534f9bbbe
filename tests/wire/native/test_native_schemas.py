"""What `strict: true` asks of a schema, as OpenAI says it."""

from __future__ import annotations

from typing import Any

import pytest
from support.wire_requests import read_chat, refusal_of

from trio_worker.errors import InvalidRequest
from trio_worker.wire.native.schemas import check_strict

NO_MORE = "'additionalProperties' is required to be supplied and to be false."


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "N", "schema": schema, "strict": True},
    }


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def fault(schema: dict[str, Any]) -> str:
    message, place, limit = refusal_of(response_format=strict(schema))
    assert (place, limit) == ("response_format", None)
    assert message.startswith("Invalid schema for response_format 'N': ")
    return message.removeprefix("Invalid schema for response_format 'N': ")


def nested(levels: int) -> dict[str, Any]:
    schema = an_object()
    for _ in range(levels - 1):
        schema = an_object(a=schema)
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        an_object(),
        an_object(a={"type": "string"}, b=an_object() | {"type": ["object", "null"]}),
        an_object(a={"anyOf": [an_object(), {"type": "null"}]}),
        {**an_object(a={"$ref": "#/$defs/b"}), "$defs": {"b": an_object()}},
        nested(10),
        an_object(**{f"p{number}": {} for number in range(900)}),
        an_object(a={"type": "array", "items": {"type": "array", "items": {"items": nested(8)}}}),
        an_object(a={"enum": list(range(1000))}, b={"const": 1}),
        an_object(a={"enum": ["x" * 60] * 250}),
        an_object(a={"enum": ["x" * 59] * 251}),
        an_object() | {"properties": []},
    ],
)
def test_a_schema_that_keeps_to_the_rules_is_taken(schema: dict[str, Any]) -> None:
    assert read_chat(response_format=strict(schema)).wanted.constraint is not None


OPEN = {"type": "object", "properties": {}, "required": []}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (OPEN, f"In context=(), {NO_MORE}"),
        ({**OPEN, "additionalProperties": True}, f"In context=(), {NO_MORE}"),
        (an_object(a=OPEN), f"In context=('properties', 'a'), {NO_MORE}"),
        (an_object(a={"type": ["object", "null"]}), f"In context=('properties', 'a'), {NO_MORE}"),
        (an_object(a={"properties": {}}), f"In context=('properties', 'a'), {NO_MORE}"),
        (
            an_object(a={"type": "array", "items": OPEN}),
            f"In context=('properties', 'a', 'items'), {NO_MORE}",
        ),
        (
            an_object(a={"anyOf": [{"type": "null"}, OPEN]}),
            f"In context=('properties', 'a', 'anyOf', '1'), {NO_MORE}",
        ),
        *(
            (
                an_object(a={name: [an_object(), OPEN]}),
                f"In context=('properties', 'a', '{name}', '1'), {NO_MORE}",
            )
            for name in ("allOf", "oneOf", "prefixItems")
        ),
        (
            {**an_object(), "definitions": {"d": OPEN}},
            f"In context=('definitions', 'd'), {NO_MORE}",
        ),
        ({**an_object(), "$defs": {"d": OPEN}}, f"In context=('$defs', 'd'), {NO_MORE}"),
        (
            an_object(a={}, b={}) | {"required": ["a"]},
            (
                "In context=(), 'required' is required to be supplied and to be an array including "
                "every key in properties. Missing 'b'."
            ),
        ),
        (
            an_object(a={}) | {"required": "a"},
            (
                "In context=(), 'required' is required to be supplied and to be an array including "
                "every key in properties. Missing 'a'."
            ),
        ),
        (
            nested(11),
            f"In context={('properties', 'a') * 10}, objects are nested in more than 10 levels.",
        ),
        (
            an_object(a={"enum": list(range(600))}, b={"enum": list(range(401))}),
            "In context=('properties', 'b'), the schema has more than 1000 enum values.",
        ),
        (
            an_object(a={"enum": ["x" * 60] * 251}),
            (
                "In context=('properties', 'a'), an enum of that many values has more than 15000 "
                "characters."
            ),
        ),
        (
            {"anyOf": [an_object()]},
            (
                "schema must be a JSON Schema of 'type: \"object\"', and must not have 'anyOf' at "
                "its root."
            ),
        ),
        (
            an_object() | {"anyOf": [an_object()]},
            (
                "schema must be a JSON Schema of 'type: \"object\"', and must not have 'anyOf' at "
                "its root."
            ),
        ),
    ],
)
def test_the_first_fault_is_said_with_its_place_in_the_schema(
    schema: dict[str, Any], said: str
) -> None:
    assert fault(schema) == said


def test_counts_are_over_the_whole_schema() -> None:
    """More than fits into what is read of a schema could only be counted by itself."""

    def counted(schema: dict[str, Any]) -> str:
        with pytest.raises(InvalidRequest) as caught:
            check_strict(schema, "x", "where")
        return caught.value.message.rpartition("), ")[2]

    def half(letter: str, count: int, length: int = 1) -> dict[str, Any]:
        return an_object(**{letter * length + str(number): {} for number in range(count)})

    check_strict(an_object(a=half("a", 2499), b=half("b", 2499)), "x", "where")
    too_many = an_object(a=half("a", 2499), b=half("b", 2500))
    assert counted(too_many) == "the schema has more than 5000 properties."
    too_long = an_object(a=half("a", 60, 1000), b=half("b", 60, 1000))
    assert counted(too_long) == "the names in the schema have more than 120000 characters."
    for values in ({"const": "x" * 60_000}, {"enum": ["x" * 60_000]}):
        check_strict(an_object(a=values, b={"const": "y" * 59_998}), "x", "where")
        too_long = an_object(a=values, b={"const": "y" * 59_999})
        assert counted(too_long) == "the names in the schema have more than 120000 characters."


def test_without_strict_any_schema_is_taken() -> None:
    schemas: list[dict[str, Any]] = [OPEN, nested(11), {"anyOf": [{}]}, {}]
    for schema in schemas:
        lenient = {"type": "json_schema", "json_schema": {"name": "N", "schema": schema}}
        assert read_chat(response_format=lenient).wanted.constraint is not None
