"""Rows that decode together, and which rows do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, StopSequences

from trio_worker.engine import sampling
from trio_worker.engine.sampling import Logprobs, Plan


class Row(sampling.Row, Protocol):
    """What decoding must know of a sequence."""

    request_id: str
    tokens: list[int]
    cache: list[Any] | None


_Row = TypeVar("_Row", bound=Row)
_T = TypeVar("_T")


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

    def filter(self, keep: list[int]) -> None:
        super().filter(keep)
        self._plan = None

    @classmethod
    def start(cls, model: Any, rows: Sequence[Row]) -> Decoding:
        """Rows whose prompts are computed but for the last token; their first step is started.

        Takes their caches.
        """
        caches = zip(*(row.cache or () for row in rows), strict=True)
        decoding = cls(
            model,
            uids=[row.request_id for row in rows],
            inputs=mx.array([row.tokens[-1] for row in rows], dtype=mx.uint32),
            prompt_cache=[layers[0].merge(list(layers)) for layers in caches],
            tokens=[row.tokens[:-1] for row in rows],
            samplers=list(rows),
            fallback_sampler=None,
            logits_processors=[() for _ in rows],
            stop_sequences=[StopSequences() for _ in rows],
            max_tokens=[0 for _ in rows],
        )
        for row in rows:
            row.cache = None
        return decoding

    @property
    def lengths(self) -> list[int]:
        """Of each row, in tokens, before any padding."""
        return [len(tokens) for tokens in self.tokens]

    def step(self) -> tuple[list[int], list[tuple[Logprobs, int] | None]]:
        """Take the tokens of the step in flight, and start the next one."""
        return self._step()

    def _step(self) -> tuple[list[int], list[tuple[Logprobs, int] | None]]:
        inputs, places = self._next_tokens, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, places
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


def alike(rows: Iterable[_Row], padding_max: int) -> list[list[_Row]]:
    """The rows in sets of similar length: padding one to its longest takes so many tokens at most.

    The rows of a set begin to decode together, so that they share their first step too.
    """
    return _in_sets(rows, lambda row: [len(row.tokens)], padding_max)


def merge_alike(decodings: Iterable[Decoding], padding_max: int) -> list[Decoding]:
    """As few as `padding_max` allows: each costs a reading of the weights at every step.

    What has been put together stays together, since rows grow at the same pace.
    """
    merged = []
    for first, *others in _in_sets(decodings, lambda each: each.lengths, padding_max):
        for other in others:
            first.extend(other)
        merged.append(first)
    return merged


def _in_sets(
    items: Iterable[_T], lengths_of: Callable[[_T], list[int]], padding_max: int
) -> list[list[_T]]:
    """Items that hold rows of some lengths, in sets that need little padding; shortest first."""
    sets: list[tuple[list[_T], list[int]]] = []
    for item in sorted(items, key=lambda item: max(lengths_of(item))):
        lengths = lengths_of(item)
        if sets and _padding([*sets[-1][1], *lengths]) <= padding_max:
            sets[-1][0].append(item)
            sets[-1][1].extend(lengths)
        else:
            sets.append(([item], list(lengths)))
    return [each for each, _ in sets]


def _padding(lengths: list[int]) -> int:
    """How many tokens of padding it takes to make all of them as long as the longest."""
    return len(lengths) * max(lengths) - sum(lengths)


def _arrays(places: list[tuple[Logprobs, int] | None]) -> list[mx.array]:
    distinct = {id(place[0]): place[0] for place in places if place is not None}
    return [array for logprobs in distinct.values() for array in logprobs.arrays]
