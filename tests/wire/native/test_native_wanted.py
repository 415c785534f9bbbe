"""What an answer is to be like: constraints of its text, variables of the template."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from support.wire_requests import ROOMY, read, read_chat, refusal_of

from trio_worker.errors import InvalidRequest
from trio_worker.protocol.prompt import Choice, Constraint, JsonSchema, Lark, Regex, Wanted

ALLOWING = replace(ROOMY, allows_lark=True)
SCHEMA = {"type": "array", "items": {"type": "integer"}}


def schema_format(schema: object = SCHEMA, name: str = "N", **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, **more}}


FORM: list[tuple[dict[str, Any], Constraint | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, JsonSchema(schema='{"type":"object"}')),
    (
        {"response_format": schema_format(description="d", strict=False)},
        JsonSchema(schema='{"type":"array","items":{"type":"integer"}}'),
    ),
    ({"grammar": {"regex": "a+"}}, Regex(pattern="a+")),
    ({"grammar": {"choice": ["b", "a", "b"]}}, Choice(options=("b", "a"))),
    ({"grammar": {"lark": 'start: "x"'}}, Lark(grammar='start: "x"')),
    ({"grammar": {"regex": "a"}, "response_format": {"type": "text"}}, Regex(pattern="a")),
]


@pytest.mark.parametrize(("fields", "constraint"), FORM)
@pytest.mark.parametrize("chat", [True, False])
def test_what_the_text_is_to_keep_to(
    fields: dict[str, Any], constraint: Constraint | None, *, chat: bool
) -> None:
    """A prompt, too, may have an answer of a form."""
    content = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    request = read(msgspec.json.encode({**content, **fields}), ALLOWING)
    assert request.wanted == Wanted(constraint=constraint)


def test_where_there_have_to_be_calls_there_is_no_text_that_keeps_to_anything() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked: dict[str, Any] = {"tools": tools, "response_format": {"type": "json_object"}}
    assert read_chat(**asked, tool_choice="required").wanted.constraint is None
    assert read_chat(**asked, tool_choice="auto").wanted.constraint is not None
    assert read_chat(**asked, tool_choice="none").wanted.constraint is not None


JUST_ONE = "grammar: send exactly one of regex, choice and lark"
STRICT_WORDS = (
    "Invalid schema for response_format 'N': schema must be a JSON Schema of 'type: \"object\"', "
    "got 'type: \"array\"'."
)


@pytest.mark.parametrize(
    ("fields", "message", "place"),
    [
        (
            {"response_format": {"type": "xml"}},
            "Invalid value: 'xml'. Supported values are: 'json_object', 'json_schema', and 'text'.",
            "response_format.type",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "Missing required parameter: 'response_format.json_schema'.",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "N"}}},
            "Missing required parameter: 'response_format.json_schema.schema'.",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "text", "schema": {}}},
            "response_format: Object contains unknown field `schema`",
            "response_format",
        ),
        (
            {"response_format": schema_format(True)},
            "response_format.json_schema.schema: Expected `object | null`, got `bool`",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": schema_format(name="a b")},
            (
                "Invalid 'response_format.json_schema.name': string does not match pattern. "
                "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
            ),
            "response_format.json_schema.name",
        ),
        ({"response_format": schema_format(strict=True)}, STRICT_WORDS, "response_format"),
        ({"grammar": {}}, JUST_ONE, "grammar"),
        ({"grammar": {"regex": "a", "choice": ["a"]}}, JUST_ONE, "grammar"),
        (
            {"grammar": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "grammar: response_format says already what the answer keeps to; send one of them",
            "grammar",
        ),
        (
            {"grammar": {"lark": "start: /a/"}},
            "grammar.lark: this worker is not set to take grammars in Lark",
            "grammar.lark",
        ),
        (
            {"grammar": {"regex": ""}},
            "grammar.regex: Expected `str` of length >= 1",
            "grammar.regex",
        ),
        (
            {"grammar": {"choice": ["a", ""]}},
            "grammar.choice[1]: Expected `str` of length >= 1",
            "grammar.choice[1]",
        ),
        (
            {"grammar": {"choice": []}},
            "grammar.choice: Expected `array` of length >= 1",
            "grammar.choice",
        ),
    ],
)
def test_what_no_answer_can_keep_to_is_said(
    fields: dict[str, Any], message: str, place: str
) -> None:
    assert refusal_of(**fields) == (message, place, None)


def test_a_constraint_may_be_as_large_as_its_bound() -> None:
    frame = len('{"const":""}')
    largest = {"const": "x" * (65_536 - frame)}
    assert read_chat(response_format=schema_format(largest)).wanted.constraint is not None
    where = "response_format.json_schema.schema"
    larger = {"const": "x" * (65_537 - frame)}
    assert refusal_of(response_format=schema_format(larger)) == (
        f"{where}: it has 65537 bytes as JSON; at most 65536 are taken",
        where,
        65_536,
    )
    read_chat(grammar={"choice": ["x" * 65_536]})
    assert refusal_of(grammar={"choice": ["x" * 65_536, "y"]})[1:] == ("grammar.choice", 65_536)
    read_chat(grammar={"regex": "x" * 8192})
    assert refusal_of(grammar={"regex": "x" * 8193})[1] == "grammar.regex"


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, None),
        ({"chat_template_kwargs": {}}, None),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "enable_thinking": True},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        (
            {
                "enable_thinking": False,
                "reasoning_effort": "low",
                "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": 3, "x": [1]},
            },
            {"enable_thinking": True, "reasoning_effort": 3, "x": [1]},
        ),
    ],
)
def test_what_the_template_is_told(
    fields: dict[str, Any], variables: dict[str, Any] | None
) -> None:
    told = read_chat(**fields).wanted.template_variables
    assert (msgspec.json.decode(told) if told else None) == variables


def test_variables_are_bounded_and_none_takes_the_place_of_the_messages() -> None:
    frame = len('{"x":""}')
    read_chat(chat_template_kwargs={"x": "y" * (16_384 - frame)})
    said = "chat_template_kwargs: at most 16384 bytes of JSON are taken"
    where = "chat_template_kwargs"
    for value in ("y" * (16_385 - frame), ["y" * 16_384]):
        assert refusal_of(chat_template_kwargs={"x": value}) == (said, where, 16_384)
    for name in ("messages", "tools", "add_generation_prompt", "tokenize"):
        message = f"chat_template_kwargs: {name} is no variable of templates"
        assert refusal_of(chat_template_kwargs={name: 1}) == (message, where, None)


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"max_reasoning_tokens": 5},
        {"reasoning_effort": "low"},
        {"enable_thinking": False},
        {"chat_template_kwargs": {}},
    ],
)
def test_what_only_a_template_can_tell_a_model_needs_messages(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(InvalidRequest) as caught:
        read(msgspec.json.encode({"prompt": "x", **field}))
    assert caught.value.message == f"{name}: it needs messages; a prompt is used as it is"
    assert caught.value.details == {"field": name}


@pytest.mark.parametrize("depth", [100, 400, 900, 3000])
def test_whatever_is_nested_however_deep_is_taken_or_refused(depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    chat = '{"messages": [{"role": "user", "content": "x"}], '
    for field in (
        f'"chat_template_kwargs": {nested}',
        (
            f'"response_format": {{"type": "json_schema", "json_schema": '
            f'{{"name": "n", "strict": true, "schema": {nested}}}}}'
        ),
        f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {nested}}}}}]',
    ):
        body = f"{chat}{field}}}".encode()
        with suppress(InvalidRequest):
            read(body, ROOMY)
