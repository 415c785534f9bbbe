"""Keeps the attention caches of computed prefixes, so that the next prompt need not start over.

Bounded in bytes, the least recently used goes first. mlx-lm's `LRUPromptCache` is not used: its
search copies token lists quadratically in their length, on the thread that decodes (two seconds
among twenty prompts of 8,000 tokens, here a millisecond), and it keeps a prompt beside a longer
one that contains it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from trio_worker.engine.shared_prefixes import Stem, StemsInUse

SHORTEST = 16
"""Fewer tokens than this are computed as fast as they are copied."""

NEARLY_ALL = 7 / 8
"""What shares so much with what is kept, or begins with so much in one piece, is not worth a copy
of its own."""

TokenArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Entry:
    tokens: TokenArray
    cache: list[Any]
    size: int
    stems: StemsInUse = field(init=False)

    def __post_init__(self) -> None:
        self.stems = StemsInUse(self.cache, len(self.tokens))


class Found(NamedTuple):
    """What is computed already of the tokens that were asked for."""

    cache: list[Any]
    """One's own, that holds the first `length` of them."""
    length: int
    stem: Stem | None
    """The same for all who find it, of nearly as many tokens, if that is worth while."""


class PrefixCache:
    """Caches by their tokens, least recently used first."""

    def __init__(self, limit_bytes: int, *, share: bool = False) -> None:
        self._limit = limit_bytes
        self._share = share
        self._entries: list[_Entry] = []
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def longest(self, tokens: TokenArray) -> int:
        """How many of `tokens` the best of the caches would hold."""
        return self._best(tokens)[1]

    def find(self, tokens: TokenArray) -> Found | None:
        """The most that is kept of the first of `tokens`, or None."""
        best, length = self._best(tokens)
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        # New handles on the same memory; what is written through them goes elsewhere.
        cache = copy.deepcopy(best.cache)
        if length < len(best.tokens):
            trim_prompt_cache(cache, len(best.tokens) - length)
        return Found(cache, length, best.stems.first(length) if self._share else None)

    def _best(self, wanted: TokenArray) -> tuple[_Entry | None, int]:
        best, length = None, 0
        # Of those that serve as well as each other always the same one, so that stems are shared.
        for entry in reversed(self._entries):
            alike = common(entry.tokens, wanted)
            whole = alike == len(entry.tokens)
            if alike >= max(length + 1, SHORTEST) and (whole or can_trim_prompt_cache(entry.cache)):
                best, length = entry, alike
        return best, length

    def adds_little(self, tokens: list[int]) -> bool:
        """Whether another is kept that begins with nearly all of these, and then goes on otherwise.

        A copy would take the memory of all of them to save computing the few at the end.
        """
        held = as_array(tokens)
        return any(
            NEARLY_ALL * len(held) <= common(entry.tokens, held) < len(entry.tokens)
            for entry in self._entries
            if can_trim_prompt_cache(entry.cache)
        )

    def keep(self, tokens: list[int], cache: list[Any]) -> None:
        """Take over `cache`, which holds exactly `tokens`."""
        held = as_array(tokens)
        size = sum(layer.nbytes for layer in cache)
        if len(held) < SHORTEST or size > self._limit:
            return
        trimmable = can_trim_prompt_cache(cache)
        for entry in list(self._entries):
            alike = common(entry.tokens, held)
            if trimmable and alike == len(held):
                return
            # The longer one can be cut down to it.
            if (trimmable and alike == len(entry.tokens)) or alike == len(held) == len(
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


def as_array(tokens: list[int]) -> TokenArray:
    return np.array(tokens, dtype=np.int64)


def common(one: TokenArray, other: TokenArray) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
