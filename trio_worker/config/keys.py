"""What is said once about each key of a configuration, read from msgspec structs.

A struct's annotations hold type, range, default and meaning of each key. From them come the check
of one value and its message, the nearest key to a misspelt one, and what `generated` makes of them.

In `Meta(extra=…)` stands what a type cannot say: `secret`, whose value is never shown; `login`,
whose value may hold a user and a password, which are not shown either; and `derived`, from what
the value is taken when the key is null (the struct's field is never null).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec import inspect as shape

SUBJECT_TOKEN = r"\A[A-Za-z0-9_-]{1,64}\Z"  # noqa: S105 - a token of a subject
SUBJECT = r"\A[^\s.*>]+(\.([^\s.*>]+|\*))*(\.>)?\Z"
SUBJECT_PREFIX = r"\A[^\s.*>]+(\.[^\s.*>]+)*\.?\Z"
STREAM_NAME = r"\A[^\s.*>/\\]{1,255}\Z"
ORIGIN = r"\A(\*|[a-z][a-z0-9+.-]*://[^\s/?#]+)\Z"

_PATTERNS: dict[str | None, str] = {
    None: "text",
    SUBJECT_TOKEN: "1 to 64 of the characters A-Z a-z 0-9 _ -",
    SUBJECT: "a NATS subject",
    SUBJECT_PREFIX: "the beginning of a subject, without wildcards",
    STREAM_NAME: "a name without blanks, dots, slashes and wildcards",
    ORIGIN: "an origin such as https://chat.example, or *",
}

_Number: TypeAlias = shape.IntType | shape.FloatType


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One leaf of the configuration."""

    path: str
    """With dots, from the root struct."""
    type: shape.Type
    default: Any
    """As it would be written in the file: null where the value is derived."""
    nullable: bool
    description: str
    examples: tuple[str, ...] = ()
    secret: bool = False
    login: bool = False
    derived: str | None = None

    @property
    def is_text(self) -> bool:
        return isinstance(self.type, shape.StrType)

    @property
    def expected(self) -> str:
        return f"{_kind(self.type)}{' or null' if self.nullable else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A struct of the configuration, and what is inside."""

    path: str
    nullable: bool
    description: str
    children: dict[str, Key | Section]

    def leaves(self) -> Iterator[Key]:
        for child in self.children.values():
            if isinstance(child, Key):
                yield child
            else:
                yield from child.leaves()

    def sections(self) -> Iterator[Section]:
        """Itself, and every section below."""
        yield self
        for child in self.children.values():
            if isinstance(child, Section):
                yield from child.sections()


def describe(
    struct: type[Struct], *, path: str = "", nullable: bool = False, description: str = ""
) -> Section:
    """Read what the struct's annotations say."""
    info = shape.type_info(struct)
    assert isinstance(info, shape.StructType)
    children: dict[str, Key | Section] = {}
    for member in info.fields:
        inner = f"{path}.{member.name}".removeprefix(".")
        bare, said, marks, optional = _unwrap(member.type)
        meaning = str(said.get("description", ""))
        if isinstance(bare, shape.StructType):
            children[member.name] = describe(
                bare.cls, path=inner, nullable=optional, description=meaning
            )
            continue
        derived = marks.get("derived")
        children[member.name] = Key(
            path=inner,
            type=bare,
            default=None if derived else member.default,
            nullable=optional or derived is not None,
            description=meaning,
            examples=tuple(said.get("examples", ())),
            secret=bool(marks.get("secret")),
            login=bool(marks.get("login")),
            derived=derived,
        )
    return Section(path=path, nullable=nullable, description=description, children=children)


def _unwrap(kind: shape.Type) -> tuple[shape.Type, dict[str, Any], dict[str, Any], bool]:
    """The type itself, what is said about it, our own marks, and whether null is allowed."""
    if isinstance(kind, shape.Metadata):
        bare, said, marks, optional = _unwrap(kind.type)
        return bare, said | (kind.extra_json_schema or {}), marks | (kind.extra or {}), optional
    if isinstance(kind, shape.UnionType):
        (member,) = (each for each in kind.types if not isinstance(each, shape.NoneType))
        bare, said, marks, _ = _unwrap(member)
        return bare, said, marks, True
    return kind, {}, {}, False


def item_of(kind: shape.VarTupleType) -> shape.Type:
    return _unwrap(kind.item_type)[0]


# --- one value ------------------------------------------------------------------------------

_PYTHON_TYPES: dict[type[shape.Type], type] = {
    shape.BoolType: bool,
    shape.IntType: int,
    shape.FloatType: float,
    shape.LiteralType: str,
    shape.StrType: str,
}


def check(key: Key, value: object) -> tuple[object, str | None]:
    """The value as the struct holds it, or what is wrong with it."""
    if value is None and key.nullable:
        return None, None
    accepted, fault = _fault(key.type, value)
    if fault is None:
        return accepted, None
    return (
        None,
        f"{'the value' if key.secret else shown(value)} {fault}; expected {key.description}",
    )


def _fault(kind: shape.Type, value: object) -> tuple[object, str | None]:
    """The value in the type's own form, or how it differs from `kind`."""
    if isinstance(kind, shape.VarTupleType):
        return _fault_of_list(kind, value)
    if isinstance(kind, shape.FloatType) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if value is False and isinstance(kind, shape.LiteralType) and "off" in kind.values:
        # What YAML takes a bare `off` for.
        value = "off"
    wanted = _PYTHON_TYPES[type(kind)]
    if type(value) is not wanted:
        quotes = wanted is str and isinstance(value, bool | int | float)
        return None, (
            f"is {named(value)}, not {_kind(kind)}{'; put it in quotes' if quotes else ''}"
        )
    if isinstance(kind, shape.IntType | shape.FloatType):
        fits = kind.ge <= value <= kind.le  # type: ignore[operator]
        return value, None if fits else f"is not in {_range(kind)}"
    if isinstance(kind, shape.LiteralType):
        return value, None if value in kind.values else f"is not {_kind(kind)}"
    if isinstance(kind, shape.StrType):
        assert isinstance(value, str)
        return value, _fault_of_text(kind, value)
    return value, None


def _fault_of_text(kind: shape.StrType, value: str) -> str | None:
    if kind.max_length is not None and len(value) > kind.max_length:
        return f"is longer than {kind.max_length} characters"
    if kind.min_length is not None and len(value) < kind.min_length:
        return "is empty"
    if kind.pattern is not None and re.match(kind.pattern, value) is None:
        return f"is not {_kind(kind)}"
    # Neither can be passed on to a system call or encoded for the wire.
    if "\0" in value or any("\ud800" <= each <= "\udfff" for each in value):
        return "holds a NUL or half a character"
    return None


def _fault_of_list(kind: shape.VarTupleType, value: object) -> tuple[object, str | None]:
    if not isinstance(value, list):
        return None, f"is {named(value)}, not {_kind(kind)}"
    assert kind.min_length is not None
    assert kind.max_length is not None
    if not kind.min_length <= len(value) <= kind.max_length:
        return None, f"has {len(value)} entries, not {kind.min_length} to {kind.max_length}"
    accepted: list[object] = []
    for each in value:
        item, fault = _fault(item_of(kind), each)
        if fault is not None:
            return None, f"has an entry {shown(each)} that {fault}"
        if item in accepted:
            return None, f"has {shown(each)} twice"
        accepted.append(item)
    return tuple(accepted), None


# --- words ----------------------------------------------------------------------------------

_NAMES: dict[type, str] = {
    type(None): "nothing",
    bool: "a truth value",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def named(value: object) -> str:
    """What kind of value it is."""
    return _NAMES[type(value)]


def without_login(url: str) -> str:
    """`url` without the user and the password or token that may be part of it."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else url


def shown(value: object) -> str:
    """A value as it would be written in the file: on one line, and not longer than that."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        entries = ", ".join(map(shown, value[:4]))
        return f"[{entries}]" if len(value) <= 4 and len(entries) <= 80 else "a list"
    if isinstance(value, str):
        value = without_login(value)
        cut = value if len(value) <= 80 else value[:77] + "…"
        return json.dumps(cut, ensure_ascii=not cut.isprintable())
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a very large number"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def quoted(name: str) -> str:
    """A name that somebody wrote, fit for one line of a message."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def _kind(kind: shape.Type) -> str:
    """What a value of this type is called in a sentence."""
    if isinstance(kind, shape.IntType):
        return f"a whole number in {_range(kind)}"
    if isinstance(kind, shape.FloatType):
        return f"a number in {_range(kind)}"
    if isinstance(kind, shape.LiteralType):
        return f"one of {', '.join(map(str, kind.values))}"
    if isinstance(kind, shape.VarTupleType):
        return f"a list of {kind.min_length} to {kind.max_length}, each {_kind(item_of(kind))}"
    return _PATTERNS[kind.pattern] if isinstance(kind, shape.StrType) else "true or false"


def _range(kind: _Number) -> str:
    return f"{kind.ge}…{kind.le}"


def nearest(written: str, paths: Iterable[str]) -> str | None:
    """The path that was probably meant: the same name elsewhere, then a similar one."""
    parent, _, name = written.rpartition(".")
    # The nearer ones last, so that of two equal names the nearer one stays in a dict.
    ordered = sorted(paths, key=lambda path: _common_parents(path, parent))
    everywhere = {_plain(path.rpartition(".")[2]): path for path in ordered}
    siblings = {
        name: path for name, path in everywhere.items() if path.rpartition(".")[0] == parent
    }
    plain = _plain(name)
    if plain in everywhere:
        return everywhere[plain]
    for candidates, cutoff in ((siblings, 0.6), (everywhere, 0.75)):
        found = difflib.get_close_matches(plain, candidates, n=1, cutoff=cutoff)
        if found:
            return candidates[found[0]]
    return None


def _common_parents(path: str, other: str) -> int:
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _plain(name: str) -> str:
    """A key without what differs between ways of spelling it."""
    return name[:100].replace("_", "").replace("-", "").lower()
