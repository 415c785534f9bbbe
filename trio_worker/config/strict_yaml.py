"""The part of YAML that a configuration needs, read from text that may be hostile.

Plain values, lists and mappings with text as keys; no tags, no aliases, no dates, a bounded
depth and number. What is left cannot grow beyond the text it was read from, nor take long. The
reader remembers the line of every key, so that a message can say where a value stands.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

DEPTH_MAX = 16
VALUES_MAX = 10_000
KEY_MAX = 255
"""Characters: a key stands in the path of everything below it."""
NUMBER_MAX = 4300
"""Characters: YAML counts in sixties, too, which takes the square of their length."""


class NotYaml(Exception):
    """The text is not YAML, or more of YAML than is read here; says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    value: Plain
    lines: dict[str, int]
    """Of every key, by its path with dots."""
    repeated: list[tuple[str, int, int]]
    """The keys written twice: path and both lines. The first one counts."""


def written(value: object) -> str:
    """A plain value, or a tuple of them, on one line, as `parse` reads it again."""
    text: str = yaml.safe_dump(
        list(value) if isinstance(value, tuple) else value,
        allow_unicode=True,
        default_flow_style=True,
        # Other text with line breaks would be written over several lines.
        default_style='"' if isinstance(value, str) and not value.isprintable() else None,
        width=math.inf,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse(text: bytes) -> Document:
    """The one document in `text`; `None` as its value if there is none. Raises `NotYaml`."""
    try:
        return _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # A password that begins like a tag would be quoted here.
        problem = re.sub(r"'![^']*'", "'!…'", str(error.problem or error.context))
        raise NotYaml(f"{_place(mark)}{problem}") from None
    except yaml.YAMLError as error:
        raise NotYaml(str(error).splitlines()[0]) from None
    except (ValueError, ArithmeticError, LookupError):
        # PyYAML lets these through for numbers and characters that cannot be.
        raise NotYaml("a value that cannot be read") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML, without dates: they would turn text that looks like one into an object."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way of choosing resolvers
        first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _parse(text: bytes) -> Document:
    reader = _Reader(_Loader(text))
    reader.loader.get_event()
    if reader.loader.check_event(yaml.StreamEndEvent):
        return Document(value=None, lines={}, repeated=[])
    reader.loader.get_event()
    value = reader.read("", 0)
    reader.loader.get_event()
    if not reader.loader.check_event(yaml.StreamEndEvent):
        raise NotYaml(f"{_place(reader.loader.peek_event().start_mark)}a second YAML document")
    return Document(value=value, lines=reader.lines, repeated=reader.repeated)


@dataclass(slots=True)
class _Reader:
    """A stream of events, and what was met on the way."""

    loader: Any
    lines: dict[str, int] = field(default_factory=dict)
    repeated: list[tuple[str, int, int]] = field(default_factory=list)
    values: int = 0

    def read(self, path: str, depth: int) -> Plain:
        """The value that begins at the next event."""
        event: Any = self.loader.get_event()
        if isinstance(event, yaml.AliasEvent):
            raise NotYaml(f"{_place(event.start_mark)}an alias; put text in quotes")
        if event.anchor is not None or event.tag not in (None, "!"):
            raise NotYaml(f"{_place(event.start_mark)}an anchor or a tag; put text in quotes")
        if depth > DEPTH_MAX:
            raise NotYaml(f"{_place(event.start_mark)}nested deeper than {DEPTH_MAX} levels")
        self.values += 1
        if self.values > VALUES_MAX:
            raise NotYaml(f"{_place(event.start_mark)}more than {VALUES_MAX} values")
        if isinstance(event, yaml.ScalarEvent):
            tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
            if tag != "tag:yaml.org,2002:str" and len(event.value) > NUMBER_MAX:
                raise NotYaml(f"{_place(event.start_mark)}a number of too many digits")
            node = yaml.ScalarNode(tag, event.value)
            scalar: Plain = self.loader.construct_object(node)
            return scalar
        if isinstance(event, yaml.SequenceStartEvent):
            return self._read_list(path, depth)
        return self._read_mapping(path, depth)

    def _read_list(self, path: str, depth: int) -> list[Plain]:
        items: list[Plain] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self.read(path, depth + 1))
        self.loader.get_event()
        return items

    def _read_mapping(self, path: str, depth: int) -> dict[str, Plain]:
        mapping: dict[str, Plain] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            key: Any = self.loader.get_event()
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarEvent):
                raise NotYaml(f"{_place(key.start_mark)}a key that is not text")
            if len(key.value) > KEY_MAX:
                raise NotYaml(f"{_place(key.start_mark)}a key of more than {KEY_MAX} characters")
            inner = f"{path}.{key.value}" if path else key.value
            value = self.read(inner, depth + 1)
            if key.value in mapping:
                self.repeated.append((inner, self.lines[inner], line))
                continue
            mapping[key.value] = value
            self.lines[inner] = line
        self.loader.get_event()
        return mapping


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
