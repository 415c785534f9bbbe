"""What a new prompt can begin with: prefixes that are kept, and what running rows begin with.

1. What a prompt leaves for others is copied when another prompt turns out to begin with it, or
   when its row ends, and not from every prompt: a copy takes as much memory again.
2. Where rows can share a stem, whoever begins with a running row's takes the stem itself.
3. Caches that cannot be cut down (a sliding window's) cannot be borrowed from a running row; they
   are kept as soon as a prompt is computed, and serve who begins with all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from trio_worker.engine import stem_lengths
from trio_worker.engine.caches import RowsCache
from trio_worker.engine.decoding import Decoding
from trio_worker.engine.prefix_cache import (
    NEARLY_ALL,
    SHORTEST,
    Found,
    PrefixCache,
    TokenArray,
    as_array,
    common,
)
from trio_worker.engine.prompts import ReadyRows
from trio_worker.engine.row import Row


class Running(Protocol):
    """Rows whose prompts are computed, over caches that they have in common."""

    rows: list[Row]
    caches: list[Any]

    def held(self, index: int) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Lender:
    """A running row, and its place in the caches."""

    row: Row
    index: int
    caches: list[Any]


@dataclass(frozen=True, slots=True)
class Longest:
    """How much of a prompt's beginning there is, in tokens."""

    kept: int
    running: int
    lender: Lender | None
    """Whose beginning the running ones are."""


class Beginnings:
    """Finds what is computed of prompts already, and keeps what may be wanted again.

    Its state is the kept prefixes, of `limit_bytes` at most; 0 keeps nothing and finds nothing.
    """

    def __init__(self, model: Any, limit_bytes: int, *, share: bool) -> None:
        self._model = model
        self._kept = PrefixCache(limit_bytes, share=share) if limit_bytes else None

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes if self._kept else 0

    def clear(self) -> None:
        if self._kept is not None:
            self._kept.clear()

    # --- finding ---------------------------------------------------------------------------

    def longest(self, row: Row, running: Sequence[Running]) -> Longest:
        """How much of the row's prompt is kept, and how much a running row begins with."""
        if self._kept is None:
            return Longest(0, 0, None)
        length, lender = _longest_running(row.prefix, running)
        return Longest(self._kept.longest(row.prefix), length, lender)

    def is_worth_waiting(self, row: Row, longest: Longest, coming: Iterable[Row]) -> bool:
        """Whether one that will be computed in this turn serves the row better."""
        if self._kept is None:
            return False
        enough = max(longest.kept, longest.running) + SHORTEST
        return any(common(other.prefix, row.prefix) >= enough for other in coming)

    def find(self, row: Row, longest: Longest) -> Found:
        """A cache of the row's own that holds the most of its prompt, perhaps nothing."""
        nothing = Found(make_prompt_cache(self._model), 0, None)
        if self._kept is None:
            return nothing
        kept, length, lender = longest.kept, longest.running, longest.lender
        stem = lender.row.stem if lender else None
        if stem is not None and length >= stem.length >= max(kept, length - stem_lengths.STEP):
            return Found(stem.handles(), stem.length, stem)
        if lender and length >= kept + SHORTEST:
            copied = _beginning(lender.caches, lender.index, length)
            self._kept.keep(row.tokens[:length], copied)
        found = self._kept.find(row.prefix) or nothing
        if lender and stem is None and found.stem and found.stem.length <= length:
            for layer in lender.caches:
                layer.adopt(lender.index, found.stem)
            lender.row.stem = found.stem
        return found

    # --- keeping ---------------------------------------------------------------------------

    def keep_prompt(self, row: Row) -> None:
        """Of a row that leaves before it decodes, what was computed of its prompt."""
        if self._kept is None or row.cache is None or not row.done:
            return
        computed = min(row.done, len(row.tokens) - 1)
        self._kept.keep(row.tokens[:computed], _compact(row.cache))

    def keep_computed(self, ready: ReadyRows) -> None:
        """Of rows that nobody can borrow from while they run, what has been computed."""
        if self._kept is None or can_trim_prompt_cache(ready.caches):
            return
        for i, row in enumerate(ready.rows):
            self._kept.keep(row.tokens[:-1], _beginning(ready.caches, i))

    def keep_answer(self, decoding: Decoding, index: int, *, may_return: bool) -> None:
        """Of a row that leaves: prompt and answer, as far as they went through the model."""
        if self._kept is None:
            return
        # What was handed out last has gone through the model for the step in flight.
        tokens, stem = decoding.held(index), decoding.rows[index].stem
        if not may_return and self._kept.adds_little(tokens):
            return
        if stem is not None and stem.length >= NEARLY_ALL * len(tokens):
            # With the rest it would have to be copied, into memory that nobody reserved.
            self._kept.keep(tokens[: stem.length], stem.handles())
        else:
            self._kept.keep(tokens, decoding.extract(index))


def _longest_running(wanted: TokenArray, running: Sequence[Running]) -> tuple[int, Lender | None]:
    """The row with the most of these tokens at its beginning: how many, and where it is."""
    rows = [
        (_shared(rows, i, wanted), Lender(row, i, rows.caches))
        for rows in running
        if can_trim_prompt_cache(rows.caches)
        for i, row in enumerate(rows.rows)
    ]
    return max(rows, key=lambda each: each[0], default=(0, None))


def _shared(rows: Running, index: int, wanted: TokenArray) -> int:
    """How many of a running row's tokens are the first of `wanted`."""
    prefix = rows.rows[index].prefix
    shared = common(prefix, wanted)
    # Only who goes on from its whole prompt makes it worth looking at its answer.
    return shared if shared < len(prefix) else common(as_array(rows.held(index)), wanted)


def _beginning(caches: list[Any], index: int, length: int | None = None) -> list[Any]:
    """A copy of one row's cache, of its first `length` tokens."""
    if all(isinstance(layer, RowsCache) for layer in caches):
        return [layer.beginning(index, length) for layer in caches]
    cache = [layer.extract(index) for layer in caches]
    if length is None or length == cache[0].size():
        return cache
    trim_prompt_cache(cache, cache[0].size() - length)
    # Once more: what was trimmed still takes its memory.
    return _compact(cache)


def _compact(cache: list[Any]) -> list[Any]:
    """A copy without the room for more: a cache grows by hundreds of tokens at a time."""
    return [layer.merge([layer]).extract(0) for layer in cache]
