"""The decisions, each by itself: no loop, no clock."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.factories import Scope, make_report, make_sequence

from trio_worker.core.admission import Admission
from trio_worker.core.formation import Formation, Trigger, Wait
from trio_worker.core.memory import (
    MB,
    DegradationStep,
    MemoryReading,
    Pressure,
    PressureGauge,
    ReservationLedger,
)
from trio_worker.core.prefill import CHUNK_FIRST, CHUNK_MIN, PrefillBudget
from trio_worker.core.priority import level_of, name_of
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import (
    TRANSITIONS,
    Ending,
    Event,
    Sequence,
    Stage,
    queue_key,
)
from trio_worker.core.trial import PROOF_TOKENS
from trio_worker.errors import (
    DuplicateRequest,
    QueueFull,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.monitoring.counters import Samples, Throughput
from trio_worker.protocol.turn import EngineMemory, FinishReason, Output, Report, RequestId
from trio_worker.supervisor.load_patience import LoadPatience
from trio_worker.wire import subjects

# --- life cycle ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "event"), list(itertools.product(Stage, Event)), ids=lambda each: each.name
)
def test_the_life_cycle_goes_along_its_table_and_nowhere_else(stage: Stage, event: Event) -> None:
    sequence = make_sequence()
    sequence.stage = stage
    if (stage, event) in TRANSITIONS:
        sequence.advance(event)
        assert sequence.stage is TRANSITIONS[stage, event]
    else:
        with pytest.raises(AssertionError):
            sequence.advance(event)
        assert sequence.stage is stage


def test_only_the_first_reason_to_end_counts_and_none_after_the_end() -> None:
    sequence = make_sequence()
    scope = sequence.scope
    assert isinstance(scope, Scope)
    sequence.end(Ending.CANCELLED)
    sequence.end(Ending.DRAINING)
    assert sequence.ending is Ending.CANCELLED
    assert scope.reasons == ["cancelled"]
    ended = make_sequence()
    ended.advance(Event.END)
    ended.end(Ending.CANCELLED)
    assert ended.ending is None


# --- the queue's order --------------------------------------------------------------------

_arrivals = st.lists(
    st.tuples(st.floats(0, 20, allow_nan=False), st.integers(0, 3)), min_size=1, max_size=40
)


@given(_arrivals)
def test_the_queue_serves_as_a_sorted_list_would(arrivals: list[tuple[float, int]]) -> None:
    queue = RequestQueue(max_size=len(arrivals))
    sequences = [
        make_sequence(str(index), level=level, at=at) for index, (at, level) in enumerate(arrivals)
    ]
    for sequence in sequences:
        queue.add(sequence)
    removed = sequences[::3]
    for sequence in removed:
        assert queue.remove(sequence)
        assert not queue.remove(sequence)
    expected = sorted((each for each in sequences if each not in removed), key=lambda s: s.key)
    assert sum(queue.by_level().values()) == len(queue) == len(expected)
    assert [queue.take() for _ in range(len(queue))] == expected


@given(_arrivals, st.floats(0.1, 10))
def test_the_least_urgent_is_overtaken_only_by_arrivals_within_the_bound(
    arrivals: list[tuple[float, int]], aging_s: float
) -> None:
    """The bound is (levels - 1) × aging: the reason why nobody starves."""
    levels = 4
    keys = sorted(
        (queue_key(enqueued_at=at, level=level, aging_s=aging_s, arrival=index), at, level)
        for index, (at, level) in enumerate(arrivals)
    )
    for position, (_, at, level) in enumerate(keys):
        if level == levels - 1:
            for _, earlier_at, _ in keys[:position]:
                assert earlier_at <= at + (levels - 1) * aging_s + 1e-9


def test_without_aging_levels_are_strict() -> None:
    early_low = queue_key(enqueued_at=0, level=2, aging_s=None, arrival=0)
    late_high = queue_key(enqueued_at=1000, level=0, aging_s=None, arrival=1)
    assert late_high < early_low


def test_taking_past_a_more_urgent_one_counts_as_a_promotion() -> None:
    queue = RequestQueue(max_size=4)
    queue.add(make_sequence("old low", level=2, at=0, aging_s=1))
    queue.add(make_sequence("new high", level=0, at=10, aging_s=1))
    assert queue.take().request_id == "old low"
    assert queue.promotions == 1
    queue.take()
    assert queue.promotions == 1


def test_names_of_levels() -> None:
    assert [level_of(name, 3) for name in ("high", "medium", "low")] == [0, 1, 2]
    assert [name_of(level, 5) for level in range(5)] == ["high", "1", "medium", "3", "low"]
    assert name_of(0, 1) == "high"


# --- admission ----------------------------------------------------------------------------


def reading(used: int) -> MemoryReading:
    return MemoryReading(used=used, available=10**9, total=10**9)


def make_admission(
    *, max_depth: int = 4, slots: int = 2, reject: bool = True, enabled: bool = True
) -> Admission:
    admission = Admission(
        queue_enabled=enabled,
        max_depth=max_depth,
        reject_when_full=reject,
        slots=slots,
        refuse_unmeetable=True,
        gauge=PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB),
        queue=RequestQueue(max_size=max_depth + slots),
        rate=ServiceRate(),
        arrivals=ArrivalRate(),
    )
    admission.engine_ready = True
    return admission


def admit(admission: Admission, request_id: str) -> Sequence | WorkerError:
    sequence = make_sequence(request_id)
    refusal = admission.refusal(sequence)
    if refusal is not None:
        return refusal
    admission.enter(sequence)
    return sequence


def test_each_thing_that_speaks_against_a_request_has_its_code() -> None:
    admission = make_admission(max_depth=1)
    assert isinstance(admit(admission, "a"), Sequence)
    assert isinstance(admit(admission, "a"), DuplicateRequest)
    assert isinstance(admit(admission, "b"), QueueFull)
    admission.gauge.read(reading(300 * MB))
    refusal = admit(admission, "c")
    assert isinstance(refusal, ResourceLimitExceeded)
    assert refusal.message == "Worker at capacity (memory: 300 MB)"
    admission.draining = True
    assert isinstance(admit(admission, "d"), WorkerDraining)


def test_a_place_is_held_until_the_batch_or_the_end() -> None:
    admission = make_admission(max_depth=1)
    first = admit(admission, "a")
    assert isinstance(first, Sequence)
    full = [admission.is_full]
    assert admission.batched(first) is None
    assert admission.depth == 0
    second = admit(admission, "b")
    assert isinstance(second, Sequence)
    admission.leave(second)
    full.append(admission.is_full)
    assert full == [True, False]
    assert set(admission.in_flight) == {"a"}


def test_who_waits_for_a_place_gets_it_in_the_order_of_the_queue() -> None:
    admission = make_admission(max_depth=1, reject=False)
    holder = admit(admission, "holder")
    assert isinstance(holder, Sequence)
    low, high = make_sequence("low", level=2), make_sequence("high", level=0)
    admission.enter(low)
    assert low.stage is Stage.WAITING
    assert isinstance(admit(admission, "one too many"), QueueFull), "as many may wait as hold"
    admission.leave(low)
    for sequence in (make_sequence("low", level=2),):
        admission.enter(sequence)
    admission._max_waiting = 2
    admission.enter(high)
    assert admission.batched(holder) is high
    assert high.stage is Stage.TOKENISING
    assert admission.depth == 1


def test_accepting_ends_before_the_queue_is_full_and_comes_back_at_half() -> None:
    admission = make_admission(max_depth=8, slots=2)
    sequences = []
    states = []
    for index in range(8):
        sequence = admit(admission, str(index))
        assert isinstance(sequence, Sequence)
        sequences.append(sequence)
        states.append(admission.assess())
    assert states == [True] * 5 + [False] * 3, "8 places less a batch of 2"
    for sequence in sequences:
        admission.leave(sequence)
        states.append(admission.assess())
    assert states[8:] == [False] * 4 + [True] * 4, "back at half of 6"


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abe")), max_size=80))
def test_places_never_exceed_the_bound(steps: list[tuple[int, str]]) -> None:
    admission = make_admission(max_depth=3, reject=False)
    alive: dict[str, Sequence] = {}
    for number, step in steps:
        request_id = str(number)
        if step == "a" and request_id not in alive:
            outcome = admit(admission, request_id)
            if isinstance(outcome, Sequence):
                alive[request_id] = outcome
        elif step == "b" and request_id in alive:
            if alive[request_id].stage is Stage.TOKENISING:
                admission.batched(alive[request_id])
        elif step == "e" and request_id in alive:
            admission.leave(alive.pop(request_id))
        waiting = [each for each in alive.values() if each.stage is Stage.WAITING]
        assert admission.depth <= 3
        assert admission.waiting == len(waiting) <= 3
        assert not waiting or admission.is_full
        assert set(admission.in_flight) == set(alive)


# --- rates, formation, prefill, pressure --------------------------------------------------


def test_nothing_is_estimated_before_eight_completions_and_within_bounds_after() -> None:
    rate = ServiceRate()
    for _ in range(7):
        rate.record(4.0)
        assert rate.retry_after_ms(waiting=100, slots=1) == 1000
    rate.record(4.0)
    assert rate.retry_after_ms(waiting=0, slots=8) == 500
    assert rate.retry_after_ms(waiting=100_000, slots=1) == 60_000
    for _ in range(64):
        rate.record(0.0001)
    assert rate.retry_after_ms(waiting=0, slots=8) == 50


@pytest.mark.parametrize(
    ("waiting", "now", "gap", "adaptive", "expected"),
    [
        (4, 0.0, None, True, Trigger.SIZE),
        (1, 1.0, None, True, Trigger.TIMEOUT),
        (1, 0.0, None, True, Wait(until=1.0, trigger=Trigger.TIMEOUT)),
        (1, 0.0, 5.0, True, Trigger.SINGLE),
        (1, 0.0, 5.0, False, Wait(until=1.0, trigger=Trigger.TIMEOUT)),
        (1, 0.0, 0.1, True, Wait(until=0.2, trigger=Trigger.SINGLE)),
        (1, 0.9, 0.1, True, Wait(until=1.0, trigger=Trigger.TIMEOUT)),
    ],
)
def test_how_long_an_idle_engine_waits(
    *, waiting: int, now: float, gap: float | None, adaptive: bool, expected: Trigger | Wait
) -> None:
    formation = Formation(min_batch_size=4, timeout_s=1.0, adaptive=adaptive)
    assert formation.decide(now=now, waiting=waiting, first_at=0.0, mean_gap_s=gap) == expected


MUCH = 10**6
"""More tokens than could be prefilled at once."""


def beside_seven(budget: PrefillBudget, *, left: int = MUCH) -> int:
    """What one may prefill in a turn while seven decode."""
    return budget.chunk(decoding=7, waiting=1, left=left)


def measured_budget(*, fixed_s: float, token_s: float, decode_s: float = 0.1) -> PrefillBudget:
    """After enough turns of an engine with these costs, seven requests decoding beside one."""
    budget = PrefillBudget(chunk_max=512, gap_target_s=0.2)
    budget.decoded(seconds=decode_s)
    for number in range(30):
        chunk = beside_seven(budget) + number % 3
        budget.prefilled(seconds=fixed_s + token_s * chunk, tokens=chunk, calls=1)
    return budget


def test_the_chunk_is_what_fits_between_a_decode_step_and_the_gap_target() -> None:
    assert (
        PrefillBudget(chunk_max=512, gap_target_s=0.2).chunk(decoding=0, waiting=8, left=MUCH) == 32
    )
    budget = measured_budget(fixed_s=0.0, token_s=0.0005)
    assert 180 <= beside_seven(budget) <= 200, "(0.2 - 0.1) s at 0.5 ms a token"
    budget = measured_budget(fixed_s=0.04, token_s=0.001)
    assert 50 <= beside_seven(budget) <= 70, "(0.2 - 0.1 - 0.04) s at 1 ms"


def test_a_fixed_cost_that_cannot_be_avoided_is_made_worth_while() -> None:
    budget = measured_budget(fixed_s=0.1, token_s=0.001)
    assert 80 <= beside_seven(budget) <= 110, "as much for tokens as is fixed"


@pytest.mark.parametrize("seed", range(6))
def test_a_growing_context_is_not_mistaken_for_a_fixed_cost(seed: int) -> None:
    """Its tokens cost more and more, and noise tilts the fitted line any way it likes."""
    budget, random = PrefillBudget(chunk_max=512, gap_target_s=0.2), Random(seed)
    budget.decoded(seconds=0.08)
    gaps, done = [], 0
    while done < 4_000:
        chunk = beside_seven(budget)
        took_s = (0.04 + chunk * (0.001 + 2e-6 * done)) * random.uniform(0.8, 1.2)
        budget.prefilled(seconds=took_s, tokens=chunk, calls=1)
        gaps.append(0.08 + took_s)
        done += chunk
    assert max(gaps) < 0.5


def test_a_slow_engine_gets_the_least_chunk_and_a_restarted_one_the_first() -> None:
    budget = measured_budget(fixed_s=0.0, token_s=0.1)
    assert beside_seven(budget) == CHUNK_MIN
    budget.restarted()
    assert beside_seven(budget) == CHUNK_FIRST


def test_while_more_wait_than_decode_prefill_gets_more_time_and_alone_a_second() -> None:
    budget = measured_budget(fixed_s=0.0, token_s=0.002)
    few, many = (budget.chunk(decoding=each, waiting=8 - each, left=MUCH) for each in (7, 1))
    assert 45 <= few <= 52
    assert many == min(4 * budget._largest, 350), "four times the gap, less the decode step"
    assert budget.chunk(decoding=0, waiting=8, left=MUCH) == min(4 * budget._largest, 500)


def test_the_last_of_what_anybody_waits_for_is_prefilled_at_once() -> None:
    budget = measured_budget(fixed_s=0.04, token_s=0.004)
    assert beside_seven(budget) < 20
    assert 45 <= beside_seven(budget, left=45) <= 80


def test_calls_of_the_model_are_not_taken_for_slow_tokens() -> None:
    one, two = (PrefillBudget(chunk_max=512, gap_target_s=0.2) for _ in range(2))
    for budget, calls in ((one, 1), (two, 2)):
        budget.decoded(seconds=0.08)
        for tokens in (32, 8, 16):
            seconds = calls * (0.04 + 0.004 * tokens)
            budget.prefilled(seconds=seconds, tokens=calls * tokens, calls=calls)
    assert beside_seven(one) == beside_seven(two) > 10


def test_the_batch_of_every_step_of_a_turn_is_known() -> None:
    def outputs(*request_ids: str) -> tuple[Output, ...]:
        return tuple(Output(request_id=RequestId(each), token=1, text="") for each in request_ids)

    def sizes(*request_ids: str) -> tuple[int, ...]:
        return Report(
            outputs=outputs(*request_ids),
            prefills=(),
            failures=(),
            residents=frozenset(),
            memory=EngineMemory(active=0, cache=0),
            seconds=0.0,
            prefill_tokens=0,
            prefill_calls=0,
            prefill_seconds=0.0,
        ).batch_sizes

    assert sizes() == ()
    assert sizes("a", "b", "c") == (3,)
    assert sizes("a", "b", "a", "b", "new") == (3, 2)


def test_a_first_load_may_be_silent_for_long_and_a_further_one_for_some_times_its_length() -> None:
    patience = LoadPatience(turn_timeout_s=3.0)
    patience.begun(now=100.0)
    assert patience.patience_s == 600.0
    patience.stepped(now=101.0)
    patience.prewarming()
    assert (patience.step, patience.patience_s) == ("prewarm", 30.0)
    patience.loaded(now=110.0)
    patience.begun(now=200.0)
    assert (patience.step, patience.patience_s) == ("load", 50.0)
    patience.loaded(now=201.0)
    patience.begun(now=300.0)
    assert patience.patience_s == 50.0, "of the longest"


def test_a_download_makes_no_later_load_last_as_long() -> None:
    patience = LoadPatience(turn_timeout_s=3.0)
    patience.begun(now=100.0)
    for step_at in (102.0, 700.0, 1_100.0):  # downloads, converts, loads
        patience.stepped(now=step_at)
        assert patience.patience_s == 600.0
    patience.loaded(now=1_108.0)
    patience.begun(now=2_000.0)
    assert patience.patience_s == 50.0, "(2 + 8) s, five times"
    patience.loaded(now=2_000.1)
    quick = LoadPatience(turn_timeout_s=3.0)
    quick.loaded(now=0.5)
    quick.begun(now=1.0)
    assert quick.patience_s == 20.0, "the least"


def test_pressure_rises_at_a_limit_and_falls_only_clearly_below_it() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    levels = []
    for used in [50, 100, 96, 94, 200, 150, 101, 99, 100, 96]:
        gauge.read(reading(used))
        levels.append(gauge.level.value)
    assert levels == (
        ["normal", "soft", "soft", "normal"] + ["critical"] * 3 + ["normal", "soft", "soft"]
    ), "critical is left only below the soft limit"


def test_the_steps_of_degradation_begin_and_end_in_their_order() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    seen: list[list[str]] = []
    for used in [*range(90, 210, 2), *range(210, 90, -2)]:
        gauge.read(reading(used))
        steps = [step.value for step in DegradationStep if step in gauge.steps]
        if not seen or seen[-1] != steps:
            seen.append(steps)
    order = ["trim_caches", "hold_low", "shrink_batch", "cap_tokens"]
    assert seen == [order[:count] for count in (0, 1, 2, 3, 4, 3, 2, 1, 0)]


def test_a_step_does_not_flap_around_its_beginning() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    for used in (126, 124, 126, 121):
        gauge.read(reading(used))
        assert DegradationStep.HOLD_LOW in gauge.steps
    gauge.read(reading(119))
    assert DegradationStep.HOLD_LOW not in gauge.steps


def test_what_the_engine_counts_is_pressure_too_and_so_is_a_machine_without_memory() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    gauge.read_engine(250)
    assert gauge.level is Pressure.CRITICAL
    gauge.read_engine(10)
    assert gauge.level.value == "normal"
    gauge.read(MemoryReading(used=10, available=19, total=1000))
    assert gauge.level is Pressure.CRITICAL
    gauge.read(MemoryReading(used=10, available=39, total=1000))
    assert gauge.level is Pressure.CRITICAL
    gauge.read(MemoryReading(used=10, available=40, total=1000))
    assert gauge.level.value == "normal"


def test_the_ledger_promises_what_is_left_beside_everything_else() -> None:
    ledger = ReservationLedger(limit_bytes=5000)
    assert ledger.need(prompt=50, max_tokens=100) == 0, "nothing is known before the model is"
    ledger.bytes_per_token = 2
    small, large = (ledger.need(prompt=1, max_tokens=size) for size in (100, 256))
    assert (small, large) == (512, 1024), "in granules of 256 tokens"
    ledger.reconcile(used=2000, cached_tokens=0)
    ledger.reserve(RequestId("a"), small)
    ledger.reserve(RequestId("b"), large)
    assert ledger.reserved_bytes == 2048, "all rows are as long as the longest"
    assert not ledger.fits(large)
    assert ledger.fits(large, instead_of=RequestId("a"))
    assert ledger.fits(4096) is False
    ledger.reconcile(used=2100, cached_tokens=100)
    assert ledger.fits(small) is (1900 + 3 * 1024 <= 5000)
    ledger.release(RequestId("b"))
    ledger.release(RequestId("b"))
    assert ledger.reserved_bytes == 512
    ledger.reconcile(used=4900, cached_tokens=0)
    assert not ledger.fits(small)
    assert ledger.room_ever() == 3100
    assert ledger.fits_ever(3100)
    assert not ledger.fits_ever(3101)


def test_a_deadline_that_cannot_be_met_is_refused_with_an_estimate() -> None:
    admission = make_admission(max_depth=40, slots=2)
    for service_s in (4.0, 2.0) * 8:
        admission.rate.record(service_s)
    for index in range(20):
        waiting = make_sequence(f"w{index}", stage=Stage.QUEUED)
        admission._queue.add(waiting)
    sequence = make_sequence("hasty", at=1.0)
    refusal = admission.refusal(sequence)
    assert isinstance(refusal, RequestTimeout)
    assert refusal.details["stage"] == "admission"
    assert refusal.details["estimate_ms"] == 32_000, "20 × 3 s by two slots, and 2 s"
    assert admission.refusal(make_sequence("urgent", level=0, at=-10.0)) is None


def test_percentiles_and_throughput() -> None:
    samples = Samples()
    assert samples.percentiles().p50 is None
    for value in range(100):
        samples.add(value)
    assert (samples.percentiles().p50, samples.percentiles().p99) == (50, 99)
    throughput = Throughput()
    for second in range(20):
        throughput.add(30, now=second)
    assert throughput.per_second(now=19.5) == 30
    assert throughput.per_second(now=100) == 0


@pytest.mark.parametrize(
    ("subject", "permitted"),
    [
        ("_INBOX.abc.1", True),
        (f"_INBOX.{'x' * 505}", True),
        (f"_INBOX.{'x' * 506}", False),
        (None, False),
        ("", False),
        ("_INBOX.", False),
        ("_INBOX", False),
        ("_INBOX.*", False),
        ("_INBOX.a.>", False),
        ("_INBOX.a b", False),
        ("_INBOX.a\r\nPUB x", False),
        ("orders", False),
    ],
)
def test_which_reply_subjects_may_be_answered(subject: str | None, *, permitted: bool) -> None:
    assert subjects.may_reply_to(subject, ["_INBOX."]) is permitted


# --- the scheduler ------------------------------------------------------------------------


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


# --- preemption ---------------------------------------------------------------------------


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
