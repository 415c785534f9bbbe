"""Rows that decode together, and which rows do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, StopSequences

from trio_worker.engine import sampling
from trio_worker.engine.caches import share_positions
from trio_worker.engine.sampling import Logprobs, Plan
from trio_worker.engine.shared_prefixes import Stem
from trio_worker.protocol.turn import RequestId


class HasStem(Protocol):
    """Whatever may begin with one."""

    stem: Stem | None


class Row(sampling.Row, HasStem, Protocol):
    """What decoding must know of a sequence."""

    request_id: RequestId
    tokens: list[int]


class Rows(Protocol):
    """Rows that have their caches in common."""

    @property
    def lengths(self) -> list[int]: ...

    def extend(self, other: Any) -> None: ...


_Rows = TypeVar("_Rows", bound=Rows)


class Decoding(GenerationBatch):  # type: ignore[misc]
    """mlx-lm's decoding batch, with every row's token drawn in one go.

    Its `uids` are request ids and its `samplers` the sequences themselves: the parent class
    carries both along when rows come and go. `_next_logprobs` holds each row's place in
    `Logprobs`, or None.
    """

    _plan: Plan | None = None
    _next_tokens: Any
    _next_logprobs: list[tuple[Logprobs, int] | None]

    def extend(self, batch: Decoding) -> None:
        super().extend(batch)
        self._plan = None
        if (order := in_groups(self.samplers)) is not None:
            self.filter(order)

    def filter(self, keep: list[int]) -> None:
        super().filter(keep)
        self._plan = None

    @classmethod
    def start(cls, model: Any, rows: Sequence[Row], caches: list[Any]) -> Decoding:
        """Rows whose prompts are computed but for the last token, which their first step takes.

        Takes their caches, which are merged already.
        """
        decoding = cls(
            model,
            uids=[row.request_id for row in rows],
            inputs=mx.array([row.tokens[-1] for row in rows], dtype=mx.uint32),
            prompt_cache=caches,
            tokens=[row.tokens[:-1] for row in rows],
            samplers=list(rows),
            fallback_sampler=None,
            logits_processors=[() for _ in rows],
            stop_sequences=[StopSequences() for _ in rows],
            max_tokens=[0 for _ in rows],
        )
        decoding._next_logprobs = [None for _ in rows]
        return decoding

    @property
    def lengths(self) -> list[int]:
        """Of each row, in tokens after its stem, before any padding."""
        return [
            own_length(row, len(tokens))
            for row, tokens in zip(self.samplers, self.tokens, strict=True)
        ]

    def step(self) -> tuple[list[int], list[tuple[Logprobs, int] | None]]:
        """Take the tokens of the step in flight, and start the next one.

        Rows that have just started have none in flight: theirs are the last of their prompts.
        """
        inputs, places = self._next_tokens, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, places
        share_positions(self.prompt_cache)
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        if self._plan is None:
            self._plan = Plan(self.samplers, self.tokens, logits.shape[-1])
        self._next_tokens, self._next_logprobs = self._plan.draw(logits, inputs, self.tokens)
        mx.async_eval(  # type: ignore[no-untyped-call]
            self._next_tokens, _arrays(self._next_logprobs)
        )

        mx.eval(inputs, _arrays(places))
        tokens: list[int] = inputs.tolist()
        for before, token in zip(self.tokens, tokens, strict=True):
            before.append(token)
        return tokens, places

    def _step(self) -> tuple[list[int], list[tuple[Logprobs, int] | None]]:
        """Do nothing when a batch is made: its rows make their first step with all others."""
        return [], []


def merge_alike(items: Iterable[_Rows], padding_max: int) -> list[_Rows]:
    """As few as `padding_max` allows: each costs a reading of the weights at every step.

    Padding the rows of one to its longest takes so many tokens at most. What has been put
    together stays together, since rows grow at the same pace.
    """
    merged: list[_Rows] = []
    for item in sorted(items, key=lambda item: max(item.lengths)):
        if merged and _padding([*merged[-1].lengths, *item.lengths]) <= padding_max:
            merged[-1].extend(item)
        else:
            merged.append(item)
    return merged


def own_length(row: HasStem, length: int) -> int:
    """How much of a row's `length` comes after its stem, in tokens."""
    return length - (row.stem.length if row.stem else 0)


def in_groups(rows: Sequence[HasStem]) -> list[int] | None:
    """The order in which rows with the same stem follow each other; None if they do."""
    first = {stem: i for i, stem in reversed(list(enumerate(row.stem for row in rows)))}
    order = sorted(range(len(rows)), key=lambda i: first[rows[i].stem])
    return None if order == list(range(len(rows))) else order


def _padding(lengths: list[int]) -> int:
    """How many tokens of padding it takes to make all of them as long as the longest."""
    return len(lengths) * max(lengths) - sum(lengths)


def _arrays(places: list[tuple[Logprobs, int] | None]) -> list[mx.array]:
    distinct = {id(place[0]): place[0] for place in places if place is not None}
    return [array for logprobs in distinct.values() for array in logprobs.arrays]
