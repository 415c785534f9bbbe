"""The order in which waiting requests are served: a bounded sorted set of sequences.

Every operation costs O(log n). Its state is the sorted mapping from key to sequence and the
number of sequences per level.
"""

from __future__ import annotations

import math
from collections import Counter

from sortedcontainers import SortedDict

from trio_worker.core.sequence import QueueKey, Sequence


class RequestQueue:
    """Sequences by key, the earliest first."""

    def __init__(self, *, max_size: int) -> None:
        self.max_size = max_size
        self.promotions = 0
        """How often a request was taken while a more urgent one was waiting: aging at work."""
        self._by_key: SortedDict[QueueKey, Sequence] = SortedDict()
        self._by_level: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, sequence: Sequence) -> bool:
        return self._by_key.get(sequence.key) is sequence

    def add(self, sequence: Sequence) -> None:
        """Room is the caller's promise: a place was taken before."""
        assert len(self) < self.max_size, f"more than {self.max_size} requests in the queue"
        assert sequence.key not in self._by_key, "two sequences with one key"
        self._by_key[sequence.key] = sequence
        self._by_level[sequence.level] += 1

    def first(
        self, *, hold_level: int | None = None, held_after: float = -math.inf
    ) -> Sequence | None:
        """The first, passing over those of `hold_level` that arrived after `held_after`."""
        if hold_level is None or not self._by_level[hold_level]:
            return self._by_key.peekitem(0)[1] if self._by_key else None
        return next(
            (
                each
                for each in self._by_key.values()
                if each.level != hold_level or each.arrived_at <= held_after
            ),
            None,
        )

    def take(self, sequence: Sequence | None = None) -> Sequence:
        """Remove the first, or this one, to be served. Raises `KeyError` when empty."""
        if sequence is None:
            sequence = self._by_key.peekitem(0)[1] if self._by_key else None
        if sequence is None or not self.remove(sequence):
            raise KeyError("nothing to take")
        if any(self._by_level[level] for level in range(sequence.level)):
            self.promotions += 1
        return sequence

    def ahead_of(self, key: QueueKey) -> int:
        """How many stand before a sequence with this key."""
        return int(self._by_key.bisect_left(key))

    def remove(self, sequence: Sequence) -> bool:
        """Take out a sequence wherever it stands; False if it is not here."""
        if sequence not in self:
            return False
        del self._by_key[sequence.key]
        self._by_level[sequence.level] -= 1
        return True

    def by_level(self) -> dict[int, int]:
        return {level: count for level, count in self._by_level.items() if count}
