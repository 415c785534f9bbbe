"""What several rows begin with: held once, and read once for all of them at every step.

Such a beginning, apart from the rows, is called their stem. How long it is: `stem_lengths.py`.
The attention of a row is that to its stem and that to its own tokens, put together by the sums of
their weights (Hydragen, arXiv:2402.05099). Rows that begin with the same system prompt do not copy
it to join a batch; a row with much context does not make the others as long as itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from trio_worker.engine import stem_lengths
from trio_worker.engine.stem_lengths import stem_length

Part: TypeAlias = tuple[mx.array, mx.array]
"""Keys and values of one layer."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Stem:
    """The first `length` tokens of one row or more: keys and values of each layer.

    Shapes (1, heads, length, width). Nothing writes to them.
    """

    layers: tuple[Part, ...]
    length: int

    def handles(self) -> list[Any]:
        """A cache of one's own that holds it; what is written through it goes elsewhere."""
        caches = []
        for keys, values in self.layers:
            cache = KVCache()
            cache.keys, cache.values, cache.offset = keys, values, self.length
            caches.append(cache)
        return caches


class Segment(NamedTuple):
    """Rows of a batch that follow each other and begin with the same stem, or with none."""

    rows: int
    stem: Part | None


def stem_of(cache: Sequence[Any], length: int) -> Stem:
    """The first `length` tokens that a row's cache holds, sharing its memory."""
    layers = tuple((layer.keys[..., :length, :], layer.values[..., :length, :]) for layer in cache)
    mx.eval(layers)
    return Stem(layers, length)


def lengthened(stem: Stem | None, cache: Sequence[Any], done: int) -> Stem | None:
    """What a row whose `cache` holds `done` tokens begins with, if it has begun with `stem`."""
    before = stem.length if stem else 0
    length = stem_lengths.lengthened(before, done)
    return stem if length == before else stem_of(cache, length)


class StemsInUse:
    """The stems in use of one kept prefix, of `size` tokens."""

    def __init__(self, cache: Sequence[Any], size: int) -> None:
        self._cache = cache
        self._size = size
        self._in_use: weakref.WeakValueDictionary[int, Stem] = weakref.WeakValueDictionary()

    def first(self, done: int) -> Stem | None:
        """One that holds at most the first `done` tokens, the same for all who ask for it."""
        length = stem_length(done)
        if not length:
            return None
        stem = self._in_use.get(length)
        if stem is None:
            stem = stem_of(self._cache, length)
            if 2 * length < self._size:
                # Its rows would hold on to the memory of all the rest, when it is kept no more.
                stem = _copied(stem)
            self._in_use[length] = stem
        return stem


def _copied(stem: Stem) -> Stem:
    layers = tuple((mx.contiguous(keys), mx.contiguous(values)) for keys, values in stem.layers)
    mx.eval(layers)
    return Stem(layers, stem.length)
