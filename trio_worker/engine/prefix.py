"""Keeps the attention caches of computed prefixes, so that the next prompt need not start over.

Bounded in bytes, the least recently used goes first. mlx-lm's `LRUPromptCache` is not used: its
search copies token lists quadratically in their length, on the thread that decodes (two seconds
among twenty prompts of 8,000 tokens, here a millisecond), and it keeps a prompt beside a longer
one that contains it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

SHORTEST = 16
"""Fewer tokens than this are computed as fast as they are copied."""


@dataclass(slots=True, eq=False)
class _Entry:
    tokens: npt.NDArray[np.int64]
    cache: list[Any]
    size: int


class PrefixCache:
    """Caches by their tokens, least recently used first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._entries: list[_Entry] = []
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def find(self, tokens: list[int]) -> tuple[list[Any], int] | None:
        """A cache of one's own that holds the first so many of `tokens`, or None."""
        wanted = np.array(tokens, dtype=np.int64)
        best, length = None, SHORTEST - 1
        for entry in self._entries:
            common = _common(entry.tokens, wanted)
            whole = common == len(entry.tokens)
            if common > length and (whole or can_trim_prompt_cache(entry.cache)):
                best, length = entry, common
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        cache = copy.deepcopy(best.cache)
        if length < len(best.tokens):
            trim_prompt_cache(cache, len(best.tokens) - length)
        return cache, length

    def keep(self, tokens: list[int], cache: list[Any]) -> None:
        """Take over `cache`, which holds exactly `tokens`."""
        held = np.array(tokens, dtype=np.int64)
        size = sum(layer.nbytes for layer in cache)
        if len(held) < SHORTEST or size > self._limit:
            return
        trimmable = can_trim_prompt_cache(cache)
        for entry in list(self._entries):
            common = _common(entry.tokens, held)
            if trimmable and common == len(held):
                return
            # The longer one can be cut down to it.
            if (trimmable and common == len(entry.tokens)) or common == len(held) == len(
                entry.tokens
            ):
                self._drop(entry)
        mx.eval([layer.state for layer in cache])
        self._entries.append(_Entry(held, cache, size))
        self._bytes += size
        while self._bytes > self._limit:
            self._drop(self._entries[0])

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._bytes -= entry.size


def _common(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
