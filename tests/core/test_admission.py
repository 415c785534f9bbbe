"""Who may come in, exactly: every refusal with its words and details, and when to ask at all."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.factories import make_admission, make_sequence

from trio_worker.core.admission import Admission
from trio_worker.core.memory import MB, MemoryReading, PressureGauge
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.errors import (
    DuplicateRequest,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)


@dataclass
class Gate:
    """An admission with a queue, and what is put in and out of it in one go."""

    queue_enabled: bool = True
    max_depth: int = 2
    reject: bool = True
    slots: int = 1
    refuse_unmeetable: bool = True
    queue: RequestQueue = field(default_factory=lambda: RequestQueue(max_size=100))

    def open(self) -> Admission:
        admission = make_admission(
            queue_enabled=self.queue_enabled,
            max_depth=self.max_depth,
            reject_when_full=self.reject,
            slots=self.slots,
            refuse_unmeetable=self.refuse_unmeetable,
            gauge=PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB),
            queue=self.queue,
        )
        admission.engine_ready = True
        return admission


def come(admission: Admission, *request_ids: str, at: float = 0.0) -> list[Sequence]:
    sequences = [make_sequence(each, at=at) for each in request_ids]
    for sequence in sequences:
        assert admission.refusal(sequence) is None
        admission.enter(sequence)
    return sequences


def use_memory(admission: Admission, mb: float) -> None:
    admission.gauge.read(MemoryReading(used=int(mb * MB), available=10_000 * MB, total=16_000 * MB))


def told(admission: Admission, request_id: str, **changes: float) -> tuple[object, ...] | None:
    refusal = admission.refusal(make_sequence(request_id, **changes))  # type: ignore[arg-type]
    if refusal is None:
        return None
    return type(refusal), refusal.message, dict(refusal.details)


def test_every_refusal_says_what_and_how_much() -> None:
    admission = Gate(max_depth=2).open()
    come(admission, "a", "b")
    assert told(admission, "c") == (
        QueueFull,
        "Request queue full (depth: 2)",
        {"depth": 2, "max_depth": 2},
    )
    use_memory(admission, 201)
    assert told(admission, "c") == (
        ResourceLimitExceeded,
        "Worker at capacity (memory: 201 MB)",
        {"memory_mb": 201, "critical_memory_mb": 200},
    )
    assert told(admission, "a") == (
        DuplicateRequest,
        "a request with the id a is in flight on this worker",
        {"request_id": "a"},
    )
    admission.draining = True
    assert told(admission, "a") == (
        WorkerDraining,
        "this worker is shutting down; ask another one",
        {},
    )


def test_a_deadline_is_refused_only_if_it_would_pass_even_at_best() -> None:
    gate = Gate(max_depth=40, slots=2)
    admission = gate.open()
    for index in range(6):
        gate.queue.add(make_sequence(f"w{index}", stage=Stage.QUEUED))
    for service_s in (10.5, 9.5) * 4:
        assert told(admission, "r", at=1.0) is None, "before eight have completed"
        admission.rate.record(service_s)
    assert told(admission, "r", at=1.0) == (
        RequestTimeout,
        "the deadline of 30 s cannot be met: an answer would take about 39.5 s",
        {"stage": "admission", "tokens": 0, "timeout_ms": 30_000, "estimate_ms": 39_500},
    )
    assert told(admission, "r", level=0, at=-10.0) is None, "it would be the first"
    patient = Gate(max_depth=40, slots=2, refuse_unmeetable=False, queue=gate.queue).open()
    patient.rate = admission.rate
    assert told(patient, "r", at=1.0) is None


def test_a_deadline_that_is_just_met_is_not_refused() -> None:
    gate = Gate(max_depth=40, slots=1)
    admission = gate.open()
    for _ in range(8):
        admission.rate.record(15.0)
    gate.queue.add(make_sequence("before", stage=Stage.QUEUED))
    assert told(admission, "r", at=1.0) is None, "15 s and 15 s are the 30"
    gate.queue.add(make_sequence("before too", stage=Stage.QUEUED))
    assert told(admission, "r", at=1.0) is not None


def test_without_a_queue_a_slot_is_the_place() -> None:
    admission = Gate(queue_enabled=False, max_depth=9, reject=False, slots=2).open()
    assert (admission.max_depth, admission.assess()) == (2, True)
    first, second = come(admission, "a", "b")
    assert told(admission, "c") == (
        QueueFull,
        "Request queue full (depth: 2)",
        {"depth": 2, "max_depth": 2},
    )
    assert admission.assess() is False
    assert admission.batched(first) == []
    assert (admission.is_full, admission.assess()) == (True, False), "who runs has its slot"
    admission.leave(first)
    assert admission.assess() is True
    admission.leave(second)
    assert admission.depth == 0


def test_preempted_requests_hold_no_place_and_still_leave_room_for_themselves() -> None:
    """The queue has to have room for all who run: max_depth and the slots are never exceeded."""
    admission = Gate(max_depth=2, slots=1).open()
    running = come(admission, "a", "b")
    for sequence in running:
        admission.batched(sequence)
    assert (admission.depth, admission.is_full) == (0, False)
    come(admission, "c")
    assert (admission.depth, admission.is_full) == (1, True)


def test_as_many_may_wait_for_a_place_as_there_are_and_each_gets_one_in_turn() -> None:
    admission = Gate(max_depth=2, reject=False, slots=3).open()
    assert admission._max_waiting == 2
    first, second, third, fourth = come(admission, "a", "b", "c", "d")
    assert [each.stage.value for each in (first, second, third, fourth)] == [
        *("tokenising", "tokenising", "waiting", "waiting")
    ]
    assert (admission.depth, admission.waiting) == (2, 2)
    assert told(admission, "e") == (
        QueueFull,
        "Request queue full (depth: 2)",
        {"depth": 2, "max_depth": 2},
    )
    assert admission.retry_after_ms() == 1000
    for _ in range(8):
        admission.rate.record(3.6)
    assert admission.retry_after_ms() == 1200, "by three slots, those who wait included"
    admission.waiting += 4
    assert admission.retry_after_ms() == 2400, "with eight, two rounds"
    admission.waiting -= 4
    assert admission.leave(third) == []
    assert admission.waiting == 1
    assert admission.leave(first) == [fourth]
    assert fourth.stage is Stage.TOKENISING
    assert (admission.depth, admission.waiting, list(admission.in_flight)) == (2, 0, ["b", "d"])


def test_every_arrival_counts_for_the_rate_of_arrivals() -> None:
    admission = Gate(max_depth=4).open()
    come(admission, "a", at=1.0)
    come(admission, "b", at=3.5)
    assert admission.arrivals.mean_gap_s == 2.5


@pytest.mark.parametrize("queue_enabled", [True, False])
def test_when_callers_should_come_and_why_not(*, queue_enabled: bool) -> None:
    """Without a look at it the answer is no: nobody is to come before somebody has said so."""
    admission = Gate(max_depth=4, slots=4, queue_enabled=queue_enabled).open()
    admission.engine_ready = False
    story: list[tuple[bool, str]] = []

    def look() -> None:
        story.append((admission.assess(), admission.why_not_accepting()))

    look()
    admission.engine_ready = True
    look()
    use_memory(admission, 250.4)
    look()
    use_memory(admission, 90)
    look()
    come(admission, "a", "b", "c", "d")
    look()
    admission.draining = True
    look()
    assert story == [
        (False, "loading: the engine is not ready"),
        (True, "queue: 0 of 4 places are taken"),
        (False, "memory: 250 MB is over the critical limit"),
        (True, "queue: 0 of 4 places are taken"),
        (False, "queue: 4 of 4 places are taken"),
        (False, "draining: the worker is shutting down"),
    ]
    for request_id in list(admission.in_flight):
        admission.leave(admission.in_flight[request_id])
    assert admission.assess() is False, "drained is drained, however empty"


def test_a_new_admission_lets_nobody_hope() -> None:
    admission = Gate().open()
    fresh = make_admission(
        max_depth=8, slots=2, gauge=admission.gauge, queue=RequestQueue(max_size=10)
    )
    assert (fresh.engine_ready, fresh.draining) == (False, False)
    for number in range(5):
        come(fresh, str(number))
    fresh.engine_ready = True
    assert fresh.assess() is False, "between half and full it stays as it was, and that is no"
    fresh.leave(fresh.in_flight[next(iter(fresh.in_flight))])
    assert fresh.assess() is False
    fresh.leave(fresh.in_flight[next(iter(fresh.in_flight))])
    assert fresh.assess() is True
    fresh.engine_ready = False
    fresh.assess()
    come(fresh, "x", "y")
    fresh.engine_ready = True
    assert fresh.assess() is False, "what was closed by something else opens at half, too"


# --- one rule at a time ---------------------------------------------------------------------


def ready_admission(*, max_depth: int = 4, slots: int = 2, reject: bool = True) -> Admission:
    admission = make_admission(
        max_depth=max_depth,
        reject_when_full=reject,
        slots=slots,
        gauge=PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB),
        queue=RequestQueue(max_size=max_depth + slots),
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
    admission = ready_admission(max_depth=1)
    assert isinstance(admit(admission, "a"), Sequence)
    assert isinstance(admit(admission, "a"), DuplicateRequest)
    assert isinstance(admit(admission, "b"), QueueFull)
    use_memory(admission, 300)
    refusal = admit(admission, "c")
    assert isinstance(refusal, ResourceLimitExceeded)
    assert refusal.message == "Worker at capacity (memory: 300 MB)"
    admission.draining = True
    assert isinstance(admit(admission, "d"), WorkerDraining)


def test_a_place_is_held_until_the_batch_or_the_end() -> None:
    admission = ready_admission(max_depth=1)
    first = admit(admission, "a")
    assert isinstance(first, Sequence)
    full = [admission.is_full]
    assert admission.batched(first) == []
    assert admission.depth == 0
    second = admit(admission, "b")
    assert isinstance(second, Sequence)
    admission.leave(second)
    full.append(admission.is_full)
    assert full == [True, False]
    assert set(admission.in_flight) == {"a"}


def test_who_waits_for_a_place_gets_it_in_the_order_of_the_queue() -> None:
    admission = ready_admission(max_depth=1, reject=False)
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
    assert admission.batched(holder) == [high]
    assert high.stage is Stage.TOKENISING
    assert admission.depth == 1


def test_accepting_ends_before_the_queue_is_full_and_comes_back_at_half() -> None:
    admission = ready_admission(max_depth=8, slots=2)
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
    admission = ready_admission(max_depth=3, reject=False)
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


def test_a_deadline_that_cannot_be_met_is_refused_with_an_estimate() -> None:
    admission = ready_admission(max_depth=40, slots=2)
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


# --- several choices ------------------------------------------------------------------------


def admit_several(admission: Admission, request_id: str, choices: int, level: int = 1) -> Sequence:
    sequence = make_sequence(request_id, choices=choices, level=level)
    assert admission.refusal(sequence) is None
    admission.enter(sequence)
    return sequence


def stages(sequence: Sequence) -> set[str]:
    return {row.stage.value for row in sequence.rows}


def test_a_request_gets_a_place_for_each_of_its_choices_or_none() -> None:
    admission = ready_admission(max_depth=4)
    three = admit_several(admission, "three", 3)
    assert (admission.depth, list(admission.in_flight)) == (3, ["three", "three.1", "three.2"])
    refusal = admission.refusal(make_sequence("two", choices=2))
    assert isinstance(refusal, QueueFull)
    assert admission.refusal(make_sequence("one")) is None
    assert isinstance(admission.refusal(make_sequence("three", choices=1)), DuplicateRequest)
    assert admission.batched(three.rows[1]) == []
    assert admission.depth == 2, "each gives its own place up"
    admission.leave(three)
    assert (admission.depth, admission.in_flight) == (0, {})


@pytest.mark.parametrize(("queue_enabled", "places"), [(True, 4), (False, 2)])
def test_more_choices_than_there_are_places_are_never_taken(
    *, queue_enabled: bool, places: int
) -> None:
    admission = make_admission(queue_enabled=queue_enabled, max_depth=4, slots=2)
    refusal = admission.refusal(make_sequence("r", choices=places + 1))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.message == (
        f"n: {places + 1} choices at a time are more than this worker has places for, {places}"
    )
    assert refusal.details == {"field": "n", "limit": places}
    assert admission.refusal(make_sequence("r", choices=places)) is None


def test_who_waits_for_several_places_is_not_overtaken_by_who_needs_one() -> None:
    admission = ready_admission(max_depth=4, slots=4, reject=False)
    holders = admit_several(admission, "holders", 3)
    large = admit_several(admission, "large", 3)
    small = admit_several(admission, "small", 1)
    assert (stages(large), stages(small)) == ({"waiting"}, {"waiting"})
    assert (admission.depth, admission.waiting, admission.is_full) == (3, 4, True)
    assert isinstance(admission.refusal(make_sequence("late")), QueueFull)
    urgent = make_sequence("urgent", level=0)
    assert admission.refusal(urgent) is None, "an earlier key has not waited behind anybody"
    assert admission.batched(holders.rows[0]) == []
    assert admission.batched(holders.rows[1]) == [large]
    assert (stages(large), stages(small)) == ({"tokenising"}, {"waiting"})
    assert admission.batched(holders.rows[2]) == [small]


def test_as_many_choices_may_wait_as_there_are_places() -> None:
    admission = ready_admission(max_depth=4, reject=False)
    for name, choices in (("holder", 4), ("waits", 2)):
        admit_several(admission, name, choices)
    assert isinstance(admission.refusal(make_sequence("three", choices=3)), QueueFull)
    assert admission.refusal(make_sequence("two", choices=2)) is None


def test_when_the_first_of_those_who_wait_leaves_several_may_follow() -> None:
    admission = ready_admission(max_depth=4, reject=False)
    admit_several(admission, "holder", 2)
    large = admit_several(admission, "large", 3)
    small = admit_several(admission, "small", 1)
    assert (admission.depth, admission.waiting) == (2, 4)
    assert admission.leave(large) == [small]
    assert (admission.depth, admission.waiting) == (3, 0)


def test_places_that_come_free_together_go_to_as_many_as_they_are_enough_for() -> None:
    admission = ready_admission(max_depth=4, reject=False)
    holder = admit_several(admission, "holder", 4)
    first, second = (admit_several(admission, name, 2) for name in ("first", "second"))
    assert admission.leave(holder) == [first, second]
    assert admission.depth == 4


def test_several_choices_arrive_once() -> None:
    admission = ready_admission(max_depth=8)
    for at in (1.0, 3.5):
        sequence = make_sequence(f"r{at}", at=at, choices=3)
        admission.enter(sequence)
    assert admission.arrivals.mean_gap_s == 2.5


# --- callers --------------------------------------------------------------------------------


@pytest.mark.parametrize("rejects", [True, False])
def test_a_caller_at_its_bound_is_refused_in_words_of_its_own(*, rejects: bool) -> None:
    """Also where requests may wait for a place: those that it waits for count as well."""
    admission = make_admission(max_depth=7, max_per_caller=2, reject_when_full=rejects)
    admission.engine_ready = True
    first = make_sequence("a", caller="app-a")
    admission.enter(first)
    admission.enter(make_sequence("b", caller="app-a"))
    refusal = admission.refusal(make_sequence("c", caller="app-a"))
    assert isinstance(refusal, QueueFull)
    assert str(refusal) == "Request queue full for caller app-a (2 of 2 places)"
    assert refusal.details == {"caller": "app-a", "places": 2, "limit": 2}
    assert refusal.retryable
    assert admission.assess(), "others are welcome"
    assert admission.refusal(make_sequence("d", caller="app-b")) is None
    first.advance(Event.TOKENISED)
    admission.batched(first)
    assert admission.refusal(make_sequence("c", caller="app-a")) is None


def test_requests_without_a_caller_are_together_one() -> None:
    admission = make_admission(max_per_caller=1)
    come(admission, "a")
    refusal = admission.refusal(make_sequence("b"))
    assert isinstance(refusal, QueueFull)
    assert str(refusal) == "Request queue full for requests without a caller (1 of 1 places)"
    assert refusal.details == {"caller": None, "places": 1, "limit": 1}


def test_more_choices_than_one_caller_may_have_are_no_request_for_this_worker() -> None:
    admission = make_admission(max_depth=7, max_per_caller=2)
    refusal = admission.refusal(make_sequence("a", choices=3))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.details == {"field": "n", "limit": 2}


def test_without_a_queue_there_are_no_places_to_bound() -> None:
    admission = make_admission(queue_enabled=False, slots=3, max_per_caller=1)
    come(admission, "a", "b", "c")


def test_a_caller_is_not_refused_for_what_another_has_waiting() -> None:
    """`refuse_unmeetable` reckons with its own share."""
    queue = RequestQueue(max_size=100)
    admission = make_admission(max_depth=90, slots=1, queue=queue)
    for _ in range(8):
        admission.rate.record(1.0)
    for number in range(50):
        row = make_sequence(f"f{number}", caller="flood", at=number / 100)
        admission.enter(row)
        row.advance(Event.TOKENISED)
        queue.add(row)
    assert isinstance(
        admission.refusal(make_sequence("late", caller="flood", at=1.0)), RequestTimeout
    )
    assert admission.refusal(make_sequence("guest", caller="guest", at=1.0)) is None


def test_whoever_stops_waiting_for_a_place_waits_for_it_no_more() -> None:
    admission = make_admission(max_depth=1, max_per_caller=2, reject_when_full=False)
    _, waiting = come(admission, "a", "b")
    assert waiting.stage is Stage.WAITING
    assert isinstance(admission.refusal(make_sequence("c")), QueueFull)
    admission.leave(waiting)
    assert admission.refusal(make_sequence("c")) is None
