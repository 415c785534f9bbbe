"""Who is in the batch, one rule at a time."""

from __future__ import annotations

import pytest
from support.factories import make_report, make_sequence

from trio_worker.core.memory import ReservationLedger
from trio_worker.core.prefill import CHUNK_FIRST, PrefillBudget
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.core.trial import PROOF_TOKENS
from trio_worker.protocol.turn import FinishReason, Output, RequestId


def make_scheduler(slots: int = 4) -> Scheduler:
    return Scheduler(
        slots=slots,
        prefill=PrefillBudget(chunk_max=64, gap_target_s=0.2),
        ledger=ReservationLedger(limit_bytes=0),
    )


def enter(scheduler: Scheduler, *request_ids: str) -> list[Sequence]:
    sequences = [make_sequence(each, stage=Stage.QUEUED) for each in request_ids]
    for sequence in sequences:
        scheduler.enter(sequence, now=0.0)
    return sequences


def admitted(scheduler: Scheduler) -> list[str]:
    return [each.request_id for each in scheduler.plan().admit]


def test_a_turn_admits_books_and_finishes() -> None:
    scheduler = make_scheduler()
    (sequence,) = enter(scheduler, "a")
    work = scheduler.plan()
    assert [each.request_id for each in work.admit] == ["a"]
    assert work.admit[0].prompt == (1, 2, 3)
    scheduler.book(make_report(prefills=[("a", 3, 3)], residents={"a"}), now=1.0)
    assert sequence.prefilled == 3
    assert scheduler.plan().admit == ()
    (delivery,) = scheduler.book(make_report([("a", None)], residents={"a"}), now=2.0)
    assert delivery.sequence is sequence
    assert sequence.first_token_at == 2.0
    assert sequence.stage is Stage.DECODE
    scheduler.plan()
    scheduler.book(make_report([("a", FinishReason.STOP)], residents=set()), now=3.0)
    assert not scheduler.has_work
    assert sequence.produced == [7, 7]


def test_a_withdrawn_sequence_leaves_with_the_next_plan_and_gets_nothing_more() -> None:
    scheduler = make_scheduler()
    first, second = enter(scheduler, "a", "b")
    scheduler.plan()
    scheduler.withdraw(first)
    assert scheduler.free_slots == 3
    deliveries = scheduler.book(
        make_report([("a", None), ("b", None)], residents={"a", "b"}), now=1
    )
    assert [each.sequence for each in deliveries] == [second]
    assert scheduler.plan().remove == (RequestId("a"),)
    scheduler.book(make_report([("b", None)], residents={"b"}), now=2)


def test_a_sequence_withdrawn_before_its_first_plan_is_never_admitted() -> None:
    scheduler = make_scheduler()
    (sequence,) = enter(scheduler, "a")
    scheduler.withdraw(sequence)
    assert not scheduler.has_work


def test_an_id_may_come_again_while_its_predecessor_is_still_resident() -> None:
    scheduler = make_scheduler()
    (first,) = enter(scheduler, "a")
    scheduler.plan()
    scheduler.withdraw(first)
    scheduler.book(make_report([("a", None)], residents={"a"}), now=1)
    (second,) = enter(scheduler, "a")
    work = scheduler.plan()
    assert work.remove == ("a",)
    assert [each.request_id for each in work.admit] == ["a"]
    (delivery,) = scheduler.book(make_report([("a", None)], residents={"a"}), now=2)
    assert delivery.sequence is second
    assert first.produced == []


def test_an_engine_that_holds_something_else_is_a_fault() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "a")
    scheduler.plan()
    with pytest.raises(AssertionError, match="the engine holds"):
        scheduler.book(make_report(residents={"a", "ghost"}), now=1)


def test_after_a_loss_everybody_comes_back_with_the_tokens_they_have() -> None:
    scheduler = make_scheduler()
    first, _ = enter(scheduler, "a", "b")
    scheduler.plan()
    scheduler.book(make_report([("a", None)], residents={"a", "b"}), now=1)
    assert scheduler.lost(blameless=False) == []
    stages = [first.stage]
    work = scheduler.plan()
    stages.append(first.stage)
    assert stages == [Stage.RESUMING, Stage.PREFILL]
    assert [each.request_id for each in work.admit] == ["a", "b"]
    assert work.admit[0].produced == (7,)
    assert first.resumed == 1


def crash(scheduler: Scheduler) -> list[str]:
    return [each.sequence.request_id for each in scheduler.lost(blameless=False)]


def test_suspects_are_tried_alone_newest_first_and_only_the_guilty_fails() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "old", "guilty", "new")
    for _ in range(2):
        assert admitted(scheduler) == ["old", "guilty", "new"]
        assert crash(scheduler) == []
    assert scheduler.free_slots == 0, "nobody joins a trial"
    assert admitted(scheduler) == ["new"]
    for _ in range(PROOF_TOKENS):
        scheduler.book(make_report([("new", None)], residents={"new"}), now=1)
        work = scheduler.plan()
    assert [each.request_id for each in work.admit] == ["guilty"]
    assert work.remove == ("new",), "the acquitted one waits until all have been tried"
    assert crash(scheduler) == ["guilty"]
    assert admitted(scheduler) == ["old", "new"]
    assert scheduler.free_slots == 2


def test_a_suspect_that_is_withdrawn_makes_way_for_the_next() -> None:
    scheduler = make_scheduler()
    _, new = enter(scheduler, "old", "new")
    for _ in range(2):
        scheduler.plan()
        crash(scheduler)
    assert admitted(scheduler) == ["new"]
    new.advance(Event.END)
    scheduler.withdraw(new)
    scheduler.book(make_report([("new", None)], residents={"new"}), now=1)
    work = scheduler.plan()
    assert work.remove == ("new",)
    assert [each.request_id for each in work.admit] == ["old"]


def test_a_planned_restart_makes_nobody_a_suspect() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "a")
    for _ in range(5):
        assert admitted(scheduler) == ["a"]
        scheduler.lost(blameless=True)
    assert scheduler.free_slots == 3


def test_a_failure_takes_out_one_sequence() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "a", "b")
    scheduler.plan()
    deliveries = scheduler.book(make_report([("a", None)], failures=["b"], residents={"a"}), now=1)
    assert [isinstance(each.output, Output) for each in deliveries] == [True, False]
    assert set(scheduler.running) == {"a"}


def test_the_victim_is_the_latest_of_the_less_urgent_and_only_twice() -> None:
    scheduler = make_scheduler(slots=3)
    sequences = [
        make_sequence("medium", level=1, at=0, stage=Stage.QUEUED),
        make_sequence("early low", level=2, at=0, stage=Stage.QUEUED),
        make_sequence("late low", level=2, at=1, stage=Stage.QUEUED),
    ]
    for sequence in sequences:
        scheduler.enter(sequence, now=0)
    urgent = make_sequence("urgent", level=0, at=2)
    victim = scheduler.victim_of(urgent)
    assert victim is sequences[2]
    victim.preempted = 2
    assert scheduler.victim_of(urgent) is sequences[1]
    assert scheduler.victim_of(make_sequence("peer", level=2, at=2)) is None
    assert scheduler.victim_of(make_sequence("too late", level=0, at=100)) is None


def test_a_preempted_sequence_comes_back_with_its_tokens_and_its_reservation_is_free() -> None:
    ledger = ReservationLedger(limit_bytes=1000)
    ledger.bytes_per_token = 1
    scheduler = Scheduler(
        slots=1, prefill=PrefillBudget(chunk_max=64, gap_target_s=0.2), ledger=ledger
    )
    (sequence,) = enter(scheduler, "a")
    assert ledger.reserved_bytes == 256
    scheduler.plan()
    scheduler.book(make_report([("a", None)], residents={"a"}), now=1)
    scheduler.preempt(sequence)
    assert ledger.reserved_bytes == 0
    assert sequence.stage is Stage.QUEUED
    assert scheduler.plan().remove == ("a",)
    scheduler.book(make_report(residents=set()), now=2)
    scheduler.enter(sequence, now=3)
    assert sequence.batched_at == 0.0
    assert scheduler.plan().admit[0].produced == (7,)


def test_one_preempted_and_taken_back_at_once_is_removed_and_admitted_in_one_turn() -> None:
    scheduler = make_scheduler(slots=1)
    (sequence,) = enter(scheduler, "a")
    scheduler.plan()
    scheduler.preempt(sequence)
    scheduler.enter(sequence, now=1)
    work = scheduler.plan()
    assert work.remove == ("a",)
    assert [each.request_id for each in work.admit] == ["a"]
    scheduler.book(make_report(residents={"a"}), now=1)


def test_under_pressure_half_the_slots_and_half_the_prefill() -> None:
    scheduler = make_scheduler(slots=5)
    enter(scheduler, "a", "b", "c")
    assert scheduler.plan().prefill_tokens == CHUNK_FIRST
    scheduler.shrunk = True
    assert scheduler.free_slots == 0
    assert scheduler.plan().prefill_tokens == CHUNK_FIRST // 2
