"""JSON Schema, keyword by keyword: what an answer may be, and which keywords are refused."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grammars import byte_grammars, drawn, is_taken, schema_grammar, text_of

from trio_worker.grammar import GrammarRefused, schema

GRAMMARS = byte_grammars()

PAIR = {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}

CASES: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("no keyword", {}, [None, 1, "x", [1], {"a": 1}], []),
    ("true", True, [None, {"a": []}], []),
    ("null", {"type": "null"}, [None], [0, False]),
    ("boolean", {"type": "boolean"}, [True, False], [1, "true"]),
    ("integer", {"type": "integer"}, [0, -12, 10**20], [1.5, "1"]),
    ("number", {"type": "number"}, [0, -1.5, 2e30], ["1"]),
    ("several types", {"type": ["string", "null"]}, ["x", None], [1]),
    ("enum", {"enum": ["red", 4, None, {"a": 1}]}, ["red", 4, None, {"a": 1}], ["blue", 5]),
    ("const", {"const": "<|end|>"}, ["<|end|>"], ["", "<"]),
    ("minimum", {"type": "integer", "minimum": 5}, [5, 60], [4, -5]),
    ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 5}, [6], [5]),
    ("maximum", {"type": "integer", "maximum": 5}, [5, -60], [6, 50]),
    ("exclusiveMaximum", {"type": "integer", "exclusiveMaximum": 5}, [4], [5]),
    ("bounds of a number", {"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1], [1.5, -1]),
    ("multipleOf", {"type": "integer", "multipleOf": 3}, [0, 9, -3], [4]),
    ("minLength", {"type": "string", "minLength": 2}, ["ab", "äöü"], ["a", ""]),
    ("maxLength", {"type": "string", "maxLength": 2}, ["", "äö"], ["abc"]),
    ("pattern", {"type": "string", "pattern": "^a[0-9]+$"}, ["a1", "a22"], ["a", "ba1", "a1b"]),
    ("a pattern within", {"type": "string", "pattern": "b/"}, ["b/", "ab/c"], ["a", "b"]),
    ("format date", {"type": "string", "format": "date"}, ["2024-02-29"], ["2024-2-1", "x"]),
    ("format uuid", {"type": "string", "format": "uuid"},
     ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    ("format ipv4", {"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["1.2.3", "1.2.3.256"]),
    ("items", {"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["x"], [1, "x"]]),
    ("minItems", {"type": "array", "items": {"type": "null"}, "minItems": 2},
     [[None, None], [None] * 3], [[], [None]]),
    ("maxItems", {"type": "array", "items": {"type": "null"}, "maxItems": 1}, [[], [None]],
     [[None, None]]),
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}],
                     "items": False, "minItems": 2}, [[1, "x"]], [[1], ["x", 1], [1, "x", 2]]),
    ("properties", {"type": "object", **PAIR}, [{}, {"a": 1}, {"a": 1, "b": "x"}, {"c": 1}],
     [{"a": "x"}, [1]]),
    ("required", {"type": "object", **PAIR, "required": ["b"]},
     [{"b": "x"}, {"a": 1, "b": "x"}], [{}, {"a": 1}]),
    ("additionalProperties false", {"type": "object", **PAIR, "additionalProperties": False},
     [{"a": 1}], [{"c": 1}]),
    ("additionalProperties", {"type": "object", "additionalProperties": {"type": "integer"}},
     [{"x": 1, "y": 2}], [{"x": "y"}]),
    ("patternProperties", {"type": "object", "patternProperties": {"^n_": {"type": "integer"}},
                           "additionalProperties": False}, [{"n_a": 1}], [{"n_a": "x"}, {"b": 1}]),
    ("minProperties", {"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    ("maxProperties", {"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, [1, "x"], ["y", None]),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "x"], [None]),
    ("allOf", {"allOf": [{"type": "integer"}, {"minimum": 3}]}, [3], [2, "x"]),
    ("$ref", {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
     [[1, 2]], [["x"]]),
    ("a $ref to the whole", {"type": "object", "properties": {"next": {"$ref": "#"}},
                             "additionalProperties": False},
     [{}, {"next": {"next": {}}}], [{"next": 1}, {"other": {}}]),
    ("description", {"type": "integer", "description": "how many", "title": "n", "default": 1},
     [1], ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [each[1:] for each in CASES],
    ids=[each[0] for each in CASES],
)
def test_an_answer_is_what_the_schema_accepts(
    wanted: Any, right: list[Any], wrong: list[Any]
) -> None:
    grammar = schema_grammar(GRAMMARS, wanted)
    for value, expected in [(each, True) for each in right] + [(each, False) for each in wrong]:
        if isinstance(wanted, dict):
            assert (
                jsonschema.Draft202012Validator(
                    wanted, format_checker=jsonschema.FormatChecker()
                ).is_valid(value)
                == expected
                or "format" in wanted
            )
        spaced = json.dumps(value, ensure_ascii=False).encode()
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        assert is_taken(GRAMMARS, grammar, spaced) == expected, spaced
        assert is_taken(GRAMMARS, grammar, compact) == expected, compact


def test_one_space_or_new_line_may_stand_between_the_parts_and_not_two() -> None:
    grammar = schema_grammar(GRAMMARS, {"type": "array", "items": {"type": "integer"}})
    assert is_taken(GRAMMARS, grammar, b"[\n1 , 2\n]")
    assert not is_taken(GRAMMARS, grammar, b"[  1]")
    assert not is_taken(GRAMMARS, grammar, b"[1] ")
    assert not is_taken(GRAMMARS, grammar, b" [1]")


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -20, "maximum": 300},
        {"type": "boolean"},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"enum": ["x", 1, None]},
        {"const": 'a "<|end|>" \\ é'},
        {"type": "string", "format": "date"},
        {"$ref": "#/$defs/leaf"},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {
                "type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2
            }
        ),
        st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(0, 3)).map(
            lambda pair: {
                "type": "object",
                "properties": {f"p{n}": each for n, each in enumerate(pair[0])},
                "required": [f"p{n}" for n in range(min(pair[1], len(pair[0])))],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_whatever_is_drawn_to_its_end_validates(wanted: Any, chance: Random) -> None:
    wanted = {**wanted, "$defs": {"leaf": {"type": "null"}}}
    tokens, is_whole = drawn(GRAMMARS, schema_grammar(GRAMMARS, wanted), chance, most=2000)
    assert is_whole
    jsonschema.validate(json.loads(text_of(tokens)), wanted)


REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "null"}}, "not: not supported (at #/not)"),
    ({"if": {}, "then": {}}, "if, then: not supported (at #/if)"),
    (
        {"type": "object", "properties": {"a/b": {"type": "array", "uniqueItems": True}}},
        "uniqueItems: not supported (at #/properties/a~1b/uniqueItems)",
    ),
    ({"type": "array", "items": {"contains": {}}}, "contains: not supported (at #/items/contains)"),
    (
        {"anyOf": [{"type": "null"}, {"propertyNames": {}}]},
        "propertyNames: not supported (at #/anyOf/1/propertyNames)",
    ),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired: not supported"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties: not supported"),
    ({"$dynamicRef": "#x"}, "$dynamicRef: not supported"),
    (
        {"oneOf": [{"type": "string"}, {"minLength": 2}]},
        "at most one can match; use anyOf (at #/oneOf)",
    ),
    ({"type": "string", "format": "phone"}, "Unknown format: phone (at #/format)"),
    (
        {"$defs": {"k": {"type": "string", "pattern": "(?=a)b"}}, "$ref": "#/$defs/k"},
        "is not supported (at #/$defs/k/pattern)",
    ),
    (
        {
            "$defs": {name: {"type": "string", "pattern": "[a"} for name in "ab"},
            "$ref": "#/$defs/b",
        },
        "(at #/$defs/b/pattern)",
    ),
    ({"items": {"$ref": "#/$defs/none"}, "type": "array"}, "does not exist (at #/items/$ref)"),
    ({"$ref": "https://example.com/schema"}, "(at #/$ref)"),
    ({"items": {"type": "text"}, "type": "array"}, "Invalid type: text (at #/items/type)"),
    ({"type": "string", "minLength": "x"}, "'minLength', got \"x\" (at #/minLength)"),
    (
        {"type": "integer", "minimum": 5, "maximum": 3},
        "minimum (5) is greater than maximum (3) (at #/minimum)",
    ),
    (
        {"type": "object", "required": ["a"], "additionalProperties": False},
        "required property 'a' is unsatisfiable (at #/required)",
    ),
    ({"patternProperties": {"a": {}, "b": {}}}, "not disjoint (at #/patternProperties)"),
    ({"enum": []}, "Unsatisfiable schema"),
    ({"$ref": "#"}, "no answer keeps to it"),
]


@pytest.mark.parametrize(
    ("wanted", "said"), REFUSED, ids=[next(iter(each[0])) + each[1][:9] for each in REFUSED]
)
def test_what_is_not_supported_is_refused_by_its_name_with_its_place(
    wanted: Any, said: str
) -> None:
    with pytest.raises(GrammarRefused) as refused:
        GRAMMARS.check(schema_grammar(GRAMMARS, wanted), "{")
    message = schema.placed(wanted, str(refused.value))
    assert said in message
    assert "\n" not in message
