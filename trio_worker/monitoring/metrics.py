"""The metrics, as plain counts: what they are called, what they mean, and their values.

Written synchronously where things happen and read by whoever exports them; nothing here knows of
an exporter. Every label has a bounded set of values. The documentation's list is made from here.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trio_worker.core.hand_on import Reason
from trio_worker.core.memory import DegradationStep
from trio_worker.core.priority import NAMES
from trio_worker.errors import ErrorCode

PREFIX = "trio_worker_"

Labels: TypeAlias = tuple[str, ...]

# From the time the queue takes to the time an answer takes.
QUEUE_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a metric is called and means; `worry` says when its value is a reason to act."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    worry: str = ""
    starts: tuple[Labels, ...] = ()
    """Label values that are there with 0 from the start: else their first count is no increase."""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


class CounterMetric:
    """Counts that only grow, one for each combination of label values."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.values: dict[Labels, int] = dict.fromkeys(description.starts, 0)
        if not description.labels:
            self.values[()] = 0

    def add(self, amount: int = 1, labels: Labels = ()) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def total(self) -> int:
        """Over all labels."""
        return sum(self.values.values())


class HistogramMetric:
    """How many values fell into each bucket, and their sum, for each combination of labels."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.counts: dict[Labels, list[int]] = {}
        """One more than there are buckets: the last is for values above them all."""
        self.sums: dict[Labels, float] = {}

    def observe(self, value: float, labels: Labels = (), count: int = 1) -> None:
        """The value has come `count` times."""
        counts = self.counts.get(labels)
        if counts is None:
            counts = self.counts[labels] = [0] * (len(self.description.buckets) + 1)
            self.sums[labels] = 0.0
        counts[bisect.bisect_left(self.description.buckets, value)] += count
        self.sums[labels] += value * count


@dataclass(frozen=True, slots=True, kw_only=True)
class GaugeReading:
    """The values of a gauge at the moment of reading."""

    description: Description
    values: Mapping[Labels, float]


class Metrics:
    """All that is written; gauges are read from the state they describe instead."""

    def __init__(self) -> None:
        self.requests = CounterMetric(REQUESTS)
        self.rejections = CounterMetric(REJECTIONS)
        self.cancellations = CounterMetric(CANCELLATIONS)
        self.prompt_tokens = CounterMetric(PROMPT_TOKENS)
        self.generated_tokens = CounterMetric(GENERATED_TOKENS)
        self.cached_tokens = CounterMetric(CACHED_TOKENS)
        self.degradations = CounterMetric(DEGRADATIONS)
        self.resumed = CounterMetric(RESUMED)
        self.preemptions = CounterMetric(PREEMPTIONS)
        self.batch_loop_restarts = CounterMetric(BATCH_LOOP_RESTARTS)
        self.handed_on = CounterMetric(HANDED_ON)
        self.taken_over = CounterMetric(TAKEN_OVER)
        self.returned = CounterMetric(RETURNED)
        self.jobs = CounterMetric(JOBS)
        self.queue_wait = HistogramMetric(QUEUE_WAIT)
        self.cancel_latency = HistogramMetric(CANCEL_LATENCY)
        self.time_to_first_token = HistogramMetric(TIME_TO_FIRST_TOKEN)
        self.inter_token = HistogramMetric(INTER_TOKEN)
        self.request_seconds = HistogramMetric(REQUEST_SECONDS)
        self.batch_size = HistogramMetric(BATCH_SIZE)
        self.batch_formation = HistogramMetric(BATCH_FORMATION)
        self.turn_seconds = HistogramMetric(TURN_SECONDS)
        self.loop_lag = HistogramMetric(LOOP_LAG)

    def written(self) -> Iterator[CounterMetric | HistogramMetric]:
        """Every metric of this object."""
        yield from vars(self).values()


REQUESTS = Description(
    name="requests_total",
    kind="counter",
    meaning="Admitted requests that ended; `outcome` is `ok`, `handed_on` for one that another "
    "worker goes on with, or the error's code.",
    labels=("outcome", "priority"),
    worry="The share of outcomes other than `ok` and `CANCELLED` grows.",
)
REJECTIONS = Description(
    name="rejections_total",
    kind="counter",
    meaning="Requests that were not admitted, by code.",
    labels=("code",),
    starts=tuple((code.value,) for code in ErrorCode),
    worry="`QUEUE_FULL` or `RESOURCE_LIMIT_EXCEEDED` keep growing: more workers are needed.",
)
CANCELLATIONS = Description(
    name="cancellations_total",
    kind="counter",
    meaning="Requests ended from outside before their answer's end: by whom, and at which stage.",
    labels=("source", "stage"),
)
PROMPT_TOKENS = Description(
    name="prompt_tokens_total", kind="counter", meaning="Tokens of the prompts that were served."
)
GENERATED_TOKENS = Description(
    name="generated_tokens_total",
    kind="counter",
    meaning="Tokens of the answers, counted when a request ends; for the rate of this moment see "
    "`batch_size`, whose sum counts them step by step.",
)
CACHED_TOKENS = Description(
    name="prefix_cache_hit_tokens_total",
    kind="counter",
    meaning="Prompt tokens taken from the prefix cache rather than computed.",
)
DEGRADATIONS = Description(
    name="degradations_total",
    kind="counter",
    meaning="How often each step of degradation began.",
    labels=("step",),
    starts=tuple((step.value,) for step in DegradationStep),
    worry="It grows: memory is too small for the load.",
)
RESUMED = Description(
    name="requests_resumed_total",
    kind="counter",
    meaning="Requests that went on after the engine had been lost with them aboard.",
)
PREEMPTIONS = Description(
    name="preemptions_total",
    kind="counter",
    meaning="Requests taken out of the batch for a more urgent one (`priority`) or `memory`.",
    labels=("reason",),
    starts=(("priority",), ("memory",)),
)
BATCH_LOOP_RESTARTS = Description(
    name="batch_loop_restarts_total",
    kind="counter",
    meaning="Faults of this program's own batch loop: it was started again with a fresh engine.",
    worry="It grows at all: the log has the traceback; please report it.",
)
HANDED_ON = Description(
    name="requests_handed_on_total",
    kind="counter",
    meaning="Requests that were passed to another worker, by why: no free slot here (`no_slot`), "
    "the beginning of the prompt is better known there (`prefix`), a full queue or memory here "
    "(`no_room`), or a drain (`draining`).",
    labels=("reason",),
    starts=tuple((reason.value,) for reason in Reason),
    worry="`no_room` keeps growing: this worker is overfull while others are not, or all are.",
)
TAKEN_OVER = Description(
    name="requests_taken_over_total",
    kind="counter",
    meaning="Requests that were admitted after another worker had passed them on.",
)
RETURNED = Description(
    name="hand_ons_returned_total",
    kind="counter",
    meaning="Requests that were passed to a worker for which nobody listened any more, and came "
    "back.",
    worry="It grows steadily: workers end without a drain.",
)
JOB_EVENTS = ("taken", "redelivered", "answered", "found answered", "given back", "dead")
JOBS = Description(
    name="jobs_total",
    kind="counter",
    meaning="Durable jobs: `taken` for the first time, `redelivered` to this worker, `answered` "
    "and stored, `found answered` already, `given back` to the stream, and `dead`: given up.",
    labels=("what", "level"),
    starts=tuple((what, level) for what in JOB_EVENTS for level in NAMES),
    worry="`dead` grows at all: look into the stream of dead letters. `redelivered` grows: workers "
    "die, or hang for longer than `ack_wait_ms`.",
)
QUEUE_WAIT = Description(
    name="queue_wait_seconds",
    kind="histogram",
    meaning="From arrival to the batch.",
    labels=("priority",),
    buckets=QUEUE_BUCKETS,
    worry="The 95th percentile nears the callers' deadlines.",
)
CANCEL_LATENCY = Description(
    name="cancel_latency_seconds",
    kind="histogram",
    meaning="From the end of a request before its answer's end to its batch slot being free.",
    buckets=TOKEN_BUCKETS,
)
TIME_TO_FIRST_TOKEN = Description(
    name="time_to_first_token_seconds",
    kind="histogram",
    meaning="From arrival to the first token.",
    labels=("priority",),
    buckets=REQUEST_BUCKETS,
    worry="It grows while the queue is short: prompts are long, or the machine is slow.",
)
INTER_TOKEN = Description(
    name="inter_token_seconds",
    kind="histogram",
    meaning="Between two tokens of one request.",
    buckets=TOKEN_BUCKETS,
    worry="The 95th percentile is far above `engine.token_gap_target_ms`.",
)
REQUEST_SECONDS = Description(
    name="request_seconds",
    kind="histogram",
    meaning="From arrival to the terminal message.",
    labels=("outcome",),
    buckets=REQUEST_BUCKETS,
)
BATCH_SIZE = Description(
    name="batch_size",
    kind="histogram",
    meaning="Sequences that got a token, for each decode step.",
    buckets=SIZE_BUCKETS,
)
BATCH_FORMATION = Description(
    name="batch_formation_seconds",
    kind="histogram",
    meaning="From the first request of a forming batch, or the free slot if that is later, to the "
    "turn that takes it, by what triggered it.",
    labels=("trigger",),
    buckets=QUEUE_BUCKETS,
    worry="`running` is above a turn, or another above `batch_timeout_ms` and 50 ms: the worker's "
    "own loop is late.",
)
TURN_SECONDS = Description(
    name="turn_seconds",
    kind="histogram",
    meaning="One turn of the engine, as the worker sees it.",
    buckets=TOKEN_BUCKETS,
    worry="It nears `turn_timeout_ms`: the engine is about to be restarted.",
)
LOOP_LAG = Description(
    name="event_loop_lag_seconds",
    kind="histogram",
    meaning="How much later than asked for a timer fired: what the worker's own loop costs.",
    buckets=LAG_BUCKETS,
    worry="Values above 0.1 s: something blocks the worker's event loop.",
)
IN_FLIGHT = Description(
    name="requests_in_flight",
    kind="gauge",
    meaning="Requests admitted and not ended; one counts as often as it wants choices.",
)
QUEUE_DEPTH = Description(
    name="queue_depth",
    kind="gauge",
    meaning="Requests waiting in the queue.",
    labels=("priority",),
    worry="It stays near `max_depth`.",
)
PROMOTIONS = Description(
    name="queue_promotions_total",
    kind="counter",
    meaning="Requests served before a more urgent one because they had waited: aging at work.",
)
MEMORY = Description(
    name="memory_bytes",
    kind="gauge",
    meaning="`used` by worker and engine, `engine_active` and `engine_cache` as its allocator "
    "counts, `available` on the machine, and the limits `soft` and `hard`.",
    labels=("kind",),
    worry="`used` stays above `soft`.",
)
RESERVED = Description(
    name="memory_reserved_bytes",
    kind="gauge",
    meaning="The longest caches that the running requests may come to hold.",
)
PRESSURE = Description(
    name="memory_pressure",
    kind="gauge",
    meaning="0 normal, 1 soft, 2 critical.",
    worry="It is not 0 for minutes.",
)
ENGINE_RESTARTS = Description(
    name="engine_restarts_total",
    kind="counter",
    meaning="Restarts of the engine process: after a `crash`, a `hang`, a failed `load`, or "
    "`planned`.",
    labels=("reason",),
    starts=(("crash",), ("hang",), ("load",), ("planned",)),
    worry="`crash` or `hang` grow: see the log for the engine's last lines.",
)
CONNECTED = Description(
    name="nats_connected",
    kind="gauge",
    meaning="1 while the connection to NATS stands.",
    worry="It is 0 for more than a few seconds.",
)
RECONNECTS = Description(
    name="nats_reconnects_total", kind="counter", meaning="Reconnections to NATS."
)
SLOW_CONSUMER = Description(
    name="nats_slow_consumer_total",
    kind="counter",
    meaning="Messages that the NATS client threw away because they were not taken in time.",
    worry="It grows at all.",
)
READY = Description(
    name="ready",
    kind="gauge",
    meaning="1 while requests are accepted, as `/readyz` says, which also says why not.",
    worry="It is 0 for minutes, or changes all the time: more workers are needed.",
)
BUILD_INFO = Description(
    name="build_info",
    kind="gauge",
    meaning="1, with the version, the worker's id and the model as labels.",
    labels=("version", "worker", "model"),
)

READ = (
    IN_FLIGHT,
    QUEUE_DEPTH,
    PROMOTIONS,
    MEMORY,
    RESERVED,
    PRESSURE,
    ENGINE_RESTARTS,
    CONNECTED,
    RECONNECTS,
    SLOW_CONSUMER,
    READY,
    BUILD_INFO,
)
"""Metrics that are read from the state they describe."""


def all_descriptions() -> tuple[Description, ...]:
    """Every metric there is, by name."""
    written = (metric.description for metric in Metrics().written())
    return tuple(sorted((*written, *READ), key=lambda each: each.name))
