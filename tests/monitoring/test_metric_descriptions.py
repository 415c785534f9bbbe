"""What dashboards and alerts rely on: names, kinds, labels, buckets, and what is there from 0."""

from __future__ import annotations

import pytest

from trio_worker.errors import ErrorCode
from trio_worker.monitoring import metrics
from trio_worker.monitoring.metrics import CounterMetric, Description, HistogramMetric, Metrics

QUEUE = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
JOB_EVENTS = ("taken", "redelivered", "answered", "found answered", "given back", "dead")
STEPS = ("trim_caches", "hold_low", "shrink_batch", "cap_tokens")

RELIED_ON: dict[str, tuple[object, ...]] = {
    # name: kind, labels, buckets, values of the labels that are there from the start
    "requests_total": ("counter", ("outcome", "priority"), (), ()),
    "rejections_total": ("counter", ("code",), (), tuple((each.value,) for each in ErrorCode)),
    "cancellations_total": ("counter", ("source", "stage"), (), ()),
    "prompt_tokens_total": ("counter", (), (), ()),
    "generated_tokens_total": ("counter", (), (), ()),
    "prefix_cache_hit_tokens_total": ("counter", (), (), ()),
    "degradations_total": ("counter", ("step",), (), tuple((each,) for each in STEPS)),
    "requests_resumed_total": ("counter", (), (), ()),
    "preemptions_total": ("counter", ("reason",), (), (("priority",), ("memory",))),
    "jobs_total": (
        *("counter", ("what", "level"), ()),
        tuple((what, level) for what in JOB_EVENTS for level in ("high", "medium", "low")),
    ),
    "queue_wait_seconds": ("histogram", ("priority",), QUEUE, ()),
    "cancel_latency_seconds": ("histogram", (), TOKEN, ()),
    "time_to_first_token_seconds": ("histogram", ("priority",), REQUEST, ()),
    "inter_token_seconds": ("histogram", (), TOKEN, ()),
    "request_seconds": ("histogram", ("outcome",), REQUEST, ()),
    "batch_size": ("histogram", (), (1, 2, 4, 8, 16, 32, 64), ()),
    "batch_formation_seconds": ("histogram", ("trigger",), QUEUE, ()),
    "turn_seconds": ("histogram", (), TOKEN, ()),
    "event_loop_lag_seconds": ("histogram", (), LAG, ()),
    "requests_in_flight": ("gauge", (), (), ()),
    "queue_depth": ("gauge", ("priority",), (), ()),
    "queue_promotions_total": ("counter", (), (), ()),
    "memory_bytes": ("gauge", ("kind",), (), ()),
    "memory_reserved_bytes": ("gauge", (), (), ()),
    "memory_pressure": ("gauge", (), (), ()),
    "engine_restarts_total": (
        *("counter", ("reason",), ()),
        (("crash",), ("hang",), ("load",), ("planned",)),
    ),
    "nats_connected": ("gauge", (), (), ()),
    "nats_reconnects_total": ("counter", (), (), ()),
    "nats_slow_consumer_total": ("counter", (), (), ()),
    "ready": ("gauge", (), (), ()),
    "build_info": ("gauge", ("version", "worker", "model"), (), ()),
}
DESCRIBED = {each.name: each for each in metrics.all_descriptions()}


@pytest.mark.parametrize("name", RELIED_ON)
def test_a_metric_stays_what_dashboards_take_it_for(name: str) -> None:
    each = DESCRIBED[name]
    assert (each.kind, each.labels, each.buckets, each.starts) == RELIED_ON[name]
    assert each.full_name == f"trio_worker_{name}"


def test_all_metrics_are_listed_by_name_and_each_once() -> None:
    names = [each.name for each in metrics.all_descriptions()]
    assert names == sorted(set(names))
    assert set(names) == {
        *(each.description.name for each in Metrics().written()),
        *(each.name for each in metrics.READ),
    }


def test_a_counter_begins_with_what_is_known_to_come() -> None:
    plain = CounterMetric(Description(name="a", kind="counter", meaning=""))
    assert plain.values == {(): 0}
    labelled = CounterMetric(
        Description(name="a", kind="counter", meaning="", labels=("x",), starts=(("1",),))
    )
    assert labelled.values == {("1",): 0}
    for counter, labels in ((plain, ()), (labelled, ("2",))):
        counter.add(labels=labels)
        counter.add(4, labels)
    assert plain.values == {(): 5}
    assert labelled.values == {("1",): 0, ("2",): 5}
    labelled.add(2, ("1",))
    assert (plain.total(), labelled.total()) == (5, 7)


def test_a_value_on_the_edge_of_a_bucket_belongs_into_it() -> None:
    histogram = HistogramMetric(
        Description(name="h", kind="histogram", meaning="", labels=("x",), buckets=(1, 2, 4))
    )
    assert (histogram.counts, histogram.sums) == ({}, {})
    for value in (0.5, 1, 1.5, 4, 4.5, 100):
        histogram.observe(value, ("a",))
    histogram.observe(3, ("b",))
    assert histogram.counts == {("a",): [2, 1, 1, 2], ("b",): [0, 0, 1, 0]}
    assert histogram.sums == {("a",): 111.5, ("b",): 3.0}


def test_a_histogram_without_labels_has_one_row() -> None:
    histogram = HistogramMetric(metrics.BATCH_SIZE)
    histogram.observe(2)
    assert histogram.counts == {(): [0, 1, 0, 0, 0, 0, 0, 0]}
