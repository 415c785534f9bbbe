"""What an answer has to keep to, in the names that vLLM has for it, as the wire names it.

`response_format` and `grammar` are the wire's own and handed on as they are; here is who says the
same in other words. Whether it can be kept to is the worker's to say: by the wire's names, for
which `Spelled` knows the client's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from trio_worker.errors import WorkerError
from trio_worker.gateway.json_body import Object, invalid, is_too_deep, quoted

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""vLLM's old names; the new ones are the same fields of `structured_outputs`."""
_PREFIX = "guided_"
_WITHIN = "structured_outputs"
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OF_GRAMMAR = {"regex": "regex", "choice": "choice", "grammar": "lark"}
"""What the wire's `grammar` calls it."""
_SCHEMA_NAME = "answer"
"""OpenAI wants a schema to have a name."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """The client's names for places in a request, by the wire's; those inside come first."""

    places: Mapping[str, str]

    def put_right(self, error: WorkerError) -> None:
        """Let an error name the place as the client does."""
        field = error.details.get("field")
        if not isinstance(field, str):
            return
        for wire, client in self.places.items():
            rest = field.removeprefix(wire)
            if rest == field or (rest and rest[0] not in ".["):
                continue
            error.details["field"] = client + rest
            if error.message.startswith(field):
                error.message = client + rest + error.message.removeprefix(field)
            return


AS_IT_IS = Spelled({})


def to_wire(given: Object) -> tuple[Object, Spelled]:
    """The fields for it on the wire, out of all fields of a request.

    Raises `InvalidRequest`, with the place in `details.field`, also where it is said twice.
    """
    said = _said(given)
    if not said:
        return {}, AS_IT_IS
    (where, kind, value), *others = said
    own = [name for name in ("grammar", "response_format") if _asks_for_something(given, name)]
    if others or own:
        other = own[0] if own else others[0][0]
        raise invalid(where, f"{other} says what the answer is to be like, too; send one of them")
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}, Spelled({"response_format": where})
    if kind == "json":
        schema = {"name": _SCHEMA_NAME, "schema": _parsed(value, where)}
        places = {"response_format.json_schema.schema": where, "response_format": where}
        fields = {"response_format": {"type": "json_schema", "json_schema": schema}}
        return fields, Spelled(places)
    name = _OF_GRAMMAR[kind]
    return {"grammar": {name: value}}, Spelled({f"grammar.{name}": where, "grammar": where})


def _said(given: Object) -> list[tuple[str, str, Any]]:
    """Each place where it is said, of which kind it is, and what is there."""
    said = [(name, name.removeprefix(_PREFIX), given[name]) for name in GUIDED if name in given]
    structured = given.get(_WITHIN, {})
    if not isinstance(structured, dict):
        raise invalid(_WITHIN, f"expected an object with one of {', '.join(_KINDS)}")
    for name, value in structured.items():
        if value is None or value is False:
            continue
        if name not in _KINDS:
            raise invalid(f"{_WITHIN}.{quoted(name)}", f"not one of {', '.join(_KINDS)}")
        said.append((f"{_WITHIN}.{name}", name, value))
    return said


def _asks_for_something(given: Object, name: str) -> bool:
    return name in given and given[name] != {"type": "text"}


def _parsed(schema: Any, where: str) -> Any:
    """It may come as text with JSON in it."""
    if not isinstance(schema, str):
        return schema
    try:
        parsed: Any = msgspec.json.decode(schema)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise invalid(where, f"expected a JSON Schema; {exc}") from exc
    if isinstance(parsed, (dict, list)) and is_too_deep(parsed):
        raise invalid(where, "its brackets are nested too deep")
    return parsed
