"""The decisions against models so simple that they are obviously right, in every order of calls."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.factories import make_admission, make_sequence

from trio_worker.core.memory import MB, MemoryReading, PressureGauge, ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Delivery, Scheduler
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.core.trial import PROOF_TOKENS
from trio_worker.errors import (
    DuplicateRequest,
    InvalidRequest,
    QueueFull,
    ResourceLimitExceeded,
    WorkerDraining,
)
from trio_worker.protocol.turn import (
    TURNS_UNDER_WAY_MAX,
    EngineMemory,
    FinishReason,
    Output,
    Report,
    SequenceFailure,
    Work,
)

LEVELS = 3
times = st.floats(0, 100, allow_nan=False)
levels = st.integers(0, LEVELS - 1)


class QueueMachine(RuleBasedStateMachine):
    """The request queue against a list that is sorted by key."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(max_size=50)
        self.model: list[Sequence] = []
        self.names = itertools.count()

    @precondition(lambda self: len(self.model) < 50)
    @rule(level=levels, at=times)
    def add(self, level: int, at: float) -> None:
        sequence = make_sequence(f"r{next(self.names)}", level=level, at=at)
        self.queue.add(sequence)
        self.model.append(sequence)
        self.model.sort(key=lambda each: each.key)

    @precondition(lambda self: self.model)
    @rule()
    def take_the_first(self) -> None:
        assert self.queue.take() is self.model.pop(0)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def take_one(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.model))
        assert self.queue.take(sequence) is sequence
        self.model.remove(sequence)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_one_and_again(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.model))
        assert self.queue.remove(sequence)
        assert not self.queue.remove(sequence)
        self.model.remove(sequence)

    @rule(level=levels)
    def look_past_a_level(self, level: int) -> None:
        expected = next((each for each in self.model if each.level != level), None)
        assert self.queue.first(hold_level=level) is expected

    @rule(level=levels, after=times)
    def look_past_the_latest_of_a_level(self, level: int, after: float) -> None:
        expected = next(
            (each for each in self.model if each.level != level or each.arrived_at <= after), None
        )
        assert self.queue.first(hold_level=level, held_after=after) is expected

    @rule(level=levels, at=times)
    def count_who_is_ahead(self, level: int, at: float) -> None:
        newcomer = make_sequence("newcomer", level=level, at=at)
        ahead = [each for each in self.model if each.key < newcomer.key]
        assert self.queue.ahead_of(newcomer) == len(ahead)

    @invariant()
    def they_agree(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.first() is (self.model[0] if self.model else None)
        assert all(each in self.queue for each in self.model)
        assert sum(self.queue.by_level().values()) == len(self.model)


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler against a dictionary of who runs, and an engine that is a set of residents.

    Some sequences are deadly: a turn with one of them in the engine ends it. The promise is that
    these fail and no others.
    """

    MAX_TOKENS = 3 * PROOF_TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.ledger = ReservationLedger(limit_bytes=10**9)
        self.ledger.bytes_per_token = 1
        self.scheduler = Scheduler(
            slots=4, prefill=PrefillBudget(chunk_max=64, gap_target_s=0.2), ledger=self.ledger
        )
        self.running: dict[str, Sequence] = {}
        self.produced: dict[str, list[int]] = {}
        self.preempted: list[Sequence] = []
        self.deadly: set[str] = set()
        self.residents: dict[str, list[int]] = {}
        """The engine: the tokens of each."""
        self.under_way: deque[Work] = deque()
        """What it has been told and has not done."""
        self.names = itertools.count()
        self.crashes = 0
        self.excuses = 0
        """Sequences that left while they were suspected, which prolongs the search."""

    # --- who comes and goes ---------------------------------------------------------------

    @precondition(lambda self: self.scheduler.free_slots > 0)
    @rule(level=levels, deadly=st.sampled_from((False, False, True)))
    def enter(self, level: int, deadly: bool) -> None:  # noqa: FBT001 - drawn by name
        name = f"r{next(self.names)}"
        sequence = make_sequence(name, level=level, stage=Stage.QUEUED)
        sequence.max_tokens = self.MAX_TOKENS
        if deadly:
            self.deadly.add(name)
        self._enter(sequence)

    @precondition(lambda self: self.scheduler.free_slots > 0 and self.preempted)
    @rule()
    def come_back(self) -> None:
        self._enter(self.preempted.pop(0))

    def _enter(self, sequence: Sequence) -> None:
        self.scheduler.enter(sequence, now=0.0)
        self.running[sequence.request_id] = sequence
        self.produced.setdefault(sequence.request_id, [])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self._withdraw(data.draw(st.sampled_from(sorted(self.running))))

    def _withdraw(self, name: str) -> None:
        sequence = self.running.pop(name)
        self.scheduler.withdraw(sequence)
        sequence.advance(Event.END)
        self.excuses += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        sequence = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        self.scheduler.preempt(sequence)
        self.preempted.append(sequence)
        self.excuses += 1

    # --- turns ----------------------------------------------------------------------------

    @rule(data=st.data())
    def turn(self, data: st.DataObject) -> None:
        leaver = data.draw(st.sampled_from([None, None, None, *sorted(self.running)]))
        self._turn(leaver)

    @precondition(lambda self: len(self.running) > 1)
    @rule(data=st.data())
    def one_sequence_fails_by_itself(self, data: st.DataObject) -> None:
        self._turn(None, failing=data.draw(st.sampled_from(sorted(self.running))))

    @rule(times=st.integers(1, 2 * PROOF_TOKENS))
    def some_turns(self, times: int) -> None:
        for _ in range(times):
            self._turn(None)

    @precondition(lambda self: 0 < len(self.under_way) < TURNS_UNDER_WAY_MAX)
    @rule()
    def begin_ahead(self) -> None:
        """What follows happens while several turns are under way, each begun with less known."""
        if not self.scheduler.is_on_trial:
            self._begin()

    @rule()
    def begin(self) -> None:
        if not self.under_way:
            self._begin()

    @rule()
    def planned_restart(self) -> None:
        self._begin()
        self._forget()
        assert self.scheduler.lost(blameless=True) == []

    def _turn(self, leaver: str | None, *, failing: str | None = None) -> None:
        """A turn, in the middle of which `leaver` may leave."""
        if not self.under_way:
            self._begin()
        work = self.under_way.popleft()
        self._take_in(work)
        ended = not self.deadly.isdisjoint(self.residents)
        if leaver is not None and leaver in self.running:
            self._withdraw(leaver)
        if ended:
            self.crashes += 1
            self._forget()
            for delivery in self.scheduler.lost(blameless=False):
                self._fail(delivery)
            return
        report = self._report(admitted={each.request_id for each in work.admit}, failing=failing)
        for delivery in self.scheduler.book(report, now=1.0):
            self._deliver(delivery)

    def _forget(self) -> None:
        self.residents.clear()
        self.under_way.clear()

    def _begin(self) -> None:
        self.under_way.append(self.scheduler.plan())
        assert self.scheduler.turns_under_way == len(self.under_way)
        expected = set(self.residents)
        for work in self.under_way:
            expected.difference_update(work.remove)
            expected.update(admit.request_id for admit in work.admit)
        running = set(self.running)
        assert expected == running or (len(expected) == 1 and expected < running)

    def _take_in(self, work: Work) -> None:
        for name in work.remove:
            self.residents.pop(name, None)
        for admit in work.admit:
            assert admit.request_id not in self.residents
            assert list(admit.produced) == self.produced[admit.request_id], "no token is lost"
            self.residents[admit.request_id] = list(admit.produced)
        assert len(self.residents) <= self.scheduler.slots

    def _report(self, *, admitted: set[Any], failing: str | None) -> Report:
        failures = [failing] if failing in self.residents else []
        for name in failures:
            del self.residents[name]
        outputs = []
        for name in sorted(set(self.residents) - admitted):
            tokens = self.residents[name]
            tokens.append(len(tokens))
            last = len(tokens) == self.MAX_TOKENS
            outputs.append(
                Output(
                    request_id=name,  # type: ignore[arg-type]
                    token=tokens[-1],
                    text="x",
                    finish=FinishReason.LENGTH if last else None,
                )
            )
            if last:
                del self.residents[name]
        return Report(
            outputs=tuple(outputs),
            prefills=(),
            failures=tuple(
                SequenceFailure(request_id=name, message="alone")  # type: ignore[arg-type]
                for name in failures
            ),
            residents=frozenset(self.residents),  # type: ignore[arg-type]
            memory=EngineMemory(active=0, cache=0),
            seconds=0.02,
            prefill_tokens=0,
            prefill_calls=0,
            prefill_seconds=0.0,
        )

    def _deliver(self, delivery: Delivery) -> None:
        name, output = delivery.sequence.request_id, delivery.output
        assert self.running[name] is delivery.sequence
        if isinstance(output, SequenceFailure):
            del self.running[name]
            delivery.sequence.advance(Event.END)
            return
        self.produced[name].append(output.token)
        assert self.produced[name] == list(range(len(self.produced[name])))
        if output.finish is not None:
            del self.running[name]
            delivery.sequence.advance(Event.END)

    def _fail(self, delivery: Delivery) -> None:
        name = delivery.sequence.request_id
        assert name in self.deadly, "only who brings the engine down fails"
        del self.running[name]
        delivery.sequence.advance(Event.END)

    # --- what always holds ----------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        assert self.scheduler.running == self.running
        assert set(self.ledger._promised) == set(self.running)
        assert 0 <= self.scheduler.free_slots <= self.scheduler.slots
        for name, sequence in self.running.items():
            assert sequence.produced == self.produced[name]

    def teardown(self) -> None:
        """Left alone, everyone comes to an end: the deadly fail, the others complete."""
        for _ in range(20 * self.MAX_TOKENS + TURNS_UNDER_WAY_MAX):
            while self.preempted and self.scheduler.free_slots > 0:
                self._enter(self.preempted.pop(0))
            if not self.running and not self.under_way:
                break
            self._turn(None)
        assert not self.running
        assert not self.preempted
        assert self.crashes <= 3 * (len(self.deadly) + self.excuses)
        self._turn(None)
        assert not self.residents


class AdmissionMachine(RuleBasedStateMachine):
    """Admission against the sets of those who hold a place, wait for one, or are in the batch."""

    @initialize(
        max_depth=st.integers(1, 5),
        slots=st.integers(1, 3),
        rejects=st.booleans(),
        queue_enabled=st.booleans(),
        max_per_caller=st.sampled_from((None, None, 1, 2, 3)),
    )
    def open(
        self,
        max_depth: int,
        slots: int,
        rejects: bool,  # noqa: FBT001 - drawn by name
        queue_enabled: bool,  # noqa: FBT001 - drawn by name
        max_per_caller: int | None,
    ) -> None:
        self.gauge = PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB)
        self.queue = RequestQueue(max_size=100)
        self.admission = make_admission(
            queue_enabled=queue_enabled,
            max_depth=max_depth,
            max_per_caller=max_per_caller,
            reject_when_full=rejects,
            slots=slots,
            refuse_unmeetable=False,
            gauge=self.gauge,
            queue=self.queue,
        )
        self.places = max_depth if queue_enabled else slots
        self.slots = slots
        self.room_to_wait = 0 if rejects or not queue_enabled else max_depth
        self.queue_enabled = queue_enabled
        self.per_caller = max_per_caller if queue_enabled and max_per_caller else 1000
        self.holders: dict[str, Sequence] = {}
        self.waiters: dict[str, Sequence] = {}
        self.batched: dict[str, Sequence] = {}
        self.critical = self.drained = False
        self.clock = itertools.count()
        self.names = itertools.count()

    @property
    def in_flight(self) -> dict[str, Sequence]:
        return {**self.holders, **self.waiters, **self.batched}

    @rule(
        level=levels,
        name=st.sampled_from(["fresh", "fresh", "used"]),
        choices=st.sampled_from([1, 1, 2, 3, 7]),
        caller=st.sampled_from([None, "a", "b"]),
    )
    def arrive(self, level: int, name: str, choices: int, caller: str | None) -> None:
        request_id = f"r{next(self.names)}"
        if name == "used" and self.in_flight:
            request_id = min(self.in_flight).partition(".")[0]
        sequence = make_sequence(
            request_id, level=level, at=float(next(self.clock)), choices=choices, caller=caller
        )
        unserved = {**self.holders, **self.waiters}.values()
        claimed = sum(row.caller == sequence.caller for row in unserved)
        has_to_wait = self._has_to_wait(sequence)
        expected: type[Exception] | None = None
        if self.drained:
            expected = WorkerDraining
        elif request_id in self.in_flight:
            expected = DuplicateRequest
        elif choices > min(self.places, self.per_caller):
            expected = InvalidRequest
        elif self.critical:
            expected = ResourceLimitExceeded
        elif claimed + choices > self.per_caller or (
            has_to_wait and len(self.waiters) + choices > self.room_to_wait
        ):
            expected = QueueFull
        refusal = self.admission.refusal(sequence)
        assert type(refusal) is (expected or type(None))
        if refusal is None:
            self.admission.enter(sequence)
            group = self.waiters if has_to_wait else self.holders
            group.update((row.request_id, row) for row in sequence.rows)
            assert {row.stage is Stage.WAITING for row in sequence.rows} == {has_to_wait}

    def _has_to_wait(self, sequence: Sequence) -> bool:
        first = min((each.key for each in self.waiters.values()), default=sequence.key)
        return first < sequence.key or not self._are_free(len(sequence.rows))

    def _are_free(self, places: int) -> bool:
        taken = len(self.holders) if self.queue_enabled else len(self.holders | self.batched)
        return taken + places <= self.places

    @precondition(lambda self: self.holders and len(self.batched) < self.slots)
    @rule(data=st.data())
    def enter_the_batch(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holders)))
        self.batched[name] = row = self.holders.pop(name)
        self._granted(self.admission.batched(row))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A request leaves with all its rows, wherever each of them is."""
        name = data.draw(st.sampled_from(sorted(self.in_flight)))
        sequence = self.in_flight[name].rows[0]
        for row in sequence.rows:
            for group in (self.waiters, self.holders, self.batched):
                group.pop(row.request_id, None)
        self._granted(self.admission.leave(sequence))

    def _granted(self, followers: list[Sequence]) -> None:
        """Those who wait get places in the queue's order, as long as there are enough for each."""
        for each in followers:
            assert each.key == min(waiter.key for waiter in self.waiters.values())
            assert self._are_free(len(each.rows))
            for row in each.rows:
                self.holders[row.request_id] = self.waiters.pop(row.request_id)
        if self.waiters:
            first = min(self.waiters.values(), key=lambda waiter: waiter.key)
            assert not self._are_free(len(first.rows)), "places are left unused"

    @rule(used=st.sampled_from([50, 150, 250]))
    def read_memory(self, used: int) -> None:
        self.gauge.read(MemoryReading(used=used * MB, available=10_000 * MB, total=16_000 * MB))
        if used >= 200:
            self.critical = True
        elif used < 100:
            self.critical = False

    @rule()
    def drain(self) -> None:
        self.admission.draining = self.drained = True

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "admission"):
            return
        assert set(self.admission.in_flight) == set(self.in_flight)
        assert self.admission.depth == len(self.holders)
        assert self.admission.waiting == len(self.waiters)
        assert len(self.in_flight) <= self.places + self.slots + self.room_to_wait
        assert len(self.holders) <= self.places
        unserved = {**self.holders, **self.waiters}.values()
        for caller in {row.caller for row in unserved}:
            assert sum(row.caller == caller for row in unserved) <= self.per_caller


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)

TestQueue = QueueMachine.TestCase
TestQueue.settings = SETTINGS
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = SETTINGS
TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = SETTINGS
