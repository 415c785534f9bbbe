"""How long an answer may reason: counts its tokens, and says which must come when they are spent.

A function of the tokens, so an answer that is computed again ends its reasoning at the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trio_worker.grammar.composed import Marks


class ReasoningBudget:
    """Of one answer. Its state is what there is of the reasoning, and of a mark, so far."""

    def __init__(
        self,
        marks: Marks,
        most: int,
        *,
        end_mark: Sequence[int],
        text_of: Callable[[int], str],
        starts_in_reasoning: bool,
    ) -> None:
        """`end_mark` are the tokens that the mark is written with where it must come."""
        self._marks = marks
        self._most = most
        self._end_mark = end_mark
        self._text_of = text_of
        self._is_inside = starts_in_reasoning
        self._spent = 0
        self._written = 0
        """Of the end mark's tokens, once they must come."""
        self._latest = ""
        """The end of the text, in which a mark may have begun."""

    @property
    def forced(self) -> int | None:
        """The one token that may come next; None: the reasoning may go on, or there is none."""
        if not self._is_inside or self._spent < self._most:
            return None
        return self._end_mark[self._written]

    def consume(self, token: int) -> None:
        if token == self.forced:
            self._written += 1
        else:
            self._written = 0
            self._spent += self._is_inside
        mark = self._marks.end if self._is_inside else self._marks.start
        text = self._latest + self._text_of(token)
        if mark in text or self._written == len(self._end_mark):
            self._is_inside = not self._is_inside
            self._written, self._latest = 0, text.partition(mark)[2]
        else:
            self._latest = text[-len(mark) :]
