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
from operator import itemgetter

from sortedcontainers import SortedDict

from trio_worker.core.fair_shares import FairShares, LevelShares
from trio_worker.core.sequence import QueueKey, Sequence


class _Level:
    """Those of one level: by age, by caller, and those that have been in the batch."""

    def __init__(self, shares: LevelShares) -> None:
        self.by_key: SortedDict[QueueKey, Sequence] = SortedDict()
        self.lines: dict[str, SortedDict[QueueKey, Sequence]] = {}
        """One for each caller that waits."""
        self.begun: SortedDict[QueueKey, Sequence] = SortedDict()
        self.shares = shares

    def add(self, sequence: Sequence) -> None:
        key, caller = sequence.key, sequence.caller
        self.by_key[key] = sequence
        if sequence.batched_at is not None:
            self.begun[key] = sequence
        line = self.lines.get(caller)
        if line is None:
            line = self.lines[caller] = SortedDict()
        line[key] = sequence
        if line.peekitem(0)[0] == key:
            self.shares.wait(caller, key)

    def remove(self, sequence: Sequence) -> None:
        key, caller = sequence.key, sequence.caller
        del self.by_key[key]
        self.begun.pop(key, None)
        line = self.lines[caller]
        was_first = line.peekitem(0)[0] == key
        del line[key]
        if not line:
            del self.lines[caller]
            self.shares.leave(caller)
        elif was_first:
            self.shares.wait(caller, line.peekitem(0)[0])

    def earliest(self, until: float) -> Sequence | None:
        return _earliest(self.by_key, until)

    def first(self, until: float) -> Sequence | None:
        """Who of this level is served next, of those that arrived by `until`."""
        if len(self.lines) <= 1:
            return self.earliest(until)
        if self.begun and (begun := _earliest(self.begun, until)) is not None:
            return begun
        firsts = (_earliest(self.lines[caller], until) for caller in self.shares.in_order())
        return next((each for each in firsts if each is not None), None)

    def ahead_of(self, sequence: Sequence) -> int:
        """How many of its level are served before this one, at least.

        Its caller's earlier ones, and one of each caller who has been served less.
        """
        line = self.lines.get(sequence.caller)
        own = 0 if line is None else int(line.bisect_left(sequence.key))
        return own + self.shares.ahead_of(sequence.caller, sequence.key)

    def claim_of(self, sequence: Sequence) -> QueueKey:
        """With which key its level may be served when its own turn comes, at the earliest."""
        has_others = len(self.lines) > (sequence.caller in self.lines)
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
        bounds = (
            (level, held_after if number == hold_level else math.inf)
            for number, level in self._levels.items()
        )
        claims = (
            (earliest.key, level, until)
            for level, until in bounds
            if (earliest := level.earliest(until)) is not None
        )
        _, level, until = min(claims, key=itemgetter(0), default=(None, None, 0.0))
        return None if level is None else level.first(until)

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
        return len({caller for level in self._levels.values() for caller in level.lines})


def _earliest(sequences: SortedDict[QueueKey, Sequence], until: float) -> Sequence | None:
    """The first of these that arrived by `until`."""
    if until == math.inf:
        return sequences.peekitem(0)[1] if sequences else None
    return next((each for each in sequences.values() if each.arrived_at <= until), None)
