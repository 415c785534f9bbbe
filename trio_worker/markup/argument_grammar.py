"""The grammar of arguments that are written one by one, as texts or as JSON.

Whatever may be written has to be read as what the schema accepts, and these formats are read by
rules that know little of schemas. So a strict tool whose schema asks for more is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trio_worker.markup.lark import ANY_TEXT, NotEnforceable, Rules, literal

_ABOUT = {"$comment", "$schema", "default", "deprecated", "description", "examples", "title"}
_SHARED = {"$defs", "definitions"}
_OF_OBJECTS = {*_ABOUT, *_SHARED, "additionalProperties", "properties", "required", "type"}
_OF_TEXTS = {*_ABOUT, *_SHARED, "const", "enum", "maxLength", "minLength", "type"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a format writes one argument, and how its parser reads the value."""

    before: Callable[[Rules, str], str]
    """What stands before the value, given the argument's key, in Lark."""
    end: str
    """The mark after the value."""
    after: str
    """What follows this mark, in Lark."""
    json_types: tuple[str, ...] | None
    """The types whose values are read as JSON; None: all but texts."""
    has_lines: bool
    """The value stands in lines of its own, and is read as it is; else it is stripped."""
    never: tuple[str, ...] = ()
    """Patterns of texts that are read as something else."""


def arguments_rule(
    rules: Rules, schema: dict[str, Any], spelling: Spelling, *, outer: str, strict: bool
) -> str:
    """What follows a call's name: the arguments of `schema`, in its order.

    `outer` is the mark of the call's end, which no text may have in it. Raises NotEnforceable.
    """
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise NotEnforceable("'properties' has to be an object, and 'required' an array")
    if strict:
        _check(sorted(schema.keys() - _OF_OBJECTS))
        _check([f"required: {key}" for key in required if key not in properties])
    shared: dict[str, Any] = {key: schema[key] for key in _SHARED & schema.keys()}
    arguments = []
    for key, described in properties.items():
        if not key or set(key) & set("<>\"' \n\t"):
            raise NotEnforceable(f"this model's calls cannot have an argument named {key!r}")
        accepted = {**shared, **(described if isinstance(described, dict) else {})}
        value = _value(rules, accepted, spelling, outer=outer, strict=strict)
        argument = rules.rule(f"{spelling.before(rules, key)} {value} {spelling.after}")
        arguments.append(argument if key in required else f"{argument}?")
    return rules.rule(" ".join(arguments) or '""')


def _value(
    rules: Rules, schema: dict[str, Any], spelling: Spelling, *, outer: str, strict: bool
) -> str:
    """A value that `schema` accepts, and the mark after it."""
    type_ = schema.get("type")
    line = literal("\n") if spelling.has_lines else ""
    text = ANY_TEXT
    if type_ == "string":
        if strict:
            _check(sorted(schema.keys() - _OF_TEXTS))
        if (options := _options(schema)) is not None:
            if strict:
                _check([f"enum: {each!r}" for each in options if not _is_kept(each, spelling)])
            return f"({' | '.join(map(literal, options))}) {line} {rules.mark(spelling.end)}"
        text = _text(schema, spelling, strict=strict)
    elif spelling.json_types is None or type_ in spelling.json_types:
        return f"{rules.json(schema)} {line} {rules.mark(spelling.end)}"
    elif strict:
        _check([f"type: {type_}"])
    line = r"\n" if spelling.has_lines else ""
    return rules.before(
        spelling.end,
        text + line,
        never=[each + line for each in spelling.never],
        without=[outer],
    )


def _options(schema: dict[str, Any]) -> list[str] | None:
    """The texts that a schema names, if it does."""
    named = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if named is None else [each for each in named if isinstance(each, str)]


def _is_kept(option: str, spelling: Spelling) -> bool:
    """Whether a text is read as it is."""
    is_other = any(re.fullmatch(each, option) for each in spelling.never)
    return not is_other and (spelling.has_lines or option == option.strip())


def _text(schema: dict[str, Any], spelling: Spelling, *, strict: bool) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    for key, number in (("minLength", least), ("maxLength", most)):
        if number != "" and type(number) is not int:
            raise NotEnforceable(f"{key!r} has to be an integer")
    if least and strict and not spelling.has_lines:
        _check(["minLength"])
    return f"(?s:.{{{least},{most}}})"


def _check(more: list[str]) -> None:
    """Raises if a strict schema has `more` than can be enforced."""
    if more:
        raise NotEnforceable(f"{more[0]!r} cannot be enforced in this model's calls")
