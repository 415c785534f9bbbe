"""What is made of all keys: a JSON Schema, a file with every value, the tables of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct
from msgspec import inspect as shape

from trio_worker.config import strict_yaml
from trio_worker.config.keys import Key, Section, item_of, shown, without_login

_REMARK_COLUMN = 44


def schema(section: Section) -> dict[str, Any]:
    """The JSON Schema of a section. A section that is null has its defaults."""
    return {
        **({"description": section.description} if section.description else {}),
        "type": ["object", "null"],
        "properties": {
            name: _schema_of_key(child) if isinstance(child, Key) else schema(child)
            for name, child in section.children.items()
        },
        "additionalProperties": False,
    }


def _schema_of_key(key: Key) -> dict[str, Any]:
    of_type = _schema_of_type(key.type)
    if key.nullable:
        of_type["type"] = [of_type["type"], "null"]
    return {
        "description": key.description + (f"; default: {key.derived}" if key.derived else ""),
        **of_type,
        "default": list(key.default) if isinstance(key.default, tuple) else key.default,
        **({"examples": list(key.examples)} if key.examples else {}),
    }


def _schema_of_type(kind: shape.Type) -> dict[str, Any]:
    if isinstance(kind, shape.BoolType):
        return {"type": "boolean"}
    if isinstance(kind, shape.IntType | shape.FloatType):
        name = "integer" if isinstance(kind, shape.IntType) else "number"
        return {"type": name, "minimum": kind.ge, "maximum": kind.le}
    if isinstance(kind, shape.LiteralType):
        return {"type": "string", "enum": list(kind.values)}
    if isinstance(kind, shape.VarTupleType):
        return {
            "type": "array",
            "items": _schema_of_type(item_of(kind)),
            "minItems": kind.min_length,
            "maxItems": kind.max_length,
            "uniqueItems": True,
        }
    assert isinstance(kind, shape.StrType)
    limits = {
        "minLength": kind.min_length,
        "maxLength": kind.max_length,
        # JSON Schema has the patterns of ECMAScript, where `$` is the very end.
        "pattern": kind.pattern and kind.pattern.replace(r"\A", "^").replace(r"\Z", "$"),
    }
    return {"type": "string"} | {name: each for name, each in limits.items() if each is not None}


def filled(root: Section, values: Struct, remark: Callable[[str], str]) -> str:
    """cluster.yaml with every key, its value in `values`, and the remark on its path."""
    return "\n".join(["cluster:", *_filled(root, values, remark, "  "), ""])


def _filled(
    section: Section, values: Struct, remark: Callable[[str], str], indent: str
) -> Iterator[str]:
    for name, child in section.children.items():
        value = getattr(values, name)
        if isinstance(child, Section) and value is not None:
            yield f"{indent}{name}:"
            yield from _filled(child, value, remark, f"{indent}  ")
            continue
        visible = _visible(child, value) if isinstance(child, Key) else value
        hidden = "" if visible == value else ", hidden"
        written = f"{indent}{name}: {strict_yaml.written(visible)}"
        yield f"{written:<{_REMARK_COLUMN}}  # {remark(child.path)}{hidden}"


def _visible(key: Key, value: Any) -> Any:
    if key.secret and value is not None:
        return "***"
    return without_login(value) if key.login else value


def markdown(root: Section) -> str:
    """Every key with its values, default and meaning, in one table per section."""
    blocks = []
    for section in root.sections():
        rows = [_row(child) for child in section.children.values() if isinstance(child, Key)]
        if rows:
            note = [f"{_sentence(section.description)}\n"] if section.description else []
            head = ["| key | value | default | meaning |", "|---|---|---|---|"]
            blocks.append("\n".join([f"### {section.path}\n", *note, *head, *rows]))
    return "\n\n".join(blocks) + "\n"


def _row(key: Key) -> str:
    cells = (f"`{key.path}`", key.expected, _default(key), _sentence(key.description))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(key: Key) -> str:
    if key.derived:
        return key.derived
    if isinstance(key.default, str):
        return f"`{key.default}`"
    return f"`{shown(key.default)}`"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
