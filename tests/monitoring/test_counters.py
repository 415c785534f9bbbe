"""What is counted and measured, to the last digit."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.core.formation import Formation, Trigger, Wait
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.errors import QueueFull, RequestTimeout
from trio_worker.exception_groups import sole_exceptions
from trio_worker.monitoring.counters import (
    BatchCounters,
    Latency,
    RequestCounters,
    Samples,
    Throughput,
)
from trio_worker.monitoring.metrics import QUEUE_WAIT, HistogramMetric
from trio_worker.monitoring.snapshot import Percentiles
from trio_worker.protocol.turn import EngineMemory

# --- samples and throughput ---------------------------------------------------------------------


def test_percentiles_are_the_nearest_ranks_of_the_last_1024() -> None:
    samples = Samples()
    assert samples.percentiles() == Percentiles(p50=None, p95=None, p99=None)
    samples.add(4.0)
    assert samples.percentiles() == Percentiles(p50=4.0, p95=4.0, p99=4.0)
    for value in range(1025):
        samples.add(float(value))
    # Of 1…1024: the first two have gone.
    assert samples.percentiles() == Percentiles(p50=513.0, p95=973.0, p99=1014.0)


def test_a_latency_is_kept_in_ms_for_the_snapshot_and_in_seconds_for_the_histogram() -> None:
    histogram = HistogramMetric(QUEUE_WAIT)
    latency = Latency(histogram)
    latency.observe(0.25, "high")
    latency.observe(0.5, "low")
    assert latency.percentiles_ms() == Percentiles(p50=500.0, p95=500.0, p99=500.0)
    assert histogram.sums == {("high",): 0.25, ("low",): 0.5}


@given(st.lists(st.tuples(st.floats(0, 15), st.integers(0, 9)), max_size=60))
def test_throughput_is_what_the_seconds_that_began_in_the_last_ten_saw(
    events: list[tuple[float, int]],
) -> None:
    throughput, now = Throughput(), 0.0
    seen: deque[tuple[int, int]] = deque()
    for after, count in events:
        now += after / 5
        throughput.add(count, now=now)
        seen.append((int(now), count))
    expected = sum(count for second, count in seen if second > now - 10) / 10
    assert throughput.per_second(now=now) == pytest.approx(expected)
    assert len(throughput._buckets) <= 11


def test_a_second_falls_out_of_the_window_when_it_is_ten_seconds_old() -> None:
    throughput = Throughput()
    throughput.add(20, now=0.0)
    throughput.add(30, now=0.9)
    assert throughput.per_second(now=9.99) == 5.0
    assert throughput.per_second(now=10.0) == 0.0


# --- counters -----------------------------------------------------------------------------------


def test_what_became_of_requests_is_counted_by_outcome_and_by_subject() -> None:
    counters = RequestCounters()
    assert counters.dropped == 0
    counters.answer("inference", None, after_s=1.5)
    counters.answer("inference", QueueFull("full"), after_s=0.25)
    counters.answer("inference", RequestTimeout("late"), after_s=2.0)
    counters.answer("inference.w1", None)
    assert counters.by_outcome == {"ok": 2, "QUEUE_FULL": 1, "REQUEST_TIMEOUT": 1}
    assert {name: vars(each) for name, each in counters.by_subject.items()} == {
        "inference": {
            "answered": 3,
            "failed": 2,
            "processing_s": 3.75,
            "last_error": "504:REQUEST_TIMEOUT",
        },
        "inference.w1": {"answered": 1, "failed": 0, "processing_s": 0.0, "last_error": ""},
    }


def test_a_batcher_that_has_done_nothing_has_nothing_but_noughts() -> None:
    counters = BatchCounters()
    assert counters.engine_memory == EngineMemory(active=0, cache=0)
    assert counters.by_trigger == {}
    numbers = [each for each in vars(counters).values() if isinstance(each, int | float)]
    assert not any(numbers)


# --- rates --------------------------------------------------------------------------------------


def test_the_service_rate_is_that_of_the_last_64() -> None:
    rate = ServiceRate()
    for number in range(7):
        rate.record(number)
    assert (rate.mean_service_s, rate.quickest_service_s) == (None, None)
    assert rate.retry_after_ms(waiting=0, slots=1) == 1000
    rate.record(7)
    assert (rate.mean_service_s, rate.quickest_service_s) == (3.5, 0)
    for number in range(8, 65):
        rate.record(number)
    assert (rate.mean_service_s, rate.quickest_service_s) == (32.5, 1), "of 1…64"
    assert rate.completed == 65


@pytest.mark.parametrize(
    ("service_s", "waiting", "slots", "expected_ms"),
    [
        (2.0, 0, 4, 500),
        (2.0, 4, 4, 500),
        (2.0, 6, 4, 750),
        (2.0, 8, 1, 4000),
        (0.01, 0, 1, 50),
        (30.0, 20, 1, 60_000),
    ],
)
def test_a_caller_is_asked_to_wait_for_a_quarter_of_those_before_it(
    service_s: float, waiting: int, slots: int, expected_ms: int
) -> None:
    rate = ServiceRate()
    for _ in range(8):
        rate.record(service_s)
    assert rate.retry_after_ms(waiting=waiting, slots=slots) == expected_ms


def test_the_mean_gap_follows_with_a_weight_of_an_eighth() -> None:
    rate, gaps = ArrivalRate(), []
    for at in (10.0, 14.0, 15.0, 23.0):
        rate.record(at)
        gaps.append(rate.mean_gap_s)
    assert gaps == [None, 4.0, 4.0 - 3 / 8, 3.625 + 4.375 / 8]


# --- formation ----------------------------------------------------------------------------------


def test_the_reasons_for_a_batch_are_the_labels_that_the_documentation_names() -> None:
    assert [each.value for each in Trigger] == ["size", "timeout", "single", "running"]


def test_a_gap_as_long_as_the_timeout_is_waited_for_and_a_longer_one_is_not() -> None:
    formation = Formation(min_batch_size=4, timeout_s=1.0, adaptive=True)
    until = Wait(until=1.0, trigger=Trigger.TIMEOUT)
    assert formation.decide(now=0.0, waiting=1, first_at=0.0, mean_gap_s=1.0) == until
    assert formation.decide(now=0.0, waiting=1, first_at=0.0, mean_gap_s=0.5) == until
    assert formation.decide(now=0.0, waiting=1, first_at=0.0, mean_gap_s=1.01) is Trigger.SINGLE


# --- exception groups ---------------------------------------------------------------------------


def test_a_sole_exception_leaves_its_groups_with_its_own_context() -> None:
    cause, sole = KeyError("its context"), ValueError("it")
    sole.__context__ = cause
    with pytest.raises(ValueError, match="it") as caught, sole_exceptions():
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [sole])])
    assert caught.value is sole
    assert sole.__context__ is cause


def test_a_group_of_several_passes_as_it_is_and_inside_of_one_it_comes_out() -> None:
    several = ExceptionGroup("several", [ValueError("one"), KeyError("two")])
    with pytest.RaisesGroup(ValueError, KeyError) as bare, sole_exceptions():
        raise several
    with pytest.RaisesGroup(ValueError, KeyError) as wrapped, sole_exceptions():
        raise ExceptionGroup("outer", [several])
    assert bare.value is wrapped.value is several


def test_what_is_no_group_passes_and_so_does_nothing() -> None:
    with pytest.raises(KeyError), sole_exceptions():
        raise KeyError
    with sole_exceptions():
        pass
