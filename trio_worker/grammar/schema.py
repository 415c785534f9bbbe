"""A caller's JSON Schema: read, held against bounds, and put into Lark; where its faults are.

What it must not have is for llguidance to say, which names the keyword and not the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

from trio_worker.grammar import GrammarRefused

SCHEMA_BYTES_MAX = 64 * 1024
DEPTH_MAX = 48
"""Schemas within each other; past 60 the compiler gives up, and says nothing of use."""
PROPERTIES_MAX = 5000
"""Of all objects together, as OpenAI has it."""
OPTIONAL_MAX = 400
"""Of one object. Any of them may be left out, so each state has as many ways on; past some 500 the
matcher gives up in the middle of an answer."""

WHITESPACE = "[ \n]?"
"""Between the parts of an answer: what models write, and nothing that could go on for ever."""
OPTIONS = "x-guidance"
"""A key of a schema that speaks to llguidance; it is ours, and not the caller's."""

Schema: TypeAlias = dict[str, Any]
_Asks: TypeAlias = Callable[[Mapping[str, Any]], str | None]
"""For a keyword of a schema."""

_OF_A_REFERENCE = " while processing json-schema:///"
"""After this, llguidance says which schema that another one refers to it speaks of."""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_OF_ONE = (
    *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not"),
    *("if", "then", "else", "unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)


def read(text: str) -> Schema:
    """The schema that `text` is. Raises `GrammarRefused` for what is none, or too big."""
    if len(text.encode()) > SCHEMA_BYTES_MAX:
        raise GrammarRefused(f"the schema is longer than {SCHEMA_BYTES_MAX} bytes")
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise GrammarRefused("the schema is nested too deeply") from None
    except ValueError as exc:
        raise GrammarRefused(f"the schema is not JSON: {exc}") from None
    if schema is True:
        return {}
    if schema is False:
        raise GrammarRefused("the schema is false, which nothing is valid against")
    if not isinstance(schema, dict):
        raise GrammarRefused("a schema is an object, or true or false")
    _check(schema)
    return schema


def prepared(schema: Schema) -> Schema:
    """The schema as it goes to the compiler."""
    own = {key: value for key, value in schema.items() if key != OPTIONS}
    return {OPTIONS: {"whitespace_pattern": WHITESPACE}, **own}


def lark(schema: Schema) -> str:
    """The schema as Lark takes it, in place of a rule."""
    return f"%json {json.dumps(prepared(schema))}"


def placed(schema: Schema, fault: str) -> str:
    """The compiler's message about this schema, and the place it speaks of, if that is clear."""
    fault, _, below = fault.partition(_OF_A_REFERENCE)
    missing = re.match(r"Unimplemented keys: (\[.*\])", fault)
    asked: list[_Asks]
    if missing is not None:
        names = json.loads(missing[1])
        fault, asked = f"{', '.join(names)}: not supported", [_has(name) for name in names]
    elif fault.startswith("oneOf constraints"):
        fault = "oneOf: not supported, unless it is plain that at most one can match; use anyOf"
        asked = [_has("oneOf")]
    elif fault.startswith("patternProperty"):
        asked = [_has("patternProperties")]
    else:
        asked = [_told_by(fault)]
    for path, each in places(schema):
        for keyword_in in asked if path.startswith(below) else ():
            if (keyword := keyword_in(each)) is not None:
                return f"{fault} (at {path}/{keyword})"
    return fault


def places(schema: Schema) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within this one, itself included: its JSON pointer, and what it says."""
    left: list[tuple[str, Any, int]] = [("#", schema, 1)]
    while left:
        path, each, depth = left.pop()
        if not isinstance(each, dict):
            continue
        if depth > DEPTH_MAX:
            raise GrammarRefused(f"schemas are nested deeper than {DEPTH_MAX} (at {path})")
        yield path, each
        within = [(f"{path}/{at}", below, depth + 1) for at, below in _within(each)]
        left += reversed(within)


def _within(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword, value in schema.items():
        if keyword in _OF_NAMES and isinstance(value, dict):
            for name, below in value.items():
                escaped = name.replace("~", "~0").replace("/", "~1")
                yield f"{keyword}/{escaped}", below
        elif keyword in (*_OF_LISTS, "items") and isinstance(value, list):
            for number, below in enumerate(value):
                yield f"{keyword}/{number}", below
        elif keyword in _OF_ONE:
            yield keyword, value


def _check(schema: Schema) -> None:
    total = 0
    for path, each in places(schema):
        properties = each.get("properties")
        if not isinstance(properties, dict):
            continue
        total += len(properties)
        required = each.get("required")
        optional = len(properties.keys() - set(_texts(required)))
        if optional > OPTIONAL_MAX:
            raise GrammarRefused(
                f"an object has {optional} optional properties, and may have {OPTIONAL_MAX}; "
                f"name them in required (at {path})"
            )
        if total > PROPERTIES_MAX:
            raise GrammarRefused(f"the schema has more than {PROPERTIES_MAX} properties")


def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _has(keyword: str) -> _Asks:
    return lambda schema: keyword if keyword in schema else None


def _told_by(fault: str) -> _Asks:
    """Finds the keyword whose name and value are in the message, or whose value is a text there."""

    def keyword_in(schema: Mapping[str, Any]) -> str | None:
        for keyword, value in schema.items():
            if keyword in ("pattern", "$ref") and isinstance(value, str):
                # A reference is told without its beginning.
                is_told = (text := value.lstrip("#")) != "" and text in fault
            else:
                is_named = re.search(rf"\b{re.escape(keyword)}\b", fault)
                is_told = is_named is not None and _is_in(fault, value)
            if is_told:
                return keyword
        return None

    return keyword_in


def _is_in(fault: str, value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_in(fault, each) for each in value)
    return (value if isinstance(value, str) else json.dumps(value)) in fault
