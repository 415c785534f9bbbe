"""Takes an answer apart as it is written: its content, what is reasoned before, and the calls.

What has been read after any number of characters is a function of these characters and the form:
it does not matter how they were cut.

1. Only what the form asks for is looked for.
2. Reasoning stands at the beginning of an answer or after calls, never amid content: what looks
   like it there is content. White space is left out after its start mark and before its end mark.
3. White space between reasoning, calls and content is left out, too.
4. What looked like a call and is none is content, its marks included (`calls.py`); of a call, no
   mark is ever content.
5. Where the answer is cut off, reasoning and calls stay as far as they came; a call whose name has
   not come is content.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from trio_worker.markup.calls import Calls, Ended, NoCall, Section
from trio_worker.markup.finding import first_of, may_become, overlap, overlap_of
from trio_worker.markup.formats import section_of
from trio_worker.markup.style import Style
from trio_worker.protocol.prompt import CallArguments, Form, Piece, Reasoning


@dataclass(frozen=True, slots=True)
class Reading:
    """What more of an answer came to."""

    contents: tuple[str, ...]
    """Of content, parted where a call has come between."""
    pieces: tuple[Piece, ...]
    is_over: bool
    """The answer is to end here; nothing that follows is read."""

    @property
    def content(self) -> str:
        return "".join(self.contents)


class _At(Enum):
    START = "before any content, or any since the last reasoning or call"
    CONTENT = "in content"
    REASONING = "in reasoning"
    CALLS = "between the marks of calls"


class AnswerReader:
    """Its state: where it is, the text that it has not done with, and the calls so far."""

    def __init__(self, style: Style, form: Form) -> None:
        self._reasoning = style.reasoning if form.finds_reasoning else None
        finds_calls = style.calls is not None and bool(form.tools)
        self._call_style = style.calls if finds_calls else None
        self._pieces: list[Piece] = []
        self._calls: Calls | None = None
        if self._call_style is not None:
            self._calls = Calls(self._call_style, form.tools, form.one_call, self._pieces)
        self._section: Section | None = None
        self._at = _At.START
        if form.starts_in_reasoning and self._reasoning is not None:
            self._at = _At.REASONING
        self._is_fresh = True
        """Nothing has come of this reasoning; or nothing at all of the answer."""
        self._owes_end = False
        self._before_call = ""
        """White space before a call that may be content if that is none."""
        self._call_began_after = 0
        self._text = ""
        self._contents = [""]

    # --- where it is -----------------------------------------------------------------------

    @property
    def is_reasoning(self) -> bool:
        return self._at is _At.REASONING

    @property
    def is_at_start(self) -> bool:
        """Whether content may begin, and none has since the beginning, reasoning or a call."""
        return self._at is _At.START

    @property
    def is_in_content(self) -> bool:
        return self._at is _At.CONTENT

    @property
    def undecided(self) -> int:
        """How many of the last characters may yet turn out to be content."""
        if self._at is _At.REASONING or self.is_over:
            return 0
        if self._section is None:
            return len(self._text)
        assert self._calls is not None
        in_section = self._section.undecided
        if self._calls.begun > self._call_began_after:
            return in_section
        return len(self._before_call) + len(self._calls.style.start) + in_section

    @property
    def holds_back(self) -> bool:
        return self.undecided > 0

    @property
    def has_called(self) -> bool:
        return self._calls is not None and self._calls.begun > 0

    @property
    def is_over(self) -> bool:
        return self._calls is not None and self._calls.is_over

    # --- reading ---------------------------------------------------------------------------

    def feed(self, text: str) -> Reading:
        """What `text`, which follows what was fed before, adds."""
        if not self.is_over:
            self._text += text
            while self._advance():
                pass
        return self._reading()

    def finish(self, *, is_cut: bool = False) -> Reading:
        """What was held back; `is_cut`: the answer was not complete, but may not be longer."""
        if self.is_over:
            return self._reading()
        if self._section is not None:
            self._leave_section(self._section.finish(is_cut=is_cut))
        if self._at is not _At.REASONING:
            self._contents[-1] += self._text
        elif text := self._text.rstrip():
            self._pieces.append(Reasoning(text=text))
        self._text = ""
        return self._reading()

    def _reading(self) -> Reading:
        reading = Reading(tuple(self._contents), joined(self._pieces), self.is_over)
        self._contents = [""]
        self._pieces.clear()
        return reading

    def _advance(self) -> bool:
        """Take some of the text; returns whether there may be more to take."""
        if not self._text or self.is_over:
            return False
        match self._at:
            case _At.START:
                return self._read_start()
            case _At.CONTENT:
                return self._read_content()
            case _At.REASONING:
                return self._read_reasoning()
            case _At.CALLS:
                return self._read_calls()

    def _read_start(self) -> bool:
        """Before content: white space, reasoning or calls."""
        text = self._text.lstrip()
        if not self._is_fresh:
            self._text = text
        marks = [mark.start for mark in (self._reasoning, self._call_style) if mark is not None]
        if self._owes_end and self._call_style is not None:
            marks.append(self._call_style.end)
        found = next((mark for mark in marks if text.startswith(mark)), None)
        if found is None:
            if not text or any(may_become(text, mark) for mark in marks):
                return False
            self._at = _At.CONTENT
            return True
        gap, self._text = self._text[: len(self._text) - len(text)], text[len(found) :]
        if self._reasoning is not None and found == self._reasoning.start:
            self._at, self._is_fresh = _At.REASONING, True
        else:
            self._pass_mark(found, gap)
        return True

    def _read_content(self) -> bool:
        marks = [] if self._call_style is None else [self._call_style.start]
        if self._owes_end and self._call_style is not None:
            marks.append(self._call_style.end)
        found = first_of(self._text, marks)
        if found is None:
            kept = len(self._text) - overlap_of(self._text, marks)
            self._contents[-1] += self._text[:kept]
            self._text = self._text[kept:]
            return False
        at, mark = found
        self._contents[-1] += self._text[:at]
        self._text = self._text[at + len(mark) :]
        self._pass_mark(mark, "")
        return True

    def _pass_mark(self, mark: str, before: str) -> None:
        """A mark of calls: a section begins, or the end of one that was left has come after all."""
        assert self._calls is not None
        if mark != self._calls.style.start:
            self._owes_end = False
            return
        self._at, self._section, self._owes_end = _At.CALLS, section_of(self._calls), False
        self._before_call, self._call_began_after = before, self._calls.begun

    def _read_reasoning(self) -> bool:
        assert self._reasoning is not None
        if self._is_fresh:
            self._text = self._text.lstrip()
            self._is_fresh = not self._text
        end = self._reasoning.end
        at = self._text.find(end)
        kept = at if at >= 0 else len(self._text) - overlap(self._text, end)
        shown = self._text[:kept].rstrip()
        if shown:
            self._pieces.append(Reasoning(text=shown))
        if at < 0:
            self._text = self._text[len(shown) :]
            return False
        self._at, self._is_fresh, self._text = _At.START, False, self._text[at + len(end) :]
        return True

    def _read_calls(self) -> bool:
        assert self._section is not None
        text, self._text = self._text, ""
        outcome = self._section.feed(text)
        if outcome is None:
            return False
        self._leave_section(outcome)
        return True

    def _leave_section(self, outcome: Ended | NoCall) -> None:
        assert self._calls is not None
        if isinstance(outcome, NoCall):
            self._at = _At.CONTENT
            self._contents[-1] += self._before_call + self._calls.style.start + outcome.text
        else:
            self._at, self._is_fresh, self._owes_end = _At.START, False, outcome.owes_end
            self._contents.append("")
        self._section, self._text = None, outcome.rest


def joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """The same with neighbours that go on with each other in one."""
    whole: list[Piece] = []
    for piece in pieces:
        match whole[-1] if whole else None, piece:
            case Reasoning(text=before), Reasoning(text=more):
                whole[-1] = Reasoning(text=before + more)
            case CallArguments(index=one, text=before), CallArguments(index=other, text=more) if (
                one == other
            ):
                whole[-1] = CallArguments(index=one, text=before + more)
            case _:
                whole.append(piece)
    return tuple(whole)
