"""What the next token of a row may be: as its grammar has it, and as its reasoning must end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trio_worker.grammar import NOT_BY_BYTES, GrammarRefused
from trio_worker.grammar.budget import ReasoningBudget
from trio_worker.grammar.composed import Marks
from trio_worker.grammar.matching import (
    BROKEN,
    Grammars,
    Matcher,
    allows,
    only,
    unpacked,
    unset_bits,
)
from trio_worker.protocol.prompt import Form

Allowed: TypeAlias = npt.NDArray[np.bool_]
"""For some rows, whether each token may be drawn: at least one of a row."""


class GrammarBroken(Exception):
    """An answer cannot be kept to its grammar any longer."""


class Guide:
    """Of one row. Its state is where the tokens that it has consumed have brought it."""

    def __init__(self, matcher: Matcher | None, budget: ReasoningBudget | None) -> None:
        self._matcher = matcher
        self._budget = budget

    def consume(self, token: int) -> None:
        if self._matcher is not None:
            self._matcher.consume(token)
        if self._budget is not None:
            self._budget.consume(token)

    @property
    def failure(self) -> GrammarBroken | GrammarRefused | None:
        """Why the row cannot go on; None: it can. It was refused if the grammar is to blame."""
        if self._matcher is None or not self._matcher.error:
            return None
        is_broken = self._matcher.error == BROKEN
        return (GrammarBroken if is_broken else GrammarRefused)(self._matcher.error)

    @property
    def is_done(self) -> bool:
        """The answer is complete as it is."""
        return self._matcher is not None and self._matcher.is_stopped

    @property
    def limits(self) -> bool:
        """Whether there are tokens that may not come next."""
        if self._matcher is not None:
            # Of one that is over or broken nothing is drawn any more.
            return not (self._matcher.is_stopped or self._matcher.error)
        return self._budget is not None and self._budget.forced is not None

    def fill(self, bits: npt.NDArray[np.int32], row: int) -> None:
        """Write what may come next. In error, and otherwise where all may, these are all."""
        if self._matcher is not None:
            self._matcher.fill(bits, row)
        token = self._budget.forced if self._budget is not None else None
        # In the middle of a character a grammar may not let its reasoning end yet.
        if token is not None and allows(bits, row, token):
            only(bits, row, token)


def allowed(guides: Sequence[Guide], size: int) -> Allowed:
    """What may come next in the rows of these, of `size` tokens."""
    bits = unset_bits(len(guides), size)
    for row, guide in enumerate(guides):
        guide.fill(bits, row)
    return unpacked(bits, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guides:
    """What the guides of a model's rows are made of."""

    grammars: Grammars | None
    """None: its tokenizer cannot be had by bytes."""
    marks: Marks | None
    """Of its reasoning."""
    end_mark: tuple[int, ...]
    """The tokens that its end is written with."""
    text_of: Callable[[int], str]

    def open(self, form: Form, produced: Sequence[int]) -> Guide | None:
        """The guide of a row that has these tokens of its answer; None if it is free.

        Raises `GrammarRefused` for a grammar that cannot be had, which whoever tokenised has
        checked, and `GrammarBroken` for tokens that do not keep to it.
        """
        budget = None
        if form.max_reasoning_tokens is not None and self.marks is not None and self.end_mark:
            budget = ReasoningBudget(
                self.marks,
                form.max_reasoning_tokens,
                end_mark=self.end_mark,
                text_of=self.text_of,
                starts_in_reasoning=form.starts_in_reasoning,
            )
            for token in produced:
                budget.consume(token)
        if not form.grammar:
            return None if budget is None else Guide(None, budget)
        if self.grammars is None:
            raise GrammarRefused(NOT_BY_BYTES)
        matcher = self.grammars.matcher(form.grammar, produced)
        if matcher.error:
            raise GrammarBroken(matcher.error)
        return Guide(matcher, budget)
