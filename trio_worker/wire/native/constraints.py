"""What the text of an answer is to keep to: `response_format`, and our own `grammar`."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from trio_worker.protocol.prompt import Choice, Constraint, JsonSchema, Lark, Regex
from trio_worker.wire.native.faults import check_name, invalid_value, missing, refused
from trio_worker.wire.native.schemas import check_strict, schema_text

_CHOICE_CHARACTERS_MAX = 65_536
"""Of all options together."""
_FORMATS = "'json_object', 'json_schema', and 'text'"


class _NamedSchema(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    json_schema: _NamedSchema | None = None


_Option = Annotated[str, Meta(min_length=1)]


class GrammarField(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of these is set."""

    regex: Annotated[str, Meta(min_length=1, max_length=8192)] | None = None
    choice: Annotated[list[_Option], Meta(min_length=1, max_length=1000)] | None = None
    lark: Annotated[str, Meta(min_length=1, max_length=65_536)] | None = None


def constraint_of(
    response_format: ResponseFormat | None, grammar: GrammarField | None, *, allow_lark: bool
) -> Constraint | None:
    """What the answer keeps to; None: nothing.

    Raises `InvalidRequest`, with the place in `details.field`.
    """
    of_format = None if response_format is None else _of_format(response_format)
    if grammar is None:
        return of_format
    if of_format is not None:
        raise refused(
            "grammar: response_format says already what the answer keeps to; send one of them",
            "grammar",
        )
    return _of_grammar(grammar, allow_lark=allow_lark)


def _of_format(given: ResponseFormat) -> Constraint | None:
    match given.type:
        case "text":
            return None
        case "json_object":
            return JsonSchema(schema='{"type":"object"}')
        case "json_schema":
            return _of_schema(given.json_schema)
        case _:
            raise invalid_value(given.type, _FORMATS, "response_format.type")


def _of_schema(given: _NamedSchema | None) -> Constraint:
    where = "response_format.json_schema"
    if given is None:
        raise missing(where)
    check_name(given.name, f"{where}.name")
    if given.schema is None:
        raise missing(f"{where}.schema")
    text = schema_text(given.schema, f"{where}.schema")
    if given.strict:
        check_strict(given.schema, f"response_format '{given.name}'", "response_format")
    return JsonSchema(schema=text)


def _of_grammar(given: GrammarField, *, allow_lark: bool) -> Constraint:
    if sum(each is not None for each in (given.regex, given.choice, given.lark)) != 1:
        raise refused("grammar: send exactly one of regex, choice and lark", "grammar")
    if given.regex is not None:
        return Regex(pattern=given.regex)
    if given.choice is not None:
        if sum(map(len, given.choice)) > _CHOICE_CHARACTERS_MAX:
            raise refused(
                f"grammar.choice: at most {_CHOICE_CHARACTERS_MAX} characters are taken",
                "grammar.choice",
                limit=_CHOICE_CHARACTERS_MAX,
            )
        return Choice(options=tuple(dict.fromkeys(given.choice)))
    assert given.lark is not None
    if not allow_lark:
        raise refused(
            "grammar.lark: this worker is not set to take grammars in Lark", "grammar.lark"
        )
    return Lark(grammar=given.lark)
