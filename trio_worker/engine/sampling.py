"""Chooses the next token of every row of a batch in one go, each row by its own parameters.

A row's token is a function of its logits, its parameters, and (seed, position), where position is
the token's index in prompt and answer: the same alone, in any batch, and after a crash.
Nothing is computed for a row that did not ask for it, and what each row needs is worked out only
when the batch's membership changes.

Order: logit bias, penalties, masks, temperature, then the filters top_k, top_p, min_p. The
repetition penalty looks at the whole of prompt and answer, the presence and frequency penalties at
the answer, as OpenAI's do. Log-probabilities are the model's own, before any of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from trio_worker.engine.logprobs import Logprobs, Place
from trio_worker.protocol.turn import Sampling

GREEDY_BELOW = 1e-5
"""A lower temperature leaves only the likeliest token, and would overflow."""

HEAD = 4096
"""The filters look at this many of the likeliest tokens of a row: a sort of the whole vocabulary
costs ten times as much on a CPU. The same for every row, since the noise of a row depends on it."""

Words: TypeAlias = npt.NDArray[np.uint64]
_U = np.uint64
_STEP, _FIRST, _SECOND = map(_U, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of splitmix64."""


class Masks(NamedTuple):
    """What some rows may draw; the others may draw anything."""

    rows: list[int]
    allowed: npt.NDArray[np.bool_]
    """One line for each of these, in which a token is allowed at least."""


class Sampled(Protocol):
    """What a plan must know of a row."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def prompt_length(self) -> int: ...


class Plan:
    """How to choose the tokens of one membership of the batch.

    Its only changing state is `_counts` and `_seen`: how often each penalised row has had each
    token, in its answer and at all.
    """

    def __init__(
        self, rows: Sequence[Sampled], tokens: Sequence[list[int]], vocabulary: int
    ) -> None:
        self._rows = rows
        asked = [row.sampling for row in rows]
        drawn = [s.temperature >= GREEDY_BELOW for s in asked]
        filtered = [s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in asked]
        everyone = range(len(rows))
        self._greedy = [i for i in everyone if not drawn[i]]
        self._free = [i for i in everyone if drawn[i] and not filtered[i]]
        self._filtered = [i for i in everyone if drawn[i] and filtered[i]]
        self._biased = [i for i in everyone if asked[i].logit_bias]
        self._penalised = [i for i in everyone if _is_penalised(asked[i])]
        self._asked = [i for i in everyone if asked[i].logprobs]
        self._top = max((asked[i].top_logprobs for i in self._asked), default=0)
        self._plain = len(self._greedy) == len(rows) and not self._biased and not self._penalised

        order = [*self._greedy, *self._free, *self._filtered]
        self._inverse = mx.array([order.index(i) for i in everyone])
        self._head = min(HEAD, vocabulary)
        self._free_heat = _column(asked, self._free, "temperature")
        self._filtered_heat = _column(asked, self._filtered, "temperature")
        self._mixed_seeds = _mix(np.array([each.seed for each in asked], dtype=_U))
        self._plan_filters([asked[i] for i in self._filtered])

        bias = [(i, token, value) for i in self._biased for token, value in asked[i].logit_bias]
        self._bias_rows = mx.array([i for i, _, _ in bias])
        self._bias_tokens = mx.array([token for _, token, _ in bias])
        self._bias_values = mx.array([value for _, _, value in bias])

        self._penalised_places = mx.arange(len(self._penalised))
        self._repetition = _column(asked, self._penalised, "repetition_penalty")
        self._presence = _column(asked, self._penalised, "presence_penalty")
        self._frequency = _column(asked, self._penalised, "frequency_penalty")
        self._counts, self._seen = self._count(tokens, vocabulary)

    def _plan_filters(self, asked: list[Sampling]) -> None:
        """What stays the same from step to step; None for a filter that no row has asked for."""
        rank, everyone = mx.arange(self._head)[None], range(len(asked))
        self._within_top_k: mx.array | None = None
        self._top_p: tuple[mx.array, mx.array] | None = None
        """What comes before a token is less than the first, or the second says that it stays."""
        self._least: mx.array | None = None
        if any(each.top_k > 0 for each in asked):
            top_k = _column(asked, everyone, "top_k")
            self._within_top_k = (top_k == 0) | (rank < top_k)
        if any(each.top_p < 1 for each in asked):
            top_p = _column(asked, everyone, "top_p")
            # The likeliest token always stays, whatever rounding does to the first sum.
            self._top_p = top_p, (top_p >= 1) | (rank == 0)
        if any(each.min_p > 0 for each in asked):
            self._least = mx.log(_column(asked, everyone, "min_p"))

    def draw(
        self,
        logits: mx.array,
        inputs: mx.array,
        tokens: Sequence[list[int]],
        masks: Masks | None = None,
    ) -> tuple[mx.array, list[Place | None]]:
        """The next token of every row, and its place in the log-probabilities if it has asked.

        `tokens` are those before `inputs`, the ones that went in to give `logits`.
        """
        # Before anything is written into the logits: they may share their memory.
        normal = _normal(self._of(logits, self._asked)) if self._asked else None
        if not self._plain:
            logits = logits.astype(mx.float32)
        if self._biased:
            logits = logits.at[self._bias_rows, self._bias_tokens].add(self._bias_values)
        if self._penalised:
            logits = self._penalise(logits, inputs, tokens)
        if masks is not None:
            logits = self._mask(logits, masks)
        chosen = self._choose(logits, tokens)
        places: list[Place | None] = [None] * len(self._rows)
        if normal is not None:
            logprobs = self._logprobs(normal, chosen)
            for place, index in enumerate(self._asked):
                places[index] = (logprobs, place)
        return chosen, places

    def _count(self, tokens: Sequence[list[int]], vocabulary: int) -> tuple[mx.array, mx.array]:
        counts = np.zeros((len(self._penalised), vocabulary), dtype=np.float32)
        seen = np.zeros_like(counts)
        for place, index in enumerate(self._penalised):
            before, start = tokens[index], self._rows[index].prompt_length
            counts[place] = np.bincount(
                np.array(before[start:], dtype=np.int64), minlength=vocabulary
            )
            seen[place] = np.bincount(np.array(before, dtype=np.int64), minlength=vocabulary)
        return mx.array(counts), mx.array(seen)

    def _penalise(
        self, logits: mx.array, inputs: mx.array, tokens: Sequence[list[int]]
    ) -> mx.array:
        # A row's first input is the end of its prompt, which is no part of the answer.
        in_answer = [len(tokens[i]) >= self._rows[i].prompt_length for i in self._penalised]
        answered = 1.0 if all(in_answer) else mx.array(in_answer, dtype=mx.float32)
        places, put_in = self._penalised_places, self._of(inputs, self._penalised)
        self._counts = self._counts.at[places, put_in].add(answered)
        self._seen = self._seen.at[places, put_in].add(1.0)
        own = self._of(logits, self._penalised)
        own = mx.where(
            self._seen > 0,
            mx.where(own < 0, own * self._repetition, own / self._repetition),
            own,
        )
        own = own - self._frequency * self._counts - self._presence * (self._counts > 0)
        return self._with(logits, self._penalised, own)

    def _mask(self, logits: mx.array, masks: Masks) -> mx.array:
        own = self._of(logits, masks.rows)
        own = mx.where(mx.array(masks.allowed), own, -mx.inf)
        return self._with(logits, masks.rows, own)

    def _choose(self, logits: mx.array, tokens: Sequence[list[int]]) -> mx.array:
        if not self._free and not self._filtered:
            return mx.argmax(logits, axis=-1)
        parts = []
        if self._greedy:
            parts.append(mx.argmax(self._of(logits, self._greedy), axis=-1))
        if self._free:
            heated = self._of(logits, self._free) / self._free_heat
            parts.append(_categorical(self._keys(self._free, tokens), heated))
        if self._filtered:
            keys = self._keys(self._filtered, tokens)
            parts.append(self._choose_filtered(self._of(logits, self._filtered), keys))
        chosen = mx.concatenate([part.astype(mx.uint32) for part in parts])
        return chosen if len(parts) == 1 else chosen[self._inverse]

    def _choose_filtered(self, logits: mx.array, keys: mx.array) -> mx.array:
        if self._head < logits.shape[-1]:
            head = mx.argpartition(-logits, self._head - 1)[:, : self._head]
            values = mx.take_along_axis(logits, head, axis=-1)
            order = mx.argsort(-values)
            head = mx.take_along_axis(head, order, axis=-1)
        else:
            head = mx.argsort(-logits)
        values = mx.take_along_axis(logits, head, axis=-1)
        values = (values - values[:, :1]) / self._filtered_heat
        likely = values
        if self._within_top_k is not None:
            likely = mx.where(self._within_top_k, likely, -mx.inf)
        offered = likely
        if self._top_p is not None:
            top_p, stays = self._top_p
            probabilities = mx.softmax(likely, axis=-1)
            before = mx.cumsum(probabilities, axis=-1) - probabilities
            offered = mx.where((before < top_p) | stays, offered, -mx.inf)
        if self._least is not None:
            offered = mx.where(values >= self._least, offered, -mx.inf)
        place = _categorical(keys, offered)
        return mx.take_along_axis(head, place[:, None], axis=-1)[:, 0]

    def _keys(self, indices: list[int], tokens: Sequence[list[int]]) -> mx.array:
        """What is being drawn comes after the inputs, which come after `tokens`."""
        return _keys(self._mixed_seeds[indices], [len(tokens[i]) + 1 for i in indices])

    def _of(self, array: mx.array, indices: list[int]) -> mx.array:
        """Some rows of an array; the array itself if these are all."""
        return array if len(indices) == len(self._rows) else array[mx.array(indices)]

    def _with(self, array: mx.array, indices: list[int], own: mx.array) -> mx.array:
        """The array with some of its rows replaced by `own`."""
        if len(indices) == len(self._rows):
            return own
        array[mx.array(indices)] = own
        return array

    def _logprobs(self, normal: mx.array, chosen: mx.array) -> Logprobs:
        own = self._of(chosen, self._asked)[:, None]
        of_chosen = mx.take_along_axis(normal, own, axis=-1)[:, 0]
        if not self._top:
            return Logprobs(of_chosen, None, None)
        top = min(self._top, normal.shape[-1])
        likeliest = mx.argpartition(-normal, top - 1)[:, :top]
        values = mx.take_along_axis(normal, likeliest, axis=-1)
        order = mx.argsort(-values)
        return Logprobs(
            of_chosen,
            mx.take_along_axis(likeliest, order, axis=-1),
            mx.take_along_axis(values, order, axis=-1),
        )


def _draw_one(key: mx.array, logits: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)


def _normal(logits: mx.array) -> mx.array:
    """Log-probabilities, in single precision."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# Also for a row alone: the call without vmap draws other tokens.
_categorical = mx.vmap(_draw_one)


def _is_penalised(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


def _column(asked: list[Sampling], indices: Iterable[int], name: str) -> mx.array:
    """One parameter of some rows, to be combined with a row of numbers each."""
    values = [getattr(asked[i], name) for i in indices]
    return mx.array(values, dtype=mx.float32)[:, None]


def _keys(mixed_seeds: Words, positions: list[int]) -> mx.array:
    """A random key for the token of each row: both numbers mixed well, so no two streams meet."""
    mixed = _mix(mixed_seeds + np.array(positions, dtype=_U))
    return mx.array(np.stack((mixed >> _U(32), mixed), axis=-1).astype(np.uint32))


def _mix(value: Words) -> Words:
    """A step of splitmix64, for all rows at once; what does not fit into 64 bits falls away."""
    value = value + _STEP
    value = (value ^ (value >> _U(30))) * _FIRST
    value = (value ^ (value >> _U(27))) * _SECOND
    return value ^ (value >> _U(31))
