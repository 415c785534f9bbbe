"""The text of a sequence whose reasoning and calls are taken out of it, token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from trio_worker.engine.text import AnswerText, StopMatcher, Vocabulary
from trio_worker.markup.formats import marks_of
from trio_worker.markup.general import GENERAL_CALLS
from trio_worker.markup.reader import AnswerReader, Reading
from trio_worker.markup.style import Style
from trio_worker.protocol.prompt import Form, Piece
from trio_worker.protocol.turn import TokenLogprob

_Token: TypeAlias = tuple[int, tuple[TokenLogprob, ...]]
"""How many characters one showed, and its log-probability, if that was asked for."""


class Aside(NamedTuple):
    """What a token came to beside text."""

    beside: tuple[Piece, ...]
    is_reasoning: bool
    logprobs: tuple[TokenLogprob, ...]
    """Of the tokens that have turned out to be content."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the answers of a model are read with."""

    vocabulary: Vocabulary
    style: Style

    def open(self, stops: tuple[str, ...], form: Form) -> AnswerText | ReadAnswer:
        """An answer of which no token has come. What asks for nothing is text, and quicker."""
        if not form.finds_reasoning and not form.tools:
            return AnswerText(self.vocabulary, stops)
        style = replace(self.style, calls=GENERAL_CALLS) if form.is_general else self.style
        return ReadAnswer(self.vocabulary, stops, AnswerReader(style, form), marks_of(style))


class ReadAnswer:
    """Its detokeniser, its reader and its stop matcher, in this order.

    And what is between two tokens: what the last came to beside text, and the log-probabilities of
    those that may yet turn out to be content.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: tuple[str, ...],
        reader: AnswerReader,
        marks: tuple[str, ...],
    ) -> None:
        # Marks are special tokens of many models, and show nothing in other answers.
        self._detokeniser = vocabulary.detokeniser(vocabulary.special_in(marks))
        self._reader = reader
        self._matcher = StopMatcher(stops)
        self._beside: tuple[Piece, ...] = ()
        self._is_reasoning = False
        self._waiting: deque[_Token] = deque()
        self._waiting_length = 0
        self._length = 0
        self._shows = False

    @property
    def has_called(self) -> bool:
        return self._reader.has_called

    def recall(self, tokens: Iterable[int]) -> None:
        """Take in what was handed out before."""
        for token in tokens:
            self.feed(token)
            self.aside(())

    def feed(self, token: int) -> tuple[str, bool]:
        """What of the content may be shown, and whether the answer ends here."""
        text = self._detokeniser.feed(token)
        self._length = len(text)
        self._is_reasoning = self._reader.is_reasoning
        return self._take(self._reader.feed(text))

    def finish(self, *, is_cut: bool = False) -> tuple[str, bool]:
        """The end of the content, once no token follows; `is_cut`: for want of tokens."""
        text, stopped = self._take(self._reader.feed(self._detokeniser.flush()))
        if not stopped:
            more, stopped = self._take(self._reader.finish(is_cut=is_cut))
            text += more
        return (text, True) if stopped else (text + self._matcher.flush(), False)

    def aside(self, logprobs: tuple[TokenLogprob, ...]) -> Aside:
        """What the token that was fed last came to beside text, given its log-probability."""
        self._waiting.append((self._length, logprobs))
        self._waiting_length += self._length
        aside = Aside(self._beside, self._is_reasoning, self._decided())
        self._beside, self._length, self._is_reasoning, self._shows = (), 0, False, False
        return aside

    def _take(self, reading: Reading) -> tuple[str, bool]:
        self._beside += reading.pieces
        self._is_reasoning = self._is_reasoning or self._reader.is_reasoning
        shown = ""
        for index, content in enumerate(reading.contents):
            if index:
                # What comes after a call does not go on with what came before it.
                shown += self._matcher.flush()
            text, stopped = self._matcher.feed(content)
            shown, self._shows = shown + text, self._shows or bool(content)
            if stopped:
                return shown, True
        return shown, reading.is_over

    def _decided(self) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of content; those of what is none are forgotten.

        A token is undecided while any of its characters is, and one that shows nothing until the
        next does.
        """
        reader, waiting, decided = self._reader, self._waiting, list[_Token]()
        while waiting and self._waiting_length - waiting[0][0] >= reader.undecided:
            decided.append(waiting.popleft())
            self._waiting_length -= decided[-1][0]
        if reader.is_in_content or self._shows:
            return tuple(each for _, logprobs in decided for each in logprobs)
        if reader.is_at_start:
            while decided and not decided[-1][0]:
                waiting.appendleft(decided.pop())
        return ()
