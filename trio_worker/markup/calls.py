"""The calls of one answer, and what reads one section of them between its marks.

A section is fed what follows its start mark and says what has become of it:

1. While nothing of it is handed out it may turn out to be no call; then all of it is text.
2. What has been handed out stays. A call that breaks off, or goes on like no call, stays as far as
   it came, and what follows is text.
3. Only a call of one of the form's tools is one.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from trio_worker.markup.finding import overlap
from trio_worker.markup.style import CallStyle
from trio_worker.markup.tools import json_text, tool_objects
from trio_worker.protocol.prompt import CallArguments, CallBegun, Piece, Tool

MOST_TO_PARSE = 2**16
"""Characters of what is handled whole."""
MOST_TO_SEARCH = 2**20
"""Characters that a parser may look through, which may be all that follow each opening."""
_OPENINGS = {
    "function_gemma": re.compile("call:"),
    "gemma4": re.compile("call:"),
    "kimi_k3": re.compile(re.escape("<|open|>")),
    "muse_spark": re.compile("<atem:"),
    "pythonic": re.compile(r"\[[\w.]{1,128}\("),
}
"""Where mlx-lm's parsers begin to look for a call, or a part of one."""
ID_LENGTH_MAX = 64

_At = TypeVar("_At")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A section is over."""

    rest: str
    """What follows it."""
    owes_end: bool = False
    """It was left before its end mark, which may yet come and is not to be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCall:
    """What looked like a call is text: all of `text`, and `rest`, in which there may be calls."""

    text: str
    rest: str = ""


class Section(Protocol):
    """Reads what stands between a format's marks."""

    @property
    def undecided(self) -> int:
        """How many characters it has taken that may still turn out to be text."""

    def feed(self, text: str) -> Ended | NoCall | None:
        """None: it goes on. Pieces are left in the `Calls` that it was made with."""

    def finish(self, *, is_cut: bool) -> Ended | NoCall:
        """Nothing follows; `is_cut`: because the answer may not be longer."""


class SteppedSection(ABC, Generic[_At]):
    """A section that is read by steps. Its state: where it is, and the text not done with."""

    def __init__(self, begins_at: _At) -> None:
        self._at = begins_at
        self._text = ""

    def feed(self, text: str) -> Ended | NoCall | None:
        """See `Section`."""
        self._text += text
        while True:
            before = self._at, len(self._text)
            outcome = self._step()
            if outcome is not None or before == (self._at, len(self._text)):
                return outcome

    @abstractmethod
    def _step(self) -> Ended | NoCall | None:
        """Take some of the text, or go elsewhere; None, and neither of these: it wants more."""


@dataclass(slots=True, eq=False)
class Calls:
    """The calls of one answer: how many were begun and ended. They are handed out in `pieces`."""

    style: CallStyle
    tools: Sequence[Tool]
    only_one: bool
    pieces: list[Piece]
    begun: int = 0
    ended: int = 0
    _objects: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._objects = tool_objects(self.tools)

    @property
    def is_over(self) -> bool:
        """Whether there are to be no more."""
        return self.only_one and self.ended > 0

    def has(self, name: str) -> bool:
        return any(tool.name == name for tool in self.tools)

    def begin(self, name: str, id_: str | None = None) -> None:
        self.pieces.append(CallBegun(index=self.begun, name=name, id=id_))
        self.begun += 1

    def argue(self, text: str) -> None:
        """More of the arguments of the call that was begun last."""
        if text:
            self.pieces.append(CallArguments(index=self.begun - 1, text=text))

    def end(self) -> None:
        self.ended += 1

    def parse(self, text: str) -> list[dict[str, Any]]:
        """What the family's parser finds in `text`; nothing if it finds no calls, or odd ones."""
        try:
            found = self.style.parse(text, self._objects)
        except Exception:  # noqa: BLE001 - parsers are not made for what models write by mistake
            return []
        found = found if isinstance(found, list) else [found]
        return found if all(isinstance(each, dict) for each in found) else []

    def take_whole(self, text: str) -> bool:
        """Hand out the calls that `text` is, unless it is none; returns whether it was."""
        if self._takes_long(text):
            return False
        ready = [_ready(each) for each in self.parse(text)]
        calls = [each for each in ready if each is not None and self.has(each[0])]
        if not calls or len(calls) < len(ready):
            return False
        for name, arguments, id_ in calls[: 1 if self.only_one else None]:
            self.begin(name, id_)
            self.argue(arguments)
            self.end()
        return True

    def _takes_long(self, text: str) -> bool:
        """Whether the parser could hold up all other answers: nothing can interrupt it."""
        opening = _OPENINGS.get(self.style.format)
        times = len(opening.findall(text)) if opening is not None else 1
        return len(text) > MOST_TO_PARSE or times * len(text) > MOST_TO_SEARCH


def _ready(call: dict[str, Any]) -> tuple[str, str, str | None] | None:
    """A parsed call's name, arguments as JSON, and id; None if it is none."""
    name, arguments = call.get("name"), call.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        arguments = {} if arguments is None else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return name, json_text(arguments), known_id(call.get("id"))
    except (ValueError, TypeError, RecursionError):
        return None


def known_id(given: object) -> str | None:
    """A model's own id of a call, if it can be one."""
    if not isinstance(given, str) or not 0 < len(given) <= ID_LENGTH_MAX:
        return None
    return given if given.isascii() and given.isprintable() else None


class WholeSection:
    """A section that is read when its end mark has come."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = ""

    @property
    def undecided(self) -> int:
        return len(self._text)

    def feed(self, text: str) -> Ended | NoCall | None:
        end = self._calls.style.end
        # A mark may have begun before; what was searched then is not searched again.
        searched = max(0, len(self._text) - len(end) + 1)
        self._text += text
        at = self._text.find(end, searched)
        if 0 <= at <= MOST_TO_PARSE:
            return taken_whole(self._calls, self._text[:at], self._text[at:], end)
        if len(self._text) >= MOST_TO_PARSE + len(end):
            return NoCall(text=self._text[:MOST_TO_PARSE], rest=self._text[MOST_TO_PARSE:])
        return None

    def finish(self, *, is_cut: bool) -> Ended | NoCall:
        return finished_whole(self._calls, self._text, is_cut=is_cut)


def taken_whole(calls: Calls, text: str, rest: str, end: str) -> Ended | NoCall:
    """What has become of a section that ends with `end`, with which `rest` begins."""
    if calls.take_whole(text):
        return Ended(rest=rest[len(end) :])
    return NoCall(text=text + end, rest=rest[len(end) :])


def finished_whole(calls: Calls, text: str, *, is_cut: bool) -> Ended | NoCall:
    """What has become of a section that was never ended: an end token may stand for its mark."""
    if not is_cut:
        kept = len(text) - overlap(text, calls.style.end)
        if calls.take_whole(text[:kept]):
            return Ended(rest="")
    return NoCall(text=text)
