"""Who is served when several callers wait: against a model, and by the bounds that are stated."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace
from support.factories import make_report, make_sequence

from trio_worker.core import fair_shares
from trio_worker.core.fair_shares import FairShares, LevelShares
from trio_worker.core.memory import ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.protocol.turn import FinishReason, Prefill

LEVELS = 3
SIZE = 40
CALLERS = (None, "ada", "bob", "cy")
times = st.floats(0, 100, allow_nan=False)
levels = st.integers(0, LEVELS - 1)
callers = st.sampled_from(CALLERS)


class FairQueueMachine(RuleBasedStateMachine):
    """The queue against a list that is looked through, and counters that are never forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = FairShares()
        self.queue = RequestQueue(max_size=SIZE, shares=self.shares)
        self.model: list[Sequence] = []
        self.served: Counter[tuple[int, str]] = Counter()
        self.floors: Counter[int] = Counter()
        self.names = itertools.count()

    @precondition(lambda self: len(self.model) < SIZE)
    @rule(level=levels, at=times, caller=callers, is_begun=st.sampled_from((False, False, True)))
    def add(self, level: int, at: float, caller: str | None, is_begun: bool) -> None:  # noqa: FBT001 - drawn by name
        sequence = make_sequence(f"r{next(self.names)}", level=level, at=at, caller=caller)
        if is_begun:
            sequence.batched_at = at
        if not self._line(level, sequence.caller):
            account = (level, sequence.caller)
            self.served[account] = max(self.served[account], self.floors[level])
        self.queue.add(sequence)
        self.model.append(sequence)
        self._raise_floor(level)

    @rule(level=levels, caller=callers, tokens=st.integers(-5, 50))
    def charge(self, level: int, caller: str | None, tokens: int) -> None:
        account = (level, caller or "")
        tokens = max(tokens, -self.served[account])
        self.shares.charge(level, caller or "", tokens)
        if not tokens:
            return
        if account not in self.served:
            self.served[account] = self.floors[level]
        self.served[account] += tokens
        self._raise_floor(level)

    @precondition(lambda self: self.model)
    @rule()
    def take_the_first(self) -> None:
        expected = self._first()
        assert self.queue.take() is expected
        assert expected is not None
        self._gone(expected)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.model))
        assert self.queue.remove(sequence)
        self._gone(sequence)

    def _gone(self, sequence: Sequence) -> None:
        self.model.remove(sequence)
        self._raise_floor(sequence.level)

    @rule(level=levels, after=times)
    def look_past_the_latest_of_a_level(self, level: int, after: float) -> None:
        expected = self._first(hold_level=level, held_after=after)
        assert self.queue.first(hold_level=level, held_after=after) is expected

    def _line(self, level: int, caller: str) -> list[Sequence]:
        mine = [each for each in self.model if (each.level, each.caller) == (level, caller)]
        return sorted(mine, key=lambda each: each.key)

    def _raise_floor(self, level: int) -> None:
        waiting = [self.served[level, each.caller] for each in self.model if each.level == level]
        self.floors[level] = max(self.floors[level], min(waiting, default=0))

    def _first(self, hold_level: int = -1, held_after: float = 0.0) -> Sequence | None:
        there = [
            each for each in self.model if each.level != hold_level or each.arrived_at <= held_after
        ]
        if not there:
            return None
        level = min(there, key=lambda each: each.key).level
        there = [each for each in there if each.level == level]
        waiting = {each.caller for each in self.model if each.level == level}
        if len(waiting) == 1:
            return min(there, key=lambda each: each.key)
        begun = [each for each in there if each.batched_at is not None]
        if begun:
            return min(begun, key=lambda each: each.key)

        def rank(each: Sequence) -> tuple[object, ...]:
            first = self._line(level, each.caller)[0]
            return (self.served[level, each.caller], first.key, each.key)

        return min(there, key=rank)

    @invariant()
    def they_agree(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.first() is self._first()
        assert all(each in self.queue for each in self.model)
        assert self.queue.by_level() == Counter(each.level for each in self.model)
        assert self.queue.callers() == len({each.caller for each in self.model})
        for (level, caller), served in self.served.items():
            waits = bool(self._line(level, caller))
            expected = served if waits else max(served, self.floors[level])
            assert self.shares.levels[level].served(caller) == expected


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
