"""JSON Schemas that callers send: how large one may be, and what `strict` asks of it.

The rules of `strict`, and the words for what breaks them, are OpenAI's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from trio_worker.wire.native.faults import refused

Schema: TypeAlias = dict[str, Any]
_Path: TypeAlias = tuple[str, ...]

SCHEMA_BYTES_MAX = 65_536
"""Of one schema as JSON."""
_PROPERTIES_MAX = 5_000
_LEVELS_MAX = 10
"""Of objects in objects."""
_ENUM_VALUES_MAX = 1_000
_NAMES_MAX = 120_000
"""Characters of all names of properties and definitions, and of all values that are given."""
_LONG_ENUM, _LONG_ENUM_MAX = 250, 15_000
"""From this many values on, they may have so many characters together."""


def schema_text(schema: Schema, where: str) -> str:
    """The schema as JSON. Raises `InvalidRequest` if it is too large."""
    try:
        text = msgspec.json.encode(schema)
    except RecursionError:
        raise refused(f"{where}: it is nested too deep", where) from None
    if len(text) > SCHEMA_BYTES_MAX:
        raise refused(
            f"{where}: it has {len(text)} bytes as JSON; at most {SCHEMA_BYTES_MAX} are taken",
            where,
            limit=SCHEMA_BYTES_MAX,
        )
    return text.decode()


def check_object(schema: Schema, whose: str, where: str) -> None:
    """Raise `InvalidRequest` unless objects are all that it is of, as far as it says.

    `whose` is for people, such as `function 'f'`; `where` is the field.
    """
    if schema.get("type", "object") != "object":
        got = msgspec.json.encode(schema["type"]).decode()[:64]
        raise refused(
            f"Invalid schema for {whose}: schema must be a JSON Schema of 'type: \"object\"', "
            f"got 'type: {got}'.",
            where,
        )


def check_strict(schema: Schema, whose: str, where: str) -> None:
    """Raise `InvalidRequest` unless the schema is one that `strict: true` may go with.

    Takes time in proportion to its size, which `schema_text` bounds.
    """
    if "type" not in schema or "anyOf" in schema:
        raise refused(
            f"Invalid schema for {whose}: schema must be a JSON Schema of 'type: \"object\"', "
            f"and must not have 'anyOf' at its root.",
            where,
        )
    check_object(schema, whose, where)
    counts = _Counts()
    for path, levels, each in _schemas_in(schema):
        fault = _fault_of_object(each) or counts.fault_with(each, levels)
        if fault is not None:
            raise refused(f"Invalid schema for {whose}: In context={path}, {fault}", where)


def _schemas_in(root: Schema) -> Iterator[tuple[_Path, int, Schema]]:
    """Every schema within, the outer ones first, with its path and in how many objects it is."""
    waiting: list[tuple[_Path, int, Schema]] = [((), 0, root)]
    while waiting:
        path, levels, schema = waiting.pop()
        levels += _is_of_objects(schema)
        yield path, levels, schema
        below = list(_below(schema))
        waiting += [((*path, *names), levels, each) for names, each in reversed(below)]


def _below(schema: Schema) -> Iterator[tuple[_Path, Schema]]:
    for name in ("properties", "$defs", "definitions"):
        members = schema.get(name)
        if isinstance(members, dict):
            yield from (
                ((name, key), each) for key, each in members.items() if isinstance(each, dict)
            )
    for name in ("anyOf", "allOf", "oneOf", "prefixItems"):
        members = schema.get(name)
        if isinstance(members, list):
            for place, each in enumerate(members):
                if isinstance(each, dict):
                    yield (name, str(place)), each
    if isinstance(items := schema.get("items"), dict):
        yield ("items",), items


def _is_of_objects(schema: Schema) -> bool:
    kind = schema.get("type")
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


def _properties(schema: Schema) -> Schema:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _fault_of_object(schema: Schema) -> str | None:
    """What `strict` does not allow about an object's own members."""
    if not (_is_of_objects(schema) or "properties" in schema):
        return None
    if schema.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false."
    required = {name for name in _listed(schema, "required") if isinstance(name, str)}
    missing = [name for name in _properties(schema) if name not in required]
    if not missing:
        return None
    return (
        "'required' is required to be supplied and to be an array including every key in "
        f"properties. Missing '{missing[0][:64]}'."
    )


@dataclass(slots=True)
class _Counts:
    """What is counted over a whole schema."""

    properties: int = 0
    enum_values: int = 0
    names: int = 0

    def fault_with(self, schema: Schema, levels: int) -> str | None:
        """Count what this one has; what has become too much, if anything has."""
        if levels > _LEVELS_MAX:
            return f"objects are nested in more than {_LEVELS_MAX} levels."
        self.properties += len(_properties(schema))
        if self.properties > _PROPERTIES_MAX:
            return f"the schema has more than {_PROPERTIES_MAX} properties."
        values = _listed(schema, "enum")
        self.enum_values += len(values)
        if self.enum_values > _ENUM_VALUES_MAX:
            return f"the schema has more than {_ENUM_VALUES_MAX} enum values."
        characters = _characters(values)
        if len(values) > _LONG_ENUM and characters > _LONG_ENUM_MAX:
            return f"an enum of that many values has more than {_LONG_ENUM_MAX} characters."
        self.names += characters + _characters([schema.get("const")])
        for key in ("properties", "$defs", "definitions"):
            if isinstance(members := schema.get(key), dict):
                self.names += _characters(members)
        if self.names > _NAMES_MAX:
            return f"the names in the schema have more than {_NAMES_MAX} characters."
        return None


def _characters(values: Iterable[object]) -> int:
    return sum(len(each) for each in values if isinstance(each, str))


def _listed(schema: Schema, name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
