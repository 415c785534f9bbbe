"""The order in which waiting requests are served: a bounded set of sequences.

Rule 1: the level that is served next is the one whose earliest key is the smallest.
Rule 2: within it, whoever has been in the batch before goes first: its turn had come. Then comes
the caller who has been served least (core/fair_shares.py), and of that one's requests the earliest.
With one caller in a level, its requests go by their keys alone.

So a level is passed over only while another has a request with an earlier key than all of its own.

Every operation costs O(log n), except for the look past what memory pressure holds back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from sortedcontainers import SortedDict

from trio_worker.core.fair_shares import FairShares, LevelShares
from trio_worker.core.sequence import QueueKey, Sequence


class _Level:
    """Those of one level: by age, by caller, and those that have been in the batch."""

    def __init__(self, shares: LevelShares) -> None:
        self.by_key: SortedDict[QueueKey, Sequence] = SortedDict()
        self.by_caller: SortedDict[tuple[str, QueueKey], Sequence] = SortedDict()
        self.begun: SortedDict[QueueKey, Sequence] = SortedDict()
        self.shares = shares

    def add(self, sequence: Sequence) -> None:
        key, caller = sequence.key, sequence.caller
        self.by_key[key] = sequence
        self.by_caller[caller, key] = sequence
        if sequence.batched_at is not None:
            self.begun[key] = sequence
        first = self.shares.first_of(caller)
        if first is None or key < first:
            self.shares.wait(caller, key)

    def remove(self, sequence: Sequence) -> None:
        key, caller = sequence.key, sequence.caller
        del self.by_key[key]
        del self.by_caller[caller, key]
        self.begun.pop(key, None)
        if key == self.shares.first_of(caller):
            following = next(self._of_caller(caller), None)
            if following is None:
                self.shares.leave(caller)
            else:
                self.shares.wait(caller, following.key)

    def _of_caller(self, caller: str) -> Iterator[Sequence]:
        """The earliest first."""
        for its_caller, key in self.by_caller.irange((caller,)):
            if its_caller != caller:
                return
            yield self.by_caller[caller, key]

    def earliest(self, until: float) -> Sequence | None:
        """The earliest of those that arrived by `until`."""
        if until == math.inf:
            return self.by_key.peekitem(0)[1] if self.by_key else None
        return _first_by(until, self.by_key.values())

    def first(self, until: float) -> Sequence | None:
        """Who of this level is served next, of those that arrived by `until`."""
        if self.shares.waiting <= 1:
            return self.earliest(until)
        if self.begun and (begun := _first_by(until, self.begun.values())) is not None:
            return begun
        firsts = (_first_by(until, self._of_caller(caller)) for caller in self.shares.in_order())
        return next((each for each in firsts if each is not None), None)

    def ahead_of(self, sequence: Sequence) -> int:
        """How many of its level are served before this one, at least.

        Its caller's earlier ones, and one of each caller who has been served less.
        """
        caller, key = sequence.caller, sequence.key
        own = self.by_caller.bisect_left((caller, key)) - self.by_caller.bisect_left((caller,))
        return int(own) + self.shares.ahead_of(caller, key)

    def claim_of(self, sequence: Sequence) -> QueueKey:
        """With which key its level may be served when its own turn comes, at the earliest."""
        has_others = self.shares.waiting > (self.shares.first_of(sequence.caller) is not None)
        return min(sequence.key, self.by_key.peekitem(0)[0]) if has_others else sequence.key


class RequestQueue:
    """Sequences in the order in which they are served."""

    def __init__(self, *, max_size: int, shares: FairShares | None = None) -> None:
        """`shares` is what callers have been served, and who books it has the same one."""
        self.max_size = max_size
        self.promotions = 0
        """How often a request was taken while a more urgent one was waiting: aging at work."""
        self._shares = FairShares() if shares is None else shares
        self._levels: dict[int, _Level] = {}
        """Bound: one for each priority level."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, sequence: Sequence) -> bool:
        level = self._levels.get(sequence.level)
        return level is not None and level.by_key.get(sequence.key) is sequence

    def add(self, sequence: Sequence) -> None:
        """Room is the caller's promise: a place was taken before."""
        assert len(self) < self.max_size, f"more than {self.max_size} requests in the queue"
        level = self._levels.get(sequence.level)
        if level is None:
            shares = self._shares.levels[sequence.level]
            level = self._levels[sequence.level] = _Level(shares)
        assert sequence.key not in level.by_key, "two sequences with one key"
        level.add(sequence)
        self._size += 1

    def first(
        self, *, hold_level: int | None = None, held_after: float = -math.inf
    ) -> Sequence | None:
        """The first, passing over those of `hold_level` that arrived after `held_after`."""
        claim: QueueKey | None = None
        served: tuple[_Level, float] | None = None
        for number, level in self._levels.items():
            until = held_after if number == hold_level else math.inf
            earliest = level.earliest(until)
            if earliest is not None and (claim is None or earliest.key < claim):
                claim, served = earliest.key, (level, until)
        return None if served is None else served[0].first(served[1])

    def take(self, sequence: Sequence | None = None) -> Sequence:
        """Remove the first, or this one, to be served. Raises `KeyError` when empty."""
        if sequence is None:
            sequence = self.first()
        if sequence is None or not self.remove(sequence):
            raise KeyError("nothing to take")
        if any(self._levels[level].by_key for level in self._levels if level < sequence.level):
            self.promotions += 1
        return sequence

    def ahead_of(self, sequence: Sequence) -> int:
        """How many are served before a sequence that is not here, or is, at least.

        Of its own level as `_Level` says; of the others those that go before all of its level.
        """
        own = self._levels.get(sequence.level)
        ahead, claim = 0, sequence.key
        if own is not None:
            ahead, claim = own.ahead_of(sequence), own.claim_of(sequence)
        others = (level for level in self._levels.values() if level is not own)
        return ahead + sum(int(level.by_key.bisect_left(claim)) for level in others)

    def remove(self, sequence: Sequence) -> bool:
        """Take out a sequence wherever it stands; False if it is not here."""
        if sequence not in self:
            return False
        self._levels[sequence.level].remove(sequence)
        self._size -= 1
        return True

    def by_level(self) -> dict[int, int]:
        return {number: len(each.by_key) for number, each in self._levels.items() if each.by_key}

    def callers(self) -> int:
        """How many callers have something here; all without a name are one."""
        return len(
            {caller for level in self._levels.values() for caller in level.shares.in_order()}
        )


def _first_by(until: float, sequences: Iterable[Sequence]) -> Sequence | None:
    """The first of these that arrived by `until`."""
    return next((each for each in sequences if each.arrived_at <= until), None)
