"""What the worker says about itself: each figure of the snapshot and each gauge, exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
import trio
from support.factories import make_admission, make_beat, make_report, make_sequence
from support.worker_rig import MB, make_config
from trio.testing import MockClock

from trio_worker import __version__
from trio_worker.core.memory import DegradationStep, MemoryReading, PressureGauge, ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Event, Sequence
from trio_worker.errors import InvalidRequest, QueueFull
from trio_worker.flow.door import Door
from trio_worker.flow.live_set import LiveSet
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import heartbeats
from trio_worker.monitoring.metrics import GaugeReading
from trio_worker.monitoring.observed_worker import ObservedWorker
from trio_worker.monitoring.worker_parts import WorkerParts
from trio_worker.ports import BrokerStatistics, EngineState, EngineStatistics
from trio_worker.protocol.turn import EngineInfo

INFO = EngineInfo(
    model="tiny",
    context_length=4096,
    vocabulary_size=32_000,
    cache_bytes_per_token=65_600,
    device="a chip, bfloat16",
)
LOADING = EngineStatistics(state=EngineState.LOADING, pid=None, restarts=0, info=None)
SERVING = EngineStatistics(
    state=EngineState.READY,
    pid=4242,
    restarts=7,
    info=INFO,
    restarts_by_reason={"crash": 4, "planned": 3},
)
DOWN = BrokerStatistics(
    url="nats://there:4222",
    connected=False,
    reconnects=0,
    received=0,
    published=0,
    dropped=0,
    unpublished_bytes=0,
    slow_consumers=0,
)
UP = BrokerStatistics(
    url="nats://there:4222",
    connected=True,
    reconnects=11,
    received=12,
    published=13,
    dropped=14,
    unpublished_bytes=15,
    slow_consumers=16,
)


@dataclass
class Told:
    """An engine and a broker, as far as they are looked at."""

    engine: EngineStatistics = LOADING
    broker: BrokerStatistics = DOWN


@dataclass
class Says:
    says: Any

    def statistics(self) -> Any:
        return self.says()


@dataclass
class Parts:
    """A worker's state, in the hands of a test: two slots, seven places, seven who may wait."""

    told: Told = field(default_factory=Told)
    gauge: PressureGauge = field(
        default_factory=lambda: PressureGauge(soft_bytes=1000 * MB, critical_bytes=2000 * MB)
    )
    ledger: ReservationLedger = field(
        default_factory=lambda: ReservationLedger(limit_bytes=2000 * MB)
    )
    queue: RequestQueue = field(default_factory=lambda: RequestQueue(max_size=9))
    batches: BatchCounters = field(default_factory=BatchCounters)
    counters: RequestCounters = field(default_factory=RequestCounters)

    def __post_init__(self) -> None:
        self.admission = make_admission(reject_when_full=False, gauge=self.gauge, queue=self.queue)
        self.door = Door(self.admission)
        self.live = LiveSet(own_id="w1", model="tiny", forget_after_s=3)
        self.scheduler = Scheduler(
            slots=2, prefill=PrefillBudget(chunk_max=512, gap_target_s=0.2), ledger=self.ledger
        )
        self.observed = ObservedWorker(
            WorkerParts(
                config=make_config(
                    "worker.model_name=tiny",
                    "worker.resource_limits.max_memory_mb=1000",
                    "worker.resource_limits.critical_memory_mb=2000",
                ).worker,
                admission=self.admission,
                door=self.door,
                queue=self.queue,
                scheduler=self.scheduler,
                batches=self.batches,
                counters=self.counters,
                engine=Says(lambda: self.told.engine),  # type: ignore[arg-type]
                broker=Says(lambda: self.told.broker),  # type: ignore[arg-type]
                heartbeats=heartbeats(
                    trio.current_time(),
                    turn_timeout_s=60,
                    check_interval_s=5,
                    report_interval_s=10,
                    pulse_s=0.5,
                    beat_interval_s=1,
                ),
                live=self.live,
            )
        )

    def ready(self) -> None:
        self.told.engine, self.told.broker = SERVING, UP
        self.observed.is_subscribed = True
        self.ledger.bytes_per_token = INFO.cache_bytes_per_token
        self.door.set_engine_ready(ready=True)

    def admit(self, name: str, level: int, *, at: float, queued: bool = True) -> Sequence:
        sequence = make_sequence(name, level=level, at=at)
        self.door.admit(sequence)
        if queued:
            sequence.advance(Event.TOKENISED)
            self.queue.add(sequence)
        return sequence

    def serve(self, sequence: Sequence, *, now: float) -> None:
        self.queue.take(sequence)
        self.scheduler.enter(sequence, now=now)
        self.door.batched(sequence)

    def snapshot(self) -> Any:
        return msgspec.to_builtins(self.observed.snapshot())

    def gauges(self) -> dict[str, dict[tuple[str, ...], float]]:
        return {
            each.description.name: dict(each.values)
            for each in self.observed.metrics()
            if isinstance(each, GaugeReading)
        }


KB = 1024


def crowd(parts: Parts) -> None:
    """Two run, six are queued, one is tokenised, and two wait for a place."""
    running, joining = parts.admit("running", 1, at=100.0), parts.admit("joining", 2, at=100.5)
    parts.admit("high", 0, at=101.0)
    parts.serve(running, now=101.5)
    parts.serve(joining, now=101.5)
    parts.scheduler.plan()
    report = make_report(
        [("running", None)],
        residents={"running", "joining"},
        prefills=[("running", 3, 3), ("joining", 2, 3)],
    )
    parts.scheduler.book(report, now=102.0)
    running.preempted, joining.resumed = 2, 1
    for number, level in enumerate((1, 1, 2, 2, 2)):
        parts.admit(f"queued{number}", level, at=103.0)
    parts.admit("tokenised", 1, at=103.5, queued=False)
    for number in range(2):
        parts.admit(f"waiting{number}", 0, at=104.0, queued=False)


def count(parts: Parts) -> None:
    """What the other parts would have counted."""
    batches, counters = parts.batches, parts.counters
    batches.turns, batches.decode_turns, batches.decoded = 20, 7, 9
    batches.max_batch_seen, batches.last_formation_ms = 6, 12.34567
    batches.by_trigger.update({"size": 3, "timeout": 2})
    batches.engine_memory = msgspec.structs.replace(
        batches.engine_memory, active=68 * MB + 300 * KB, cache=5 * MB + 130 * KB
    )
    written = counters.metrics
    written.preemptions.add(2, labels=("priority",))
    written.preemptions.add(labels=("memory",))
    written.degradations.add(2, labels=("trim_caches",))
    written.degradations.add(labels=("hold_low",))
    written.resumed.add(5)
    for name, age_s in (("w2", 0.5), ("w3", 1.0)):
        parts.live.heard(make_beat(name), trio.current_time() - age_s)
    written.handed_on.add(3, labels=("prefix",))
    written.taken_over.add(2)
    written.returned.add()
    written.prompt_tokens.add(100)
    written.cached_tokens.add(30)
    written.generated_tokens.add(70)
    for _ in range(8):
        counters.answer("inference", None)
    counters.answer("inference", QueueFull("full"))
    for _ in range(2):
        counters.answer("inference", InvalidRequest("wrong"))
    counters.dropped = 4
    for start, latency in enumerate(
        (
            counters.queue_wait,
            counters.time_to_first_token,
            counters.inter_token,
            counters.request,
            counters.cancel,
        )
    ):
        for value in range(200):
            latency.observe(start + value / 1000)
    counters.throughput.add(25, now=trio.current_time())


async def test_the_snapshot_says_of_each_part_what_is_so(autojump_clock: MockClock) -> None:
    await trio.sleep(100)
    parts = Parts()
    parts.ready()
    crowd(parts)
    await trio.sleep(50.0123456)
    count(parts)
    parts.gauge.read(
        MemoryReading(used=1300 * MB + 250 * KB, available=8000 * MB + 300 * KB, total=16_000 * MB)
    )
    assert parts.snapshot() == {
        "worker": {"id": "w1", "version": __version__, "state": "ready", "uptime_s": 50.012},
        "queue": {
            "depth": 7,
            "max_depth": 7,
            "is_full": True,
            "by_priority": {"high": 1, "medium": 2, "low": 3},
            "promotions": 2,
            "waiting_for_place": 2,
            "callers": 1,
        },
        "batch": {
            "running": 2,
            "max_batch_size": 2,
            "turns": 20,
            "mean_batch_size": 1.286,
            "max_batch_seen": 6,
            "last_formation_ms": 12.346,
            "by_trigger": {"size": 3, "timeout": 2},
            "preemptions": 3,
        },
        "resources": {
            "memory_mb": 1300.2,
            "reserved_mb": 32.0,
            "can_accept_request": True,
            "under_pressure": True,
            "pressure": "soft",
            "steps": ["trim_caches", "hold_low"],
            "degradations": {"trim_caches": 2, "hold_low": 1},
            "available_mb": 8000.3,
            "limits": {"max_memory_mb": 1000, "critical_memory_mb": 2000},
        },
        "engine": {
            "pid": 4242,
            "state": "ready",
            "model": "tiny",
            "restarts": 7,
            "resumed": 5,
            "context_length": 4096,
            "cache_bytes_per_token": 65_600,
            "device": "a chip, bfloat16",
            "memory_active_mb": 68.3,
            "memory_cache_mb": 5.1,
        },
        "requests": {
            "in_flight": 11,
            "completed": 8,
            "by_outcome": {"ok": 8, "QUEUE_FULL": 1, "INVALID_REQUEST": 2},
            "by_stage": {"decode": 1, "prefill": 1, "queued": 6, "tokenising": 1, "waiting": 2},
            "dropped": 4,
            "queue_wait_ms": {"p50": 100.0, "p95": 190.0, "p99": 198.0},
            "time_to_first_token_ms": {"p50": 1100.0, "p95": 1190.0, "p99": 1198.0},
            "inter_token_ms": {"p50": 2100.0, "p95": 2190.0, "p99": 2198.0},
            "request_ms": {"p50": 3100.0, "p95": 3190.0, "p99": 3198.0},
            "cancel_ms": {"p50": 4100.0, "p95": 4190.0, "p99": 4198.0},
        },
        "tokens": {"prompt": 100, "cached": 30, "generated": 70, "per_second": 2.5},
        "fleet": {
            "others": 2,
            "handed_on": {"no_slot": 0, "prefix": 3, "no_room": 0, "draining": 0},
            "taken_over": 2,
            "returned": 1,
        },
        "nats": msgspec.to_builtins(UP),
        "jobs": None,
    }


async def test_before_anything_has_happened_the_snapshot_says_so(
    autojump_clock: MockClock,
) -> None:
    none_yet = {"p50": None, "p95": None, "p99": None}
    parts = Parts()
    assert parts.snapshot() == {
        "worker": {"id": "w1", "version": __version__, "state": "loading", "uptime_s": 0.0},
        "queue": {
            "depth": 0,
            "max_depth": 7,
            "is_full": False,
            "by_priority": {"high": 0, "medium": 0, "low": 0},
            "promotions": 0,
            "waiting_for_place": 0,
            "callers": 0,
        },
        "batch": {
            "running": 0,
            "max_batch_size": 2,
            "turns": 0,
            "mean_batch_size": 0.0,
            "max_batch_seen": 0,
            "last_formation_ms": 0.0,
            "by_trigger": {},
            "preemptions": 0,
        },
        "resources": {
            "memory_mb": 0.0,
            "reserved_mb": 0.0,
            "can_accept_request": True,
            "under_pressure": False,
            "pressure": "normal",
            "steps": [],
            "degradations": {},
            "available_mb": 0.0,
            "limits": {"max_memory_mb": 1000, "critical_memory_mb": 2000},
        },
        "engine": {
            "pid": None,
            "state": "loading",
            "model": "tiny",
            "restarts": 0,
            "resumed": 0,
            "context_length": None,
            "cache_bytes_per_token": None,
            "device": None,
            "memory_active_mb": 0.0,
            "memory_cache_mb": 0.0,
        },
        "requests": {
            "in_flight": 0,
            "completed": 0,
            "by_outcome": {},
            "by_stage": {},
            "dropped": 0,
            "queue_wait_ms": none_yet,
            "time_to_first_token_ms": none_yet,
            "inter_token_ms": none_yet,
            "request_ms": none_yet,
            "cancel_ms": none_yet,
        },
        "tokens": {"prompt": 0, "cached": 0, "generated": 0, "per_second": 0.0},
        "fleet": {
            "others": 0,
            "handed_on": {"no_slot": 0, "prefix": 0, "no_room": 0, "draining": 0},
            "taken_over": 0,
            "returned": 0,
        },
        "nats": msgspec.to_builtins(DOWN),
        "jobs": None,
    }
    limits = {("soft",): 1000 * MB, ("hard",): 2000 * MB}
    gauges = parts.gauges()
    assert gauges.pop("build_info") == {(__version__, "w1", "tiny"): 1}
    assert {
        (name, labels): value
        for name, values in gauges.items()
        for labels, value in values.items()
        if value
    } == {("memory_bytes", labels): value for labels, value in limits.items()}
    assert gauges["queue_depth"] == {("high",): 0, ("medium",): 0, ("low",): 0}
    parts.batches.decode_turns, parts.batches.decoded = 1, 2
    assert parts.observed.snapshot().batch.mean_batch_size == 2


async def test_the_gauges_say_what_the_snapshot_says(autojump_clock: MockClock) -> None:
    await trio.sleep(100)
    parts = Parts()
    parts.ready()
    crowd(parts)
    count(parts)
    parts.gauge.read(MemoryReading(used=1300, available=8000, total=16_000))
    parts.gauge.read(MemoryReading(used=2000 * MB, available=9000 * MB, total=16_000 * MB))
    assert parts.gauges() == {
        "requests_in_flight": {(): 11},
        "queue_depth": {("high",): 1, ("medium",): 2, ("low",): 3},
        "queue_promotions_total": {(): 2},
        "memory_bytes": {
            ("used",): 2000 * MB,
            ("engine_active",): 68 * MB + 300 * KB,
            ("engine_cache",): 5 * MB + 130 * KB,
            ("available",): 9000 * MB,
            ("soft",): 1000 * MB,
            ("hard",): 2000 * MB,
        },
        "memory_reserved_bytes": {(): 2 * 256 * 65_600},
        "memory_pressure": {(): 2},
        "engine_restarts_total": {
            ("crash",): 4,
            ("hang",): 0,
            ("load",): 0,
            ("planned",): 3,
        },
        "nats_connected": {(): 1},
        "nats_reconnects_total": {(): 11},
        "nats_slow_consumer_total": {(): 16},
        "ready": {(): 0},
        "build_info": {(__version__, "w1", "tiny"): 1},
    }
    resources = parts.observed.snapshot().resources
    assert not resources.can_accept_request
    assert resources.under_pressure
    assert resources.pressure == "critical"
    assert resources.steps == list(DegradationStep)


async def test_every_written_metric_is_shown_once(autojump_clock: MockClock) -> None:
    parts = Parts()
    shown = [each for each in parts.observed.metrics() if not isinstance(each, GaugeReading)]
    assert shown == list(parts.counters.metrics.written())


async def test_the_requests_in_flight_are_told_oldest_first_and_at_most_so_many(
    autojump_clock: MockClock,
) -> None:
    await trio.sleep(100)
    parts = Parts()
    parts.ready()
    crowd(parts)
    await trio.sleep(5.0123456)
    told = msgspec.to_builtins(parts.observed.in_flight())
    assert [each["request_id"] for each in told] == list(parts.admission.in_flight)
    assert told[:2] == [
        {
            "request_id": "running",
            "stage": "decode",
            "priority": "medium",
            "age_s": 5.012,
            "prompt_tokens": 3,
            "prefilled": 3,
            "tokens": 1,
            "max_tokens": 100,
            "resumed": 0,
            "preempted": 2,
        },
        {
            "request_id": "joining",
            "stage": "prefill",
            "priority": "low",
            "age_s": 4.512,
            "prompt_tokens": 3,
            "prefilled": 2,
            "tokens": 0,
            "max_tokens": 100,
            "resumed": 1,
            "preempted": 0,
        },
    ]
    assert msgspec.to_builtins(parts.observed.in_flight(3)) == told[:3]


async def test_it_is_ready_exactly_while_a_request_would_be_taken(
    autojump_clock: MockClock,
) -> None:
    """Each reason why not, and which of several is given."""
    parts = Parts()

    def said() -> tuple[bool, str]:
        health = parts.observed.readiness()
        assert parts.gauges()["ready"] == {(): int(health.ok)}
        return health.ok, health.reason

    assert said() == (False, "loading: the engine is not ready")
    parts.door.set_engine_ready(ready=True)
    assert said() == (False, "loading: not subscribed to requests yet")
    parts.observed.is_subscribed = True
    assert said() == (False, "nats: the connection is down")
    parts.told.broker = UP
    assert said() == (True, "accepting requests")

    crowd(parts)
    assert said() == (False, "queue: 7 of 7 places are taken")
    parts.gauge.read(MemoryReading(used=2000 * MB, available=MB, total=MB))
    parts.door.pressure_changed()
    assert said() == (False, "memory: 2000 MB is over the critical limit")
    parts.told.engine = replace(SERVING, state=EngineState.RESTARTING)
    parts.door.set_engine_ready(ready=False)
    assert said() == (False, "restarting: the engine was lost and starts again")
    parts.door.close()
    assert said() == (False, "draining: the worker is shutting down")


@pytest.mark.parametrize("engine_state", EngineState)
async def test_the_workers_state_is_its_engines_until_it_drains(
    autojump_clock: MockClock, engine_state: EngineState
) -> None:
    parts = Parts()
    parts.told.engine = replace(SERVING, state=engine_state)
    assert parts.observed.snapshot().worker.state == engine_state
    parts.door.close()
    assert parts.observed.snapshot().worker.state == "draining"
    assert parts.observed.snapshot().engine.state == engine_state


async def test_the_resource_status_is_what_the_snapshot_has_and_one_line() -> None:
    parts = Parts()
    parts.ready()
    assert parts.observed.resources() == parts.observed.snapshot().resources
    assert parts.observed.resources().line == (
        "memory pressure normal: 0 MB in use, limits 1000 and 2000 MB"
    )
    parts.gauge.read(MemoryReading(used=1300 * MB, available=9000 * MB, total=16_000 * MB))
    assert parts.observed.readiness().ok
    assert parts.observed.resources() == parts.observed.snapshot().resources
    assert parts.observed.resources().line == (
        "memory pressure soft: 1300 MB in use, limits 1000 and 2000 MB; "
        "steps in force: trim_caches, hold_low"
    )


async def test_the_fleet_is_listed_by_id_with_this_worker_as_it_is(
    autojump_clock: MockClock,
) -> None:
    parts = Parts()
    parts.ready()
    parts.admit("one", 0, at=0)
    now = trio.current_time()
    parts.live.heard(make_beat("w3"), now - 3.5)
    parts.live.heard(make_beat("w0", model="other", in_flight=5, queued=2), now - 1.25)
    parts.live.heard(make_beat("w2", leaving=True), now - 0.5)
    told = msgspec.to_builtins(parts.observed.fleet())
    assert [(each["id"], each["age_s"]) for each in told] == [
        ("w0", 1.25),
        ("w1", 0.0),
        ("w2", 0.5),
    ]
    assert told[1] == {
        "id": "w1",
        "model": "tiny",
        "slots": 2,
        "in_flight": 1,
        "queued": 1,
        "accepting": True,
        "leaving": False,
        "version": __version__,
        "age_s": 0.0,
    }
    assert told[2]["leaving"]
    assert (told[0]["model"], told[0]["in_flight"], told[0]["queued"]) == ("other", 5, 2)
