"""Who enters the batch and who leaves it, look by look: decided without a task or a clock."""

from __future__ import annotations

from typing import Any

import pytest
from support.factories import make_report, make_sequence

from trio_worker.core.batching import (
    FAULTS_MAX,
    TRIM_INTERVAL_S,
    Batching,
    BatchRules,
    Filling,
    queued_at_of,
)
from trio_worker.core.formation import Formation
from trio_worker.core.memory import (
    DegradationStep,
    MemoryReading,
    PressureGauge,
    ReservationLedger,
)
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Ending, Event, Sequence, Stage
from trio_worker.protocol.turn import TURNS_UNDER_WAY_MAX, Report

ROW = 256
"""Bytes of every request here: one granule of tokens, at a byte each."""
SOFT, CRITICAL = 10_000, 20_000
TRIM, HOLD, SHRINK, CAP = DegradationStep


class Scene:
    """A queue, a batch of `slots`, and memory that is as full as the test says."""

    def __init__(self, *, slots: int = 2, limit: int = 10**6, **rules: Any) -> None:
        self.queue = RequestQueue(max_size=20)
        self.gauge = PressureGauge(soft_bytes=SOFT, critical_bytes=CRITICAL)
        ledger = ReservationLedger(limit_bytes=limit)
        ledger.bytes_per_token = 1
        budget = PrefillBudget(chunk_max=64, gap_target_s=0.2)
        self.scheduler = Scheduler(slots=slots, prefill=budget, ledger=ledger)
        given: dict[str, Any] = {
            "formation": Formation(min_batch_size=1, timeout_s=0.1, adaptive=False),
            "preempt": True,
            "degraded_max_tokens": 50,
            "levels": 3,
            "held_most_s": 10.0,
            "lead_s": 0.01,
        }
        self.batching = Batching(
            BatchRules(**{**given, **rules}),
            queue=self.queue,
            scheduler=self.scheduler,
            gauge=self.gauge,
        )
        self.sequences: dict[str, Sequence] = {}

    def begun_after(self, last: Report) -> int:
        """How many turns are begun until no more may be."""
        begun = 0
        while self.batching.may_begin_ahead(last):
            self.batching.plan(1.0)
            begun += 1
        return begun

    def queued(self, *names: str, at: float = 0.0, level: int = 1) -> None:
        for name in names:
            sequence = make_sequence(name, level=level, at=at, stage=Stage.QUEUED)
            sequence.queued_at = at
            self.sequences[name] = sequence
            self.queue.add(sequence)

    def use(self, used: int) -> None:
        self.gauge.read(MemoryReading(used=used, available=10**9, total=10**9))
        self.batching.follow_pressure()

    def fill(self, now: float = 1.0) -> Filling:
        return self.batching.fill(now)

    @property
    def running(self) -> str:
        return " ".join(self.scheduler.running)

    @property
    def waiting(self) -> str:
        queued = [each for each in self.sequences.values() if each in self.queue]
        return names(sorted(queued, key=lambda each: each.key))


def names(sequences: list[Sequence]) -> str:
    return " ".join(each.request_id for each in sequences)


# --- who enters -----------------------------------------------------------------------------


def test_the_free_slots_go_to_the_head_of_the_queue() -> None:
    scene = Scene()
    assert scene.fill() == Filling()
    scene.queued("a", "b", "c")
    filling = scene.fill()
    assert (names(filling.entered), names(filling.newcomers)) == ("a b", "a b")
    assert (scene.running, scene.waiting) == ("a b", "c")
    assert scene.sequences["a"].batched_at == 1.0
    assert filling.preempted == []
    assert scene.fill() == Filling()


def test_nobody_passes_a_head_whose_bytes_do_not_fit() -> None:
    scene = Scene(limit=3 * ROW)
    scene.queued("a")
    scene.fill()
    scene.queued("large", "small")
    scene.sequences["large"].max_tokens = 2 * ROW - 3
    assert scene.fill() == Filling()
    assert scene.waiting == "large small"
    assert scene.sequences["large"].ending is None
    scene.scheduler.withdraw(scene.sequences["a"])
    assert names(scene.fill().entered) == "large"


def test_a_head_that_can_never_fit_ends_and_nobody_passes_it_before_its_task_has_left() -> None:
    scene = Scene(limit=2 * ROW)
    scene.queued("huge", "small")
    scene.sequences["huge"].max_tokens = 3 * ROW
    assert scene.fill() == Filling()
    assert scene.sequences["huge"].ending is Ending.TOO_LARGE
    scene.queue.remove(scene.sequences["huge"])
    assert names(scene.fill().entered) == "small"


def test_who_comes_back_is_no_newcomer() -> None:
    scene = Scene(slots=1)
    scene.queued("low", level=2)
    scene.fill(now=1.0)
    scene.queued("high", level=0, at=1.0)
    scene.fill(now=2.0)
    scene.scheduler.withdraw(scene.sequences["high"])
    filling = scene.fill(now=3.0)
    assert (names(filling.entered), names(filling.newcomers)) == ("low", "")
    assert scene.sequences["low"].batched_at == 1.0


# --- who makes room -------------------------------------------------------------------------


def test_an_urgent_head_takes_the_slot_of_the_latest_key_and_enters_at_once() -> None:
    scene = Scene()
    scene.queued("early", "late", level=2)
    scene.fill()
    scene.queued("high", level=0)
    filling = scene.fill()
    (preemption,) = filling.preempted
    assert (preemption.victim.request_id, preemption.reason) == ("late", "priority")
    assert names(filling.entered) == "high"
    assert (scene.running, scene.waiting) == ("early high", "late")
    assert (scene.sequences["late"].preempted, scene.sequences["late"].stage) == (1, Stage.QUEUED)


@pytest.mark.parametrize("why", ["a rule", "memory", "a shrunk batch", "its own level"])
def test_no_slot_is_taken(why: str) -> None:
    scene = Scene(limit=2 * ROW if why == "memory" else 10**6, preempt=why != "a rule")
    scene.queued("a", "b", level=2)
    scene.fill()
    if why == "a shrunk batch":
        scene.scheduler.shrunk = True
    scene.queued("head", level=2 if why == "its own level" else 0)
    if why == "memory":
        scene.sequences["head"].max_tokens = ROW
    assert scene.fill() == Filling()
    assert (scene.running, scene.waiting) == ("a b", "head")
    assert [each.preempted for each in scene.sequences.values()] == [0, 0, 0]


def test_under_critical_pressure_nobody_enters_and_one_leaves_with_each_reading() -> None:
    scene = Scene(slots=3)
    scene.queued("a", "b", "c")
    scene.fill()
    scene.queued("d")
    scene.use(CRITICAL)
    (preemption,) = scene.fill().preempted
    assert (preemption.victim.request_id, preemption.reason) == ("c", "memory")
    assert scene.sequences["c"].preempted == 0, "it has not given its slot to anybody"
    assert scene.fill() == Filling(), "the same reading calls for no more"
    scene.use(CRITICAL)
    assert [each.victim.request_id for each in scene.fill().preempted] == ["b"]
    scene.use(CRITICAL)
    scene.fill()
    scene.use(CRITICAL)
    assert scene.fill() == Filling()
    assert (scene.running, scene.waiting) == ("", "a b c d")
    scene.use(0)
    assert names(scene.fill().entered) == "a b c"


# --- lesser pressure ------------------------------------------------------------------------


def test_the_steps_begin_and_end_once_each_and_are_told_in_their_order() -> None:
    scene = Scene()
    told: list[object] = []
    for used in (0, SOFT, CRITICAL - 1, CRITICAL - 1, SOFT, 0):
        scene.gauge.read(MemoryReading(used=used, available=10**9, total=10**9))
        told.append(scene.batching.follow_pressure())
    assert told == [
        ([], []),
        ([TRIM], []),
        ([HOLD, SHRINK, CAP], []),
        ([], []),
        ([], [HOLD, SHRINK, CAP]),
        ([], [TRIM]),
    ]


def test_a_shrunk_batch_is_the_scheduler_s_to_keep() -> None:
    scene = Scene(slots=4)
    scene.use(CRITICAL - 1)
    assert scene.scheduler.shrunk is True
    scene.queued("a", "b", "c")
    assert names(scene.fill().entered) == "a b"
    scene.use(0)
    assert scene.scheduler.shrunk is False


def test_the_lowest_level_is_passed_over_until_it_has_been_held_for_long_enough() -> None:
    scene = Scene(held_most_s=10.0)
    scene.use(CRITICAL - 1)
    scene.queued("low", level=2, at=0.0)
    scene.queued("medium", level=1, at=30.0)
    head = scene.batching.head(9.9)
    assert head is not None
    assert head.request_id == "medium"
    assert scene.batching.head(10.0) is scene.sequences["low"]
    scene.use(0)
    assert scene.batching.head(0.0) is scene.sequences["low"]


def test_newcomers_get_fewer_tokens_and_who_comes_back_keeps_what_it_had() -> None:
    scene = Scene(slots=4)
    scene.queued("before")
    scene.fill()
    scene.use(CRITICAL - 1)
    scene.scheduler.preempt(scene.sequences["before"])
    scene.queue.add(scene.sequences["before"])
    scene.queued("few", "many")
    scene.sequences["few"].max_tokens = 50
    scene.fill()
    scene.scheduler.withdraw(scene.sequences["before"])
    scene.fill()
    assert {name: each.max_tokens for name, each in scene.sequences.items()} == {
        "before": 100,
        "few": 50,
        "many": 50,
    }
    assert [each.degraded for each in scene.sequences.values()] == [[], [], [CAP]]


# --- turns ----------------------------------------------------------------------------------


def test_a_turn_is_taken_for_who_runs_or_to_trim_for_a_head_that_does_not_fit() -> None:
    scene = Scene(limit=ROW)
    assert not scene.batching.has_turn(1.0)
    scene.queued("a")
    scene.sequences["a"].max_tokens = ROW
    assert scene.batching.has_turn(1.0)
    assert scene.batching.plan(1.0).trim_caches
    assert not scene.batching.has_turn(1.0 + TRIM_INTERVAL_S - 0.01)
    assert scene.batching.has_turn(1.0 + TRIM_INTERVAL_S)
    scene.queue.remove(scene.sequences["a"])
    assert not scene.batching.has_turn(9.0), "nobody would gain"
    scene.queued("b")
    scene.fill()
    assert scene.batching.has_turn(9.0)


def test_caches_are_trimmed_once_in_a_while_under_pressure_and_each_time_in_need() -> None:
    scene = Scene()
    scene.queued("a")
    scene.fill()
    assert not scene.batching.plan(1.0).trim_caches
    scene.use(SOFT)
    trims = [scene.batching.plan(now).trim_caches for now in (2.0, 2.5, 3.0, 3.9)]
    assert trims == [True, False, True, False]
    scene.use(CRITICAL)
    assert scene.batching.plan(3.91).trim_caches
    assert scene.batching.plan(3.92).trim_caches


def test_a_batch_forms_from_when_there_is_room_or_somebody_to_use_it() -> None:
    scene = Scene(slots=1)
    scene.batching.room_since.engine_ready(5.0)
    scene.queued("before the engine", at=2.0)
    assert scene.fill(now=6.0).formation_s == 1.0
    scene.queued("behind", at=6.5)
    scene.fill(now=7.0)
    leaver = scene.sequences["before the engine"]
    leaver.left_at = 7.5
    scene.scheduler.withdraw(leaver)
    assert scene.fill(now=8.0).formation_s == 0.5
    scene.scheduler.withdraw(scene.sequences["behind"])
    scene.fill(now=9.0)
    scene.queued("last", at=11.0)
    assert scene.fill(now=11.25).formation_s == 0.25


# --- after a fault of the loop --------------------------------------------------------------


def test_after_a_fault_everybody_is_queued_again_but_who_would_miss_tokens() -> None:
    scene = Scene(slots=4)
    scene.queued("whole", "torn", "again", "ended", "concluded", "between")
    for name in ("whole", "torn", "again", "ended"):
        scene.queue.take(scene.sequences[name])
        scene.scheduler.enter(scene.sequences[name], now=1.0)
    scene.queue.take(scene.sequences["between"])
    scene.queue.take(scene.sequences["concluded"])
    scene.sequences["concluded"].concluded = True
    scene.sequences["torn"].produced.append(1)
    scene.sequences["again"].faults = FAULTS_MAX - 1
    scene.sequences["ended"].end(Ending.CANCELLED)
    scene.queued("waiting")
    scene.scheduler.abandon()
    scene.batching.take_back(scene.sequences.values())
    assert scene.waiting == "whole between waiting"
    assert {name: each.ending for name, each in scene.sequences.items() if each.ending} == {
        "torn": Ending.FAULT,
        "again": Ending.FAULT,
        "ended": Ending.CANCELLED,
    }
    assert [each.resumed for each in scene.sequences.values()] == [1, 0, 0, 0, 0, 0, 0]
    assert [each.faults for each in scene.sequences.values()] == [1, 1, 2, 0, 0, 1, 0]
    assert scene.sequences["whole"].stage is Stage.QUEUED


def test_a_choice_that_cannot_go_on_after_a_fault_ends_its_request() -> None:
    """The callers of the others get all their tokens, but one of this one's is missing."""
    scene = Scene()
    rows = make_sequence("r", choices=3, stage=Stage.QUEUED).rows
    rows[1].produced.append(7)
    scene.batching.take_back(rows)
    assert {row.ending for row in rows} == {Ending.FAULT}
    assert not any(row.is_batchable for row in rows)


def test_when_it_came_into_the_queue_is_known_of_who_is_in_it() -> None:
    sequence = make_sequence("a")
    with pytest.raises(AssertionError):
        queued_at_of(sequence)
    sequence.advance(Event.TOKENISED)
    sequence.queued_at = 3.0
    assert queued_at_of(sequence) == 3.0


@pytest.mark.parametrize(
    ("turn_s", "lead_s", "most"),
    [
        (0.002, 0.004, 3),
        (0.003, 0.004, 2),
        (0.004, 0.004, 2),
        (0.005, 0.004, 1),
        (0.002, 0.0, 1),
        (0.0, 0.004, TURNS_UNDER_WAY_MAX),
        (0.0, 0.0, 1),
    ],
)
def test_so_many_turns_are_begun_ahead_as_fit_into_the_lead(
    turn_s: float, lead_s: float, most: int
) -> None:
    scene = Scene(lead_s=lead_s)
    scene.queued("a")
    scene.batching.fill(1.0)
    assert scene.begun_after(make_report([("a", None)], residents={"a"}, seconds=turn_s)) == most


@pytest.mark.parametrize("what", ["prefill", "nothing"])
def test_nothing_begins_ahead_but_in_a_run_of_decode_steps(what: str) -> None:
    scene = Scene(lead_s=1.0)
    scene.queued("a")
    scene.batching.fill(1.0)
    prefilled = 5 if what == "prefill" else 0
    outputs = [("a", None)] if what == "prefill" else []
    last = make_report(outputs, residents={"a"}, seconds=0.001, prefilled=prefilled)  # type: ignore[arg-type]
    assert scene.begun_after(last) == 1


def test_nothing_begins_ahead_on_a_trial() -> None:
    scene = Scene(lead_s=1.0)
    scene.queued("a", "b")
    scene.batching.fill(1.0)
    for _ in range(2):
        scene.batching.plan(1.0)
        scene.scheduler.lost(blameless=False)
    assert scene.scheduler.is_on_trial
    last = make_report([("b", None)], residents={"b"}, seconds=0.001)
    assert scene.begun_after(last) == 1


@pytest.mark.parametrize(("waiting", "most"), [(False, 1), (True, 3)])
def test_where_all_are_about_to_end_a_turn_begins_ahead_for_who_waits_alone(
    *, waiting: bool, most: int
) -> None:
    scene = Scene(slots=1, lead_s=0.002)
    scene.queued("a")
    scene.sequences["a"].max_tokens = 1
    scene.batching.fill(1.0)
    if waiting:
        scene.queued("b")
    last = make_report([("a", None)], residents={"a"}, seconds=0.001)
    assert scene.begun_after(last) == most
