"""Who is in the batch, told as stories with every turn written out."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from support.factories import make_report, make_sequence

from trio_worker.core.memory import ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.scheduler import PREEMPTIONS_MAX, Delivery, Scheduler
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.core.trial import PROOF_TOKENS, SUSPECT_CRASHES
from trio_worker.protocol.prompt import Form
from trio_worker.protocol.turn import (
    Admit,
    FinishReason,
    Output,
    Prefill,
    RequestId,
    Sampling,
    SequenceFailure,
)


class SpokenBudget(PrefillBudget):
    """Says what it is asked and told, and always allows 100 tokens."""

    def __init__(self) -> None:
        super().__init__(chunk_max=512, gap_target_s=0.2)
        self.heard: list[tuple[Any, ...]] = []

    def restarted(self) -> None:
        super().restarted()
        if hasattr(self, "heard"):
            self.heard.append(("restarted",))

    def decoded(self, *, seconds: float) -> None:
        self.heard.append(("decoded", seconds))

    def prefilled(self, *, seconds: float, tokens: int, calls: int) -> None:
        self.heard.append(("prefilled", seconds, tokens, calls))

    def chunk(self, *, decoding: int, waiting: int, left: int) -> int:
        self.heard.append(("chunk", decoding, waiting, left))
        return 100


def make_scheduler(slots: int = 4, *, bytes_per_token: int = 1) -> Scheduler:
    ledger = ReservationLedger(limit_bytes=10**6)
    ledger.bytes_per_token = bytes_per_token
    return Scheduler(slots=slots, prefill=SpokenBudget(), ledger=ledger)


def heard(scheduler: Scheduler) -> list[tuple[Any, ...]]:
    budget = scheduler._prefill
    assert isinstance(budget, SpokenBudget)
    said, budget.heard = budget.heard, []
    return said


def enter(scheduler: Scheduler, *names: str, now: float = 0.0, level: int = 1) -> list[Sequence]:
    sequences = [make_sequence(each, level=level, stage=Stage.QUEUED) for each in names]
    for sequence in sequences:
        scheduler.enter(sequence, now=now)
    return sequences


def turn(scheduler: Scheduler, *names: str, now: float = 1.0) -> list[Delivery]:
    """A token for each of these; the others stay without one. Begins the turn if none has begun."""
    if not scheduler.turns_under_way:
        scheduler.plan()
    residents = {str(each) for each in scheduler._resident}
    report = make_report([(each, None) for each in names], residents=residents)
    return scheduler.book(report, now=now)


def state(scheduler: Scheduler) -> tuple[Any, ...]:
    """Who runs, free slots, bytes reserved, tokens in caches, whether there is work."""
    return (
        " ".join(scheduler.running),
        scheduler.free_slots,
        scheduler.ledger.reserved_bytes,
        scheduler.cached_tokens,
        scheduler.has_work,
    )


def test_the_numbers_of_the_rules() -> None:
    assert (SUSPECT_CRASHES, PROOF_TOKENS, PREEMPTIONS_MAX) == (2, 16, 2)


def test_a_life_in_the_batch_turn_by_turn() -> None:
    scheduler = make_scheduler()
    assert state(scheduler) == ("", 4, 0, 0, False)
    assert scheduler.removed == ()
    assert scheduler.shrunk is False
    (sequence,) = enter(scheduler, "a", now=5.0)
    assert (sequence.batched_at, sequence.stage) == (5.0, Stage.PREFILL)
    assert state(scheduler) == ("a", 3, 256, 0, True)
    sequence.prefilled = 2  # from another time in the batch
    work = scheduler.plan()
    assert work.admit == (
        Admit(
            request_id=RequestId("a"),
            prompt=(1, 2, 3),
            produced=(),
            max_tokens=100,
            sampling=Sampling(),
            stop=(),
        ),
    )
    assert (work.remove, work.prefill_tokens, work.trim_caches) == ((), 100, False)
    assert heard(scheduler) == [("chunk", 0, 1, 3)]
    scheduler.book(
        replace(
            make_report(residents={"a"}, seconds=0.3),
            prefills=(
                Prefill(request_id=RequestId("a"), done=2, total=3, cached=1),
                Prefill(request_id=RequestId("gone"), done=2, total=3),
            ),
            prefill_tokens=2,
            prefill_calls=1,
            prefill_seconds=0.25,
        ),
        now=6.0,
    )
    assert (sequence.prefilled, sequence.cached) == (2, 1)
    assert state(scheduler) == ("a", 3, 256, 2, True)
    work = scheduler.plan(trim_caches=True)
    assert (work.admit, work.trim_caches) == ((), True)
    assert heard(scheduler) == [("prefilled", 0.25, 2, 1), ("chunk", 0, 1, 1)]
    scheduler.book(make_report(prefills=[("a", 3, 3)], residents={"a"}), now=6.5)
    assert sequence.cached == 1, "what was cached once stays so"
    assert heard(scheduler) == [], "a turn without tokens says nothing of a step"
    assert (sequence.first_token_at, sequence.last_token_at) == (None, None)
    for now in (7.0, 8.0):
        scheduler.plan()
        turn(scheduler, "a", now=now)
    assert (sequence.first_token_at, sequence.last_token_at) == (7.0, 8.0)
    assert (sequence.produced, sequence.stage) == ([7, 7], Stage.DECODE)
    assert state(scheduler) == ("a", 3, 256, 5, True)
    assert heard(scheduler) == [
        *(("chunk", 0, 1, 0), ("decoded", 0.1), ("chunk", 1, 0, 0), ("decoded", 0.1))
    ]
    scheduler.plan()
    (last,) = scheduler.book(make_report([("a", FinishReason.STOP)], residents=set()), now=9.0)
    assert last.sequence is sequence
    assert isinstance(last.output, Output)
    assert last.output.finish is FinishReason.STOP
    assert state(scheduler) == ("", 4, 0, 0, False)
    assert scheduler.plan().remove == (), "who has finished has left by itself"


def test_each_choice_is_admitted_with_its_own_id_and_seed_and_the_form_of_the_prompt() -> None:
    scheduler = make_scheduler()
    form = Form(grammar="start: /a+/", finds_reasoning=True)
    for row in make_sequence("r", choices=2, stage=Stage.QUEUED).rows:
        row.form = form
        scheduler.enter(row, now=0.0)
    admits = scheduler.plan().admit
    assert [(each.request_id, each.sampling.seed) for each in admits] == [("r", 0), ("r.1", 1)]
    assert [each.form for each in admits] == [form, form]


def test_two_steps_in_a_turn_share_its_time() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "a")
    scheduler.plan()
    heard(scheduler)
    turn(scheduler, "a", "a")
    assert heard(scheduler) == [("decoded", 0.05)]


def test_under_pressure_there_are_half_the_slots_but_one_and_half_the_prefill_but_eight() -> None:
    for slots, half in ((1, 1), (2, 1), (5, 2), (8, 4)):
        scheduler = make_scheduler(slots)
        assert scheduler.slots_now == slots
        scheduler.shrunk = True
        assert (scheduler.slots_now, scheduler.free_slots) == (half, half)
    enter(scheduler, "a", "b", "c", "d")
    scheduler.shrunk = False
    assert scheduler.free_slots == 4
    enter(scheduler, "e")
    scheduler.shrunk = True
    assert scheduler.free_slots == 0, "never less than none"
    assert scheduler.plan().prefill_tokens == 50
    few = Scheduler(
        slots=2,
        prefill=PrefillBudget(chunk_max=12, gap_target_s=0.2),
        ledger=ReservationLedger(limit_bytes=0),
    )
    enter(few, "a")
    few.shrunk = True
    assert few.plan().prefill_tokens == 8


def test_before_the_model_is_loaded_everything_fits() -> None:
    scheduler = make_scheduler(1, bytes_per_token=0)
    enter(scheduler, "a")
    assert scheduler.ledger.reserved_bytes == 0


# --- who leaves ---------------------------------------------------------------------------------


def test_whoever_is_withdrawn_is_removed_by_the_next_plan_and_by_no_other() -> None:
    scheduler = make_scheduler()
    first, second = enter(scheduler, "a", "b")
    scheduler.plan()
    turn(scheduler, "a", "b")
    scheduler.withdraw(first)
    scheduler.withdraw(first)
    assert state(scheduler) == ("b", 3, 256, 1, True)
    assert scheduler.plan().remove == ("a",)
    assert turn(scheduler, "b")[0].sequence is second
    assert [*scheduler.removed] == [first]
    assert scheduler.plan().remove == ()
    turn(scheduler, "b")
    assert [*scheduler.removed] == []
    scheduler.withdraw(second)
    assert (scheduler.has_work, scheduler.free_slots) == (True, 4), "the engine still holds it"
    scheduler.plan()
    assert not scheduler.has_work


@pytest.mark.parametrize("finishes", [True, False])
def test_who_ends_in_the_engine_while_leaving_need_not_be_removed(*, finishes: bool) -> None:
    scheduler = make_scheduler()
    sequence, _ = enter(scheduler, "a", "b")
    scheduler.plan()
    scheduler.withdraw(sequence)
    report = make_report(
        [("a", FinishReason.LENGTH)] if finishes else [],
        failures=[] if finishes else ["a"],
        residents={"b"},
    )
    assert scheduler.book(report, now=1.0) == []
    assert scheduler.plan().remove == ()
    assert sequence.produced == []


def test_a_failure_is_handed_to_its_sequence_after_the_outputs() -> None:
    scheduler = make_scheduler()
    first, second = enter(scheduler, "a", "b")
    scheduler.plan()
    deliveries = scheduler.book(
        make_report([("b", None)], failures=["a"], residents={"b"}), now=1.0
    )
    assert [each.sequence for each in deliveries] == [second, first]
    assert deliveries[1].output == SequenceFailure(request_id=RequestId("a"), message="broken")
    assert state(scheduler) == ("b", 3, 256, 1, True)


# --- preemption ---------------------------------------------------------------------------------


def test_whose_slot_may_be_taken_and_who_is_least_urgent() -> None:
    scheduler = make_scheduler(8)
    assert scheduler.least_urgent() is None
    assert scheduler.victim_of(make_sequence("first", level=0)) is None

    def at(name: str, level: int, time: float) -> Sequence:
        sequence = make_sequence(name, level=level, at=time, stage=Stage.QUEUED)
        scheduler.enter(sequence, now=0.0)
        return sequence

    medium = at("medium", 1, 30.0)  # key 35
    low, later_low = at("low", 2, 0.0), at("later low", 2, 1.0)  # keys 10 and 11
    assert scheduler.least_urgent() is medium
    urgent = make_sequence("urgent", level=0, at=5.0)
    assert scheduler.victim_of(urgent) is medium, "the latest key, of whichever level"
    assert scheduler.victim_of(make_sequence("medium too", level=1, at=0.0)) is later_low
    for _ in range(PREEMPTIONS_MAX):
        assert scheduler.victim_of(make_sequence("medium too", level=1, at=0.0)) is later_low
        later_low.preempted += 1
    assert scheduler.victim_of(make_sequence("medium too", level=1, at=0.0)) is low
    assert scheduler.victim_of(make_sequence("low too", level=2, at=-9.0)) is None, "its own level"
    # QueueKey 11 is not later than key 11: who has waited its bound cannot be pushed aside.
    assert scheduler.victim_of(make_sequence("medium", level=1, at=5.5)) is None


def test_a_preempted_one_comes_back_with_its_tokens_and_its_first_entry() -> None:
    scheduler = make_scheduler(1)
    (sequence,) = enter(scheduler, "a", now=1.0)
    scheduler.plan()
    turn(scheduler, "a", now=2.0)
    scheduler.preempt(sequence)
    assert state(scheduler) == ("", 1, 0, 0, True)
    assert sequence.stage is Stage.QUEUED
    scheduler.enter(sequence, now=9.0)
    assert (sequence.batched_at, sequence.stage) == (1.0, Stage.PREFILL)
    sequence.prefilled = 3
    work = scheduler.plan()
    assert work.remove == ("a",)
    assert [(each.request_id, each.produced) for each in work.admit] == [("a", (7,))]
    assert sequence.prefilled == 0, "computed again"
    assert heard(scheduler)[-1] == ("chunk", 0, 1, 4), "with the token that it has"
    turn(scheduler, "a", now=10.0)
    assert (sequence.first_token_at, sequence.last_token_at) == (2.0, 10.0)


# --- losses of the engine -----------------------------------------------------------------------


def crash(scheduler: Scheduler, *, blameless: bool = False) -> list[tuple[Any, ...]]:
    return [(each.sequence.request_id, each.output) for each in scheduler.lost(blameless=blameless)]


def suspects(scheduler: Scheduler, *names: str) -> list[Sequence]:
    """These have been aboard of two crashes in a row."""
    sequences = enter(scheduler, *names)
    for _ in range(2):
        scheduler.plan()
        assert crash(scheduler) == []
    return sequences


def test_a_loss_costs_a_resumption_and_no_token() -> None:
    scheduler = make_scheduler()
    aboard, leaving = enter(scheduler, "a", "l")
    scheduler.plan()
    turn(scheduler, "a", "l")
    scheduler.withdraw(leaving)
    (late,) = enter(scheduler, "late")
    heard(scheduler)
    assert crash(scheduler) == []
    assert heard(scheduler) == [("restarted",)]
    assert (aboard.stage, aboard.resumed, aboard.crashes) == (Stage.RESUMING, 1, 1)
    assert (late.stage, late.resumed, late.crashes) == (Stage.PREFILL, 0, 0), "it was not aboard"
    assert state(scheduler) == ("a late", 2, 512, 0, True)
    work = scheduler.plan()
    assert work.remove == (), "the new engine holds nothing"
    assert [(each.request_id, each.produced) for each in work.admit] == [("a", (7,)), ("late", ())]
    assert (aboard.stage, aboard.prefilled) == (Stage.PREFILL, 0)
    # A loss before they are back in the engine is none of theirs.
    scheduler.lost(blameless=True)
    scheduler.lost(blameless=False)
    assert (aboard.resumed, aboard.crashes, aboard.stage) == (2, 1, Stage.RESUMING)
    assert scheduler.free_slots == 2


def test_the_newest_suspect_is_tried_first_and_nobody_joins_or_is_pushed_aside() -> None:
    scheduler = make_scheduler()
    old, new = suspects(scheduler, "old", "new")
    assert (scheduler.free_slots, scheduler.victim_of(make_sequence("u", level=0, at=-9.0))) == (
        *(0, None),
    )
    assert [each.crashes for each in (old, new)] == [2, 2]
    work = scheduler.plan()
    assert [each.request_id for each in work.admit] == ["new"]
    for count in range(1, PROOF_TOKENS):
        turn(scheduler, "new")
        assert scheduler.plan().admit == (), count
    turn(scheduler, "new")
    assert (new.crashes, old.crashes) == (0, 2)
    assert new.stage is Stage.RESUMING, "it waits until all have been tried"
    work = scheduler.plan()
    assert (work.remove, [each.request_id for each in work.admit]) == (("new",), ["old"])
    for _ in range(PROOF_TOKENS):
        turn(scheduler, "old")
        work = scheduler.plan()
    assert (work.remove, [each.request_id for each in work.admit]) == ((), ["new"])
    assert (old.crashes, scheduler.free_slots, old.stage) == (0, 2, Stage.DECODE)
    assert (new.resumed, old.resumed) == (2, 2), "a trial is no loss"


def test_the_proof_is_counted_from_the_tokens_that_a_suspect_has() -> None:
    scheduler = make_scheduler()
    (sequence,) = enter(scheduler, "a")
    scheduler.plan()
    for _ in range(5):
        turn(scheduler, "a")
    crash(scheduler)
    scheduler.plan()
    crash(scheduler)
    scheduler.plan()
    for _ in range(PROOF_TOKENS - 1):
        turn(scheduler, "a")
    assert (sequence.crashes, scheduler.free_slots) == (2, 0)
    turn(scheduler, "a")
    assert (sequence.crashes, scheduler.free_slots) == (0, 3)
    assert len(sequence.produced) == 5 + PROOF_TOKENS
    assert scheduler.plan().remove == (), "the last one tried stays where it is"


def test_the_proof_of_the_next_is_counted_from_the_tokens_that_it_has() -> None:
    scheduler = make_scheduler()
    (old,) = enter(scheduler, "old")
    scheduler.plan()
    for _ in range(5):
        turn(scheduler, "old")
    (new,) = enter(scheduler, "new")
    for _ in range(2):
        scheduler.plan()
        crash(scheduler)
    scheduler.plan()
    for _ in range(PROOF_TOKENS):
        turn(scheduler, "new")
    assert (new.crashes, old.crashes) == (0, 2)
    scheduler.plan()
    for _ in range(PROOF_TOKENS):
        assert old.crashes == 2
        turn(scheduler, "old")
    assert (old.crashes, len(old.produced)) == (0, 5 + PROOF_TOKENS)


def test_who_crashes_alone_fails_with_its_own_crashes_and_the_others_are_cleared() -> None:
    scheduler = make_scheduler()
    old, guilty = suspects(scheduler, "old", "guilty")
    scheduler.plan()
    assert crash(scheduler) == [
        (
            "guilty",
            SequenceFailure(
                request_id=RequestId("guilty"),
                message="the engine ended each time it computed this request, the last time alone",
            ),
        )
    ]
    assert (guilty.crashes, old.crashes) == (3, 0)
    assert (guilty.stage, guilty.resumed) == (Stage.RESUMING, 3)
    assert state(scheduler) == ("old", 3, 256, 0, True)
    assert [each.request_id for each in scheduler.plan().admit] == ["old"]


def test_a_crash_without_the_suspect_aboard_or_a_planned_loss_is_no_proof() -> None:
    scheduler = make_scheduler()
    _, new = suspects(scheduler, "old", "new")
    assert crash(scheduler) == [], "it was not in the engine yet"
    assert scheduler.free_slots == 0
    assert [each.request_id for each in scheduler.plan().admit] == ["new"]
    assert crash(scheduler, blameless=True) == []
    assert (new.crashes, new.resumed) == (2, 3)
    assert [each.request_id for each in scheduler.plan().admit] == ["new"]


@pytest.mark.parametrize("how", ["withdrawn", "finished", "failed"])
def test_a_suspect_that_leaves_hands_the_trial_on(how: str) -> None:
    scheduler = make_scheduler()
    _, middle, new = suspects(scheduler, "old", "middle", "new")
    scheduler.plan()
    if how == "withdrawn":
        scheduler.withdraw(new)
        assert new.stage is Stage.PREFILL, "where it goes is for its task to say"
        turn(scheduler)
    elif how == "finished":
        scheduler.book(make_report([("new", FinishReason.STOP)], residents=set()), now=1.0)
    else:
        scheduler.book(make_report(failures=["new"], residents=set()), now=1.0)
    assert new.crashes == 0
    work = scheduler.plan()
    assert work.remove == (("new",) if how == "withdrawn" else ())
    assert [each.request_id for each in work.admit] == ["middle"]
    # The proof of the next begins where that one is.
    for _ in range(PROOF_TOKENS):
        assert middle.crashes == 2
        turn(scheduler, "middle")
    assert middle.crashes == 0
    assert [each.request_id for each in scheduler.plan().admit] == ["old"]


def test_a_suspect_that_leaves_before_its_turn_changes_nothing_for_the_one_being_tried() -> None:
    scheduler = make_scheduler()
    old, new = suspects(scheduler, "old", "new")
    scheduler.plan()
    for _ in range(PROOF_TOKENS - 1):
        turn(scheduler, "new")
    scheduler.withdraw(old)
    assert scheduler.plan().remove == ()
    turn(scheduler, "new")
    assert (new.crashes, new.stage, scheduler.free_slots) == (0, Stage.DECODE, 3)


def test_two_of_three_crashes_are_not_two_in_a_row_of_those_that_came_between() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "old")
    scheduler.plan()
    crash(scheduler)
    (young,) = enter(scheduler, "young")
    scheduler.plan()
    crash(scheduler)
    assert young.crashes == 1
    assert [each.request_id for each in scheduler.plan().admit] == ["old"], "the only suspect"
    assert young.stage is Stage.RESUMING
    young.advance(Event.END)
    scheduler.withdraw(young)
    assert scheduler.plan().remove == ()


# --- several turns under way ----------------------------------------------------------------


def test_a_turn_begun_ahead_knows_nothing_of_what_is_under_way() -> None:
    scheduler = make_scheduler()
    first, second = enter(scheduler, "a", "b")
    scheduler.plan()
    turn(scheduler, "a", "b")
    scheduler.plan()
    assert scheduler.plan().admit == ()
    assert scheduler.turns_under_way == 2
    scheduler.withdraw(first)
    (third,) = enter(scheduler, "c")
    work = scheduler.plan()
    assert (work.remove, [each.request_id for each in work.admit]) == (("a",), ["c"])
    # The first two turns are done before the one that removes it and lets the other in.
    for _ in range(2):
        report = make_report([("a", None), ("b", None)], residents={"a", "b"})
        assert [each.sequence for each in scheduler.book(report, now=2.0)] == [second]
    report = make_report([("b", None), ("c", None)], residents={"b", "c"})
    assert [each.sequence for each in scheduler.book(report, now=3.0)] == [second, third]
    assert (len(first.produced), len(second.produced), len(third.produced)) == (1, 4, 1)
    assert scheduler.turns_under_way == 0


@pytest.mark.parametrize("end", ["token", "finish", "failure"])
def test_what_comes_before_the_turn_that_admits_it_is_another_s(end: str) -> None:
    """A new request with the id of one that has left, or one that was preempted and is back."""
    scheduler = make_scheduler()
    (old,) = enter(scheduler, "a")
    scheduler.plan()
    turn(scheduler, "a")
    scheduler.plan()
    scheduler.withdraw(old)
    (new,) = enter(scheduler, "a")
    work = scheduler.plan()
    assert (work.remove, [each.request_id for each in work.admit]) == (("a",), ["a"])
    if end == "failure":
        report = make_report(failures=["a"], residents=set())
    else:
        report = make_report(
            [("a", FinishReason.STOP if end == "finish" else None)],
            residents=set() if end == "finish" else {"a"},
        )
    assert scheduler.book(report, now=2.0) == []
    assert (old.produced, new.produced) == ([7], [])
    report = make_report([("a", None)], residents={"a"})
    assert [each.sequence for each in scheduler.book(report, now=3.0)] == [new]
    assert state(scheduler) == ("a", 3, 256, 1, True)


def test_who_ends_in_a_turn_gets_nothing_of_the_next_and_is_not_removed() -> None:
    scheduler = make_scheduler()
    enter(scheduler, "a", "b")
    scheduler.plan()
    turn(scheduler, "a", "b")
    scheduler.plan()
    scheduler.plan()
    report = make_report([("a", FinishReason.STOP), ("b", None)], residents={"b"})
    assert len(scheduler.book(report, now=2.0)) == 2
    assert state(scheduler)[0] == "b"
    assert scheduler.plan().remove == ()
    for _ in range(2):
        scheduler.book(make_report([("b", None)], residents={"b"}), now=3.0)
    with pytest.raises(AssertionError, match="the engine holds"):
        scheduler.plan()
        scheduler.book(make_report([("b", None)], residents={"a", "b"}), now=4.0)


def test_a_turn_begins_ahead_only_if_somebody_outlasts_what_is_under_way() -> None:
    scheduler = make_scheduler()
    short, long = enter(scheduler, "s", "l")
    short.max_tokens, long.max_tokens = 2, 3
    outlasts = []
    for _ in range(4):
        outlasts.append(scheduler.outlasts_what_is_under_way)
        scheduler.plan()
    assert outlasts == [True, True, True, False]
    scheduler.lost(blameless=True)
    assert scheduler.turns_under_way == 0


def test_it_says_that_a_trial_is_on() -> None:
    scheduler = make_scheduler()
    assert not scheduler.is_on_trial
    suspects(scheduler, "old", "new")
    assert scheduler.is_on_trial
