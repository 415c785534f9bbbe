"""One sequence in the engine: a row of the arrays that it is computed in with others."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from trio_worker.engine.prefix_cache import TokenArray, as_array
from trio_worker.engine.shared_prefixes import Stem
from trio_worker.engine.text import AnswerText
from trio_worker.protocol.turn import FinishReason, RequestId, Sampling


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """One sequence from its admission to its end."""

    request_id: RequestId
    tokens: list[int]
    """Prompt, and what was produced before it was admitted."""
    prompt_length: int
    max_tokens: int
    sampling: Sampling
    answer: AnswerText
    produced: int
    """Tokens of the answer so far."""
    done: int = 0
    """How many of `tokens` are computed, or were found."""
    cached: int = 0
    """How many of them were found."""
    cache: list[Any] | None = None
    """Of the tokens that are done, from the turn it is looked at until it decodes."""
    started: bool = False
    """Whether its first decode step is in flight, or done."""
    stem: Stem | None = None
    """What it begins with, in common with other rows or so that they need not be padded to it."""
    prefix: TokenArray = field(init=False)
    """The tokens that a kept cache may hold: the last has to give the logits that follow it."""

    def __post_init__(self) -> None:
        self.prefix = as_array(self.tokens[:-1])

    @property
    def left(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return len(self.tokens) - self.done

    @property
    def stem_length(self) -> int:
        return self.stem.length if self.stem else 0

    def take(self, token: int, end_tokens: Container[int]) -> tuple[str, FinishReason | None]:
        """The answer's next token: the text that may be shown now, and why it ends, if it does."""
        self.produced += 1
        if token in end_tokens:
            text, finish = "", FinishReason.STOP
        else:
            text, stopped = self.answer.feed(token)
            if stopped:
                return text, FinishReason.STOP
            if self.produced < self.max_tokens:
                return text, None
            finish = FinishReason.LENGTH
        rest, stopped = self.answer.finish()
        return text + rest, FinishReason.STOP if stopped else finish


def in_groups(rows: Sequence[Row]) -> list[int] | None:
    """The order in which rows with the same stem follow each other; None if they do."""
    first = {stem: i for i, stem in reversed(list(enumerate(row.stem for row in rows)))}
    order = sorted(range(len(rows)), key=lambda i: first[rows[i].stem])
    return None if order == list(range(len(rows))) else order
