"""Calls whose arguments are written as JSON: they are handed out as they come, and as written.

What is written is followed by its strings and brackets only; a model that writes arguments which
are no JSON has them handed out like that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from trio_worker.markup.calls import MOST_TO_PARSE, Calls, Ended, NoCall, SteppedSection, known_id
from trio_worker.markup.finding import may_become


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLayout:
    """Where the arguments of a call begin, and what comes after them."""

    head: re.Pattern[str]
    """All of a call up to its arguments' first brace, that included: a `name`, and perhaps a
    `number`, which make the call's id together."""
    begun_head: re.Pattern[str]
    """The beginning of such a text."""
    depth: int = 0
    """How many brackets are open where the arguments end."""
    end: str = ""
    """The mark of one call's end, where a section has several."""
    has_several: bool = False
    name_space: str = ""
    """What may stand before a name, and is no part of it."""

    def name_in(self, head: re.Match[str]) -> str:
        return head["name"].removeprefix(self.name_space)

    def id_in(self, head: re.Match[str]) -> str | None:
        numbered = "number" in head.groupdict()
        return head.string[head.start("name") : head.end("number")] if numbered else None


class _At(Enum):
    HEAD = "before or within the first head"
    WHOLE = "in a value that cannot be handed out as it comes"
    ARGUMENTS = "in the arguments"
    TAIL = "between the arguments and the end of the object that they are in"
    BETWEEN = "after a call"


class JsonSection(SteppedSection[_At]):
    """Its state: where it is, the text that it has not done with, and the brackets before that."""

    def __init__(self, layout: JsonLayout, calls: Calls) -> None:
        super().__init__(_At.HEAD)
        self._layout = layout
        self._calls = calls
        self._end = calls.style.end
        self._marks = tuple(mark for mark in (layout.end, self._end) if mark)
        self._followed = 0
        self._brackets = Brackets()
        self._is_in_call = False

    @property
    def undecided(self) -> int:
        return 0 if self._at in (_At.ARGUMENTS, _At.TAIL) else len(self._text)

    def finish(self, *, is_cut: bool) -> Ended | NoCall:  # noqa: ARG002 - what is whole was taken
        if self._at in (_At.HEAD, _At.WHOLE):
            return NoCall(text=self._text)
        is_mark = any(mark.startswith(self._text) for mark in self._marks)
        return Ended(rest=self._text if self._at is _At.BETWEEN and not is_mark else "")

    def _step(self) -> Ended | NoCall | None:
        match self._at:
            case _At.HEAD:
                return self._read_head()
            case _At.WHOLE:
                return self._read_whole()
            case _At.ARGUMENTS:
                return self._read_arguments()
            case _At.TAIL:
                return self._read_tail()
            case _At.BETWEEN:
                return self._read_between()

    def _read_head(self) -> NoCall | None:
        layout, text, first = self._layout, self._text, self._text.lstrip()
        if (head := layout.head.match(text)) is not None:
            if not self._calls.has(layout.name_in(head)):
                return NoCall(text=text[: head.end()], rest=text[head.end() :])
            self._begin(head)
        elif not layout.begun_head.fullmatch(text):
            if first[:1] not in tuple("{["):
                return NoCall(text="", rest=text) if first else None
            self._at = _At.WHOLE
        return None

    def _begin(self, head: re.Match[str]) -> None:
        self._calls.begin(self._layout.name_in(head), known_id(self._layout.id_in(head)))
        self._text = self._text[head.end() - 1 :]
        self._brackets = Brackets(depth=self._layout.depth)
        self._at, self._is_in_call = _At.ARGUMENTS, True

    def _read_whole(self) -> Ended | NoCall | None:
        """A JSON value: what is in it comes in another order, or it is a list of calls."""
        considered = self._text[:MOST_TO_PARSE]
        at, is_whole = self._brackets.follow(considered, self._marks, since=self._followed)
        self._followed = at
        if is_whole or self._text.startswith(self._marks, at):
            value, self._text = self._text[:at], self._text[at:]
            if not self._calls.take_whole(value):
                return NoCall(text=value, rest=self._text)
            self._at, self._layout = _At.BETWEEN, replace(self._layout, has_several=False)
            return self._over()
        if len(self._text) >= MOST_TO_PARSE + len(self._end):
            return NoCall(text=considered, rest=self._text[MOST_TO_PARSE:])
        return None

    def _read_arguments(self) -> Ended | None:
        closed = self._layout.depth
        at, is_whole = self._brackets.follow(self._text, self._marks, closed=closed)
        self._calls.argue(self._text[:at])
        self._text = self._text[at:]
        if is_whole and closed:
            self._at = _At.TAIL
        elif is_whole or self._text.startswith(self._marks):
            self._at = _At.BETWEEN
            if not self._marks:
                return self._end_call()
        return None

    def _read_tail(self) -> Ended | None:
        at, is_whole = self._brackets.follow(self._text, self._marks)
        self._text = self._text[at:]
        if is_whole or self._text.startswith(self._marks):
            self._at = _At.BETWEEN
        return None

    def _read_between(self) -> Ended | None:  # noqa: PLR0911 - a case each
        """After the arguments, or after a call: its end, the section's, or another call."""
        layout, text = self._layout, self._text.lstrip()
        self._text = text
        if self._is_in_call and layout.end and text.startswith(layout.end):
            self._text = text[len(layout.end) :]
            return self._end_call()
        if self._end and text.startswith(self._end):
            self._end_call()
            return Ended(rest=text[len(self._end) :])
        if layout.has_several:
            head = layout.head.match(text)
            if head is not None and self._calls.has(layout.name_in(head)):
                if (over := self._end_call()) is not None:
                    return over
                self._begin(head)
                return None
            if layout.begun_head.fullmatch(text):
                return None
        if any(mark.startswith(text) for mark in self._marks) or not text:
            return None
        self._end_call()
        return Ended(rest=text, owes_end=bool(self._end))

    def _end_call(self) -> Ended | None:
        if self._is_in_call:
            self._is_in_call = False
            self._calls.end()
        return self._over()

    def _over(self) -> Ended | None:
        return Ended(rest=self._text) if self._calls.is_over else None


class Brackets:
    """Follows JSON through its strings. Its state: how many brackets are open, and any string."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_in_string = False
        self._is_escaped = False

    def follow(
        self, text: str, marks: tuple[str, ...], *, since: int = 0, closed: int = 0
    ) -> tuple[int, bool]:
        """How far `text` is followed, and whether a bracket was closed there.

        That is after the bracket which leaves `closed` of them open, and before what is one of
        `marks`, or may become one, outside of strings.
        """
        for i in range(since, len(text)):
            char = text[i]
            if self._is_in_string:
                self._follow_string(char)
            elif char == '"':
                self._is_in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= closed:
                    return i + 1, True
            elif any(
                text.startswith(mark, i) or may_become(text[i : i + len(mark)], mark)
                for mark in marks
            ):
                return i, False
        return len(text), False

    def _follow_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_in_string = False
