"""One sequence in the engine: a row of the arrays that it is computed in with others."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from trio_worker.engine.guide import Guide
from trio_worker.engine.prefix_cache import TokenArray, as_array
from trio_worker.engine.read_answer import ReadAnswer
from trio_worker.engine.shared_prefixes import Stem
from trio_worker.engine.text import AnswerText
from trio_worker.protocol.turn import FinishReason, Output, RequestId, Sampling, TokenLogprob


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """One sequence from its admission to its end."""

    request_id: RequestId
    tokens: list[int]
    """Prompt, and what was produced before it was admitted."""
    prompt_length: int
    max_tokens: int
    sampling: Sampling
    answer: AnswerText | ReadAnswer
    produced: int
    """Tokens of the answer so far."""
    guide: Guide | None = None
    """What its next token may be; None: any."""
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

    def take(
        self, token: int, end_tokens: Container[int], logprobs: tuple[TokenLogprob, ...]
    ) -> Output:
        """The answer's next token: what may be shown now, and why it ends, if it does."""
        text, finish = self._feed(token, end_tokens)
        if isinstance(self.answer, AnswerText):
            return Output(
                request_id=self.request_id,
                token=token,
                text=text,
                finish=finish,
                logprobs=logprobs,
            )
        aside = self.answer.aside(logprobs)
        if finish is FinishReason.STOP and self.answer.has_called:
            finish = FinishReason.TOOL_CALLS
        return Output(
            request_id=self.request_id,
            token=token,
            text=text,
            finish=finish,
            logprobs=aside.logprobs,
            beside=aside.beside,
            is_reasoning=aside.is_reasoning,
        )

    def _feed(self, token: int, end_tokens: Container[int]) -> tuple[str, FinishReason | None]:
        self.produced += 1
        if token in end_tokens:
            text, finish = "", FinishReason.STOP
        else:
            text, stopped = self.answer.feed(token)
            if stopped:
                return text, FinishReason.STOP
            is_done = self.guide is not None and self.guide.is_done
            if self.produced < self.max_tokens and not is_done:
                return text, None
            finish = FinishReason.STOP if is_done else FinishReason.LENGTH
        rest, stopped = self.answer.finish(is_cut=finish is FinishReason.LENGTH)
        return text + rest, FinishReason.STOP if stopped else finish


def in_groups(rows: Sequence[Row]) -> list[int] | None:
    """The order in which rows with the same stem follow each other; None if they do."""
    first = {stem: i for i, stem in reversed(list(enumerate(row.stem for row in rows)))}
    order = sorted(range(len(rows)), key=lambda i: first[rows[i].stem])
    return None if order == list(range(len(rows))) else order
