"""Calls whose arguments are written one by one between marks, as in XML.

Each argument is handed out when its end mark has come, as the family's parser reads it: that makes
numbers and objects of the texts by the tool's schema. A text that it cannot make into what the
schema says is handed out as a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from trio_worker.markup.calls import (
    MOST_TO_PARSE,
    Calls,
    Ended,
    NoCall,
    SteppedSection,
    finished_whole,
    taken_whole,
)
from trio_worker.markup.finding import first_of, overlap_of
from trio_worker.markup.tools import json_text


@dataclass(frozen=True, slots=True, kw_only=True)
class XmlLayout:
    """Where a call and its arguments begin and end."""

    head: re.Pattern[str]
    """All of a call up to its arguments: a `name`."""
    begun_head: re.Pattern[str]
    argument: tuple[str, str]
    """The marks before and after an argument."""
    key: re.Pattern[str]
    """The beginning of an argument, with its `key`; what follows is its value."""
    end: str = ""
    """The mark of one call's end, where it is not that of the section."""
    has_several: bool = False
    whole: Callable[[str, str], str]
    """From a name and an argument with its marks to a call of just that."""
    has_other_forms: bool = False
    """The family's parser knows other ways to write a call, which come whole."""


class _At(Enum):
    HEAD = "before or within the first head"
    WHOLE = "in what is no such call, but may be another that the family's parser knows"
    BODY = "between arguments"
    ARGUMENT = "in an argument"
    BETWEEN = "after a call"


class XmlSection(SteppedSection[_At]):
    """Its state: where it is, the text that it has not done with, and the call that it is in."""

    def __init__(self, layout: XmlLayout, calls: Calls) -> None:
        super().__init__(_At.HEAD)
        self._layout = layout
        self._calls = calls
        self._end = calls.style.end
        self._searched = 0
        self._name = ""
        self._arguments = 0

    @property
    def undecided(self) -> int:
        return 0 if self._at in (_At.BODY, _At.ARGUMENT) else len(self._text)

    def finish(self, *, is_cut: bool) -> Ended | NoCall:
        if self._at in (_At.HEAD, _At.WHOLE):
            return finished_whole(self._calls, self._text, is_cut=is_cut)
        if self._at is _At.BETWEEN:
            is_mark = self._end.startswith(self._text)
            return Ended(rest="" if is_mark else self._text)
        if not is_cut:
            self._end_call()
        return Ended(rest="")

    def _step(self) -> Ended | NoCall | None:
        match self._at:
            case _At.HEAD:
                return self._read_head()
            case _At.WHOLE:
                return self._read_whole()
            case _At.BODY:
                return self._read_body()
            case _At.ARGUMENT:
                return self._read_argument()
            case _At.BETWEEN:
                return self._read_between()

    def _read_head(self) -> NoCall | None:
        text = self._text
        if (head := self._layout.head.match(text)) is not None:
            if not self._calls.has(head["name"]):
                return NoCall(text=text[: head.end()], rest=text[head.end() :])
            self._begin(head)
        elif not self._layout.begun_head.fullmatch(text):
            if not self._layout.has_other_forms:
                return NoCall(text="", rest=text)
            self._at = _At.WHOLE
        return None

    def _begin(self, head: re.Match[str]) -> None:
        self._name, self._arguments = head["name"], 0
        self._calls.begin(self._name)
        self._at, self._text = _At.BODY, self._text[head.end() :]

    def _read_whole(self) -> Ended | NoCall | None:
        at = self._text.find(self._end, self._searched)
        if 0 <= at <= MOST_TO_PARSE:
            return taken_whole(self._calls, self._text[:at], self._text[at:], self._end)
        if len(self._text) >= MOST_TO_PARSE + len(self._end):
            return NoCall(text=self._text[:MOST_TO_PARSE], rest=self._text[MOST_TO_PARSE:])
        self._searched = max(0, len(self._text) - len(self._end) + 1)
        return None

    def _read_body(self) -> Ended | None:
        """What stands between arguments and is no mark belongs to nothing, and is left out."""
        start = self._layout.argument[0]
        marks = [mark for mark in (start, self._layout.end, self._end) if mark]
        found = first_of(self._text, marks)
        if found is None:
            self._text = self._text[len(self._text) - overlap_of(self._text, marks) :]
            return None
        at, mark = found
        if mark == start:
            self._at, self._text, self._searched = _At.ARGUMENT, self._text[at:], len(start)
            return None
        self._text = self._text[at + len(mark) :]
        return self._end_call(ends_section=mark == self._end)

    def _read_argument(self) -> Ended | None:
        marks = [self._layout.argument[1], self._end]
        found = first_of(self._text, marks, self._searched)
        if found is None:
            longest = max(len(mark) for mark in marks)
            self._searched = max(self._searched, len(self._text) - longest + 1)
            return None
        at, mark = found
        if mark == self._end:
            # It has no end of its own, and the family's parser does not see it either.
            self._text = self._text[at + len(mark) :]
            return self._end_call(ends_section=True)
        self._argue(self._text[: at + len(mark)])
        self._at, self._text = _At.BODY, self._text[at + len(mark) :]
        return None

    def _argue(self, argument: str) -> None:
        start, end = self._layout.argument
        parsed = self._calls.parse(self._layout.whole(self._name, argument))
        arguments = parsed[0].get("arguments") if parsed else None
        try:
            written = json_text(arguments) if isinstance(arguments, dict) and arguments else ""
        except (ValueError, TypeError, RecursionError):
            written = ""
        if not written:
            inner = argument[len(start) : len(argument) - len(end)]
            if (key := self._layout.key.match(inner)) is None:
                return
            written = json_text({key["key"]: inner[key.end() :].strip()})
        self._calls.argue((", " if self._arguments else "{") + written[1:-1])
        self._arguments += 1

    def _end_call(self, *, ends_section: bool = True) -> Ended | None:
        self._calls.argue("}" if self._arguments else "{}")
        self._calls.end()
        self._at = _At.BETWEEN
        return Ended(rest=self._text) if ends_section or self._calls.is_over else None

    def _read_between(self) -> Ended | None:
        """After a call's own end mark: the section's, or another call."""
        layout, text = self._layout, self._text.lstrip()
        self._text = text
        if text.startswith(self._end):
            return Ended(rest=text[len(self._end) :])
        if layout.has_several:
            head = layout.head.match(text)
            if head is not None and self._calls.has(head["name"]):
                self._begin(head)
                return None
            if layout.begun_head.fullmatch(text):
                return None
        if self._end.startswith(text):
            return None
        return Ended(rest=text, owes_end=True)
