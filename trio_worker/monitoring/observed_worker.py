"""One view of the whole worker, for endpoints, reports and the log: it reads, never changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice

import trio

from trio_worker import __version__
from trio_worker.config import WorkerConfig
from trio_worker.core.admission import Admission
from trio_worker.core.memory import MB, DegradationStep, Pressure
from trio_worker.core.priority import name_of
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.flow.door import Door, DoorState
from trio_worker.monitoring import metrics
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Heartbeats
from trio_worker.monitoring.metrics import (
    CounterMetric,
    Description,
    GaugeReading,
    HistogramMetric,
    Labels,
)
from trio_worker.monitoring.observed import Health
from trio_worker.monitoring.snapshot import (
    BatchReading,
    EngineReading,
    InFlightReading,
    QueueReading,
    RequestsReading,
    ResourcesReading,
    Snapshot,
    TokensReading,
    WorkerReading,
)
from trio_worker.ports import Broker, Engine


class ObservedWorker:
    """Implements `ports.Observed`."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        admission: Admission,
        door: Door,
        queue: RequestQueue,
        scheduler: Scheduler,
        batches: BatchCounters,
        counters: RequestCounters,
        engine: Engine,
        broker: Broker,
        heartbeats: Heartbeats,
    ) -> None:
        self._config = config
        self._admission = admission
        self._door = door
        self._queue = queue
        self._scheduler = scheduler
        self._batches = batches
        self._counters = counters
        self._engine = engine
        self._broker = broker
        self._heartbeats = heartbeats
        self._started_at = trio.current_time()
        self.is_subscribed = False
        """Set by the worker once requests reach it."""

    def liveness(self) -> Health:
        """False while a loop gives no sign of life within its bound; the reason names it."""
        now = trio.current_time()
        late = [
            f"{each.loop} has not come round for {each.silent_s(now):.0f} s "
            f"(bound: {each.bound_s:g} s)"
            for each in self._heartbeats.late(now)
        ]
        if late:
            return Health(ok=False, reason="stuck: " + ", ".join(late))
        return Health(ok=True, reason="the loops make progress")

    def readiness(self) -> Health:
        """True when a request sent now would be taken."""
        if self._door.state.value is DoorState.OPEN:
            if not self.is_subscribed:
                return Health(ok=False, reason="loading: not subscribed to requests yet")
            if not self._broker.statistics().connected:
                return Health(ok=False, reason="nats: the connection is down")
            return Health(ok=True, reason="accepting requests")
        if not self._admission.draining and self._engine.statistics().state == "restarting":
            return Health(ok=False, reason="restarting: the engine was lost and starts again")
        return Health(ok=False, reason=self._admission.why_not_accepting())

    def resources(self) -> ResourcesReading:
        """Memory against its limits, and what is done about it."""
        gauge, limits = self._admission.gauge, self._config.resource_limits
        degradations = self._counters.metrics.degradations.values
        return ResourcesReading(
            memory_mb=round(gauge.used / MB, 1),
            reserved_mb=round(self._scheduler.ledger.reserved_bytes / MB, 1),
            can_accept_request=gauge.level is not Pressure.CRITICAL,
            under_pressure=gauge.level is not Pressure.NORMAL,
            pressure=gauge.level,
            steps=[step for step in DegradationStep if step in gauge.steps],
            degradations={step: count for (step,), count in degradations.items() if count},
            available_mb=round(gauge.available / MB, 1),
            limits={
                "max_memory_mb": limits.max_memory_mb,
                "critical_memory_mb": limits.critical_memory_mb,
            },
        )

    def snapshot(self) -> Snapshot:
        now = trio.current_time()
        admission, batches, counters = self._admission, self._batches, self._counters
        engine = self._engine.statistics()
        written = counters.metrics
        running = list(self._scheduler.running.values())
        by_level = self._queue.by_level()
        levels = self._config.request_queue.priority_levels
        per_token = engine.info.cache_bytes_per_token if engine.info else 0
        return Snapshot(
            worker=WorkerReading(
                id=self._config.id,
                version=__version__,
                state=self._state(engine.state),
                uptime_s=round(now - self._started_at, 3),
            ),
            queue=QueueReading(
                depth=admission.depth,
                max_depth=admission.max_depth,
                is_full=admission.is_full,
                by_priority={
                    name_of(level, levels): by_level.get(level, 0) for level in range(levels)
                },
                promotions=self._queue.promotions,
                waiting_for_place=admission.waiting,
            ),
            batch=BatchReading(
                running=len(running),
                max_batch_size=self._scheduler.slots,
                turns=batches.turns,
                mean_batch_size=round(batches.decoded / max(batches.decode_turns, 1), 3),
                max_batch_seen=batches.max_batch_seen,
                last_formation_ms=round(batches.last_formation_ms, 3),
                by_trigger=dict(batches.by_trigger),
                preemptions=written.preemptions.total(),
            ),
            resources=self.resources(),
            engine=EngineReading(
                pid=engine.pid,
                state=engine.state,
                model=self._config.model_name,
                restarts=engine.restarts,
                resumed=written.resumed.total(),
                context_length=engine.info.context_length if engine.info else None,
                cache_bytes_per_token=per_token or None,
                device=engine.info.device if engine.info else None,
                memory_active_mb=round(batches.engine_memory.active / MB, 1),
                memory_cache_mb=round(batches.engine_memory.cache / MB, 1),
            ),
            requests=RequestsReading(
                in_flight=len(admission.in_flight),
                completed=counters.by_outcome["ok"],
                by_outcome=dict(counters.by_outcome),
                by_stage=dict(Counter(each.stage.value for each in admission.in_flight.values())),
                dropped=counters.dropped,
                queue_wait_ms=counters.queue_wait.percentiles_ms(),
                time_to_first_token_ms=counters.time_to_first_token.percentiles_ms(),
                inter_token_ms=counters.inter_token.percentiles_ms(),
                request_ms=counters.request.percentiles_ms(),
                cancel_ms=counters.cancel.percentiles_ms(),
            ),
            tokens=TokensReading(
                prompt=written.prompt_tokens.total(),
                cached=written.cached_tokens.total(),
                generated=written.generated_tokens.total(),
                per_second=round(counters.throughput.per_second(now=now), 3),
            ),
            nats=self._broker.statistics(),
        )

    def metrics(self) -> Iterator[CounterMetric | HistogramMetric | GaugeReading]:
        """Every metric with its present values."""
        yield from self._counters.metrics.written()
        yield from self._readings()

    def in_flight(self, limit: int | None = None) -> list[InFlightReading]:
        """The requests in flight, the oldest first; neither prompts nor answers."""
        now = trio.current_time()
        levels = self._config.request_queue.priority_levels
        return [
            InFlightReading(
                request_id=each.request_id,
                stage=each.stage,
                priority=name_of(each.level, levels),
                age_s=round(now - each.arrived_at, 3),
                prompt_tokens=len(each.prompt),
                prefilled=each.prefilled,
                tokens=len(each.produced),
                max_tokens=each.max_tokens,
                resumed=each.resumed,
                preempted=each.preempted,
            )
            for each in islice(self._admission.in_flight.values(), limit)
        ]

    def _readings(self) -> Iterator[GaugeReading]:
        gauge, engine = self._admission.gauge, self._engine.statistics()
        broker, memory = self._broker.statistics(), self._batches.engine_memory
        levels = self._config.request_queue.priority_levels
        by_level = self._queue.by_level()
        depths: dict[Labels, float] = {
            (name_of(level, levels),): by_level.get(level, 0) for level in range(levels)
        }
        build = (__version__, self._config.id, self._config.model_name)
        restarts: dict[Labels, float] = dict.fromkeys(metrics.ENGINE_RESTARTS.starts, 0)
        restarts |= {(reason,): count for reason, count in engine.restarts_by_reason.items()}
        values: dict[Description, Mapping[Labels, float]] = {
            metrics.IN_FLIGHT: {(): len(self._admission.in_flight)},
            metrics.QUEUE_DEPTH: depths,
            metrics.PROMOTIONS: {(): self._queue.promotions},
            metrics.MEMORY: {
                ("used",): gauge.used,
                ("engine_active",): memory.active,
                ("engine_cache",): memory.cache,
                ("available",): gauge.available,
                ("soft",): gauge.soft_bytes,
                ("hard",): gauge.critical_bytes,
            },
            metrics.RESERVED: {(): self._scheduler.ledger.reserved_bytes},
            metrics.PRESSURE: {(): list(Pressure).index(gauge.level)},
            metrics.ENGINE_RESTARTS: restarts,
            metrics.CONNECTED: {(): int(broker.connected)},
            metrics.RECONNECTS: {(): broker.reconnects},
            metrics.SLOW_CONSUMER: {(): broker.slow_consumers},
            metrics.READY: {(): int(self.readiness().ok)},
            metrics.BUILD_INFO: {build: 1},
        }
        for description, readings in values.items():
            yield GaugeReading(description=description, values=readings)

    def _state(self, engine_state: str) -> str:
        if self._admission.draining:
            return "draining"
        return engine_state
