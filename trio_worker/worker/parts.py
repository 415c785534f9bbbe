"""What the tasks of a worker share, made from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import trio
from loguru import logger
from trio_util import AsyncValue

from trio_worker.config import Config
from trio_worker.core.memory import MB, PressureGauge
from trio_worker.flow.hand_on import HandOn
from trio_worker.flow.job import JobsHeld
from trio_worker.flow.live_set import LiveSet
from trio_worker.flow.reception import Reception
from trio_worker.flow.serving import Serving, make_serving
from trio_worker.flow.troubles import Troubles
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, Heartbeats, heartbeats
from trio_worker.monitoring.observed_worker import ObservedWorker
from trio_worker.monitoring.worker_parts import WorkerParts
from trio_worker.ports import (
    Broker,
    Engine,
)
from trio_worker.stages.beat import OwnBeat
from trio_worker.stages.notify import Standing
from trio_worker.stages.pulse import PULSE_S
from trio_worker.worker.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What the tasks of one worker share."""

    config: Config
    world: World
    broker: Broker
    serving: Serving
    reception: Reception
    batches: BatchCounters
    counters: RequestCounters
    beats: Heartbeats
    hand_on: HandOn
    own_beat: OwnBeat
    observed: ObservedWorker
    standing: Standing
    stops: AsyncValue[int]
    """How often the worker has been asked to stop."""
    ready: trio.Event
    """Requests reach the worker."""
    jobs_held: JobsHeld
    jobs_troubles: Troubles

    @property
    def speaks_native(self) -> bool:
        """Whether requests are taken in the worker's own dialect: then it is one of a fleet."""
        return "native" in self.config.nats.dialects

    @property
    def has_controllers(self) -> bool:
        """Whether it is a member of the clusters of mlx-serving's controllers."""
        return "mlx-serving" in self.config.nats.dialects

    @property
    def drain_timeout_s(self) -> float:
        return self.config.worker.drain_timeout_ms / 1000

    @property
    def longest_drain_s(self) -> float:
        """Of the worker and of the gateway beside it, which drain at the same time."""
        if self.world.open_gateway is None:
            return self.drain_timeout_s
        return max(self.drain_timeout_s, self.config.gateway.drain_timeout_ms / 1000)


def make_worker(
    config: Config,
    world: World,
    *,
    broker: Broker,
    engine: Engine,
    standing: Standing,
    stops: AsyncValue[int],
    ready: trio.Event,
) -> Worker:
    worker, limits = config.worker, config.worker.resource_limits
    beats = heartbeats(
        trio.current_time(),
        turn_timeout_s=worker.continuous_batching.turn_timeout_ms / 1000,
        check_interval_s=limits.check_interval_ms / 1000,
        report_interval_s=worker.monitoring.report_interval_ms / 1000,
        pulse_s=PULSE_S,
        beat_interval_s=config.fleet.beat_interval_ms / 1000,
    )
    gauge = PressureGauge(
        soft_bytes=limits.max_memory_mb * MB, critical_bytes=limits.critical_memory_mb * MB
    )
    serving = make_serving(
        worker,
        engine=engine,
        gauge=gauge,
        on_queued=lambda: beats.batcher.wake(Awaited.WORK, trio.current_time()),
    )
    logger.info(
        "Queue of {} places and {} priorities, batches of up to {}, memory limits {} and {} MB",
        serving.admission.max_depth,
        serving.levels,
        serving.scheduler.slots,
        limits.max_memory_mb,
        limits.critical_memory_mb,
    )
    batches, counters = BatchCounters(), RequestCounters()
    live = LiveSet(
        own_id=worker.id,
        model=worker.model_name,
        forget_after_s=config.fleet.forget_after_ms / 1000,
    )
    held, troubles = JobsHeld(), Troubles("Durable jobs")
    takes_jobs = config.nats.jetstream.enabled
    observed = ObservedWorker(
        WorkerParts(
            config=worker,
            admission=serving.admission,
            door=serving.door,
            queue=serving.queue,
            scheduler=serving.scheduler,
            batches=batches,
            counters=counters,
            engine=engine,
            broker=broker,
            heartbeats=beats,
            live=live,
            jobs_held=held if takes_jobs else None,
            jobs_troubles=troubles if takes_jobs else None,
        )
    )
    return Worker(
        config=config,
        world=world,
        broker=broker,
        serving=serving,
        reception=Reception(serving, counters=counters, rng=world.rng),
        batches=batches,
        counters=counters,
        beats=beats,
        hand_on=HandOn(
            broker,
            serving.door,
            live,
            worker_id=worker.id,
            model=worker.model_name,
            enabled=config.fleet.hand_on,
            metrics=counters.metrics,
        ),
        own_beat=OwnBeat(broker, serving.door, worker_id=worker.id, model=worker.model_name),
        observed=observed,
        standing=standing,
        stops=stops,
        ready=ready,
        jobs_held=held,
        jobs_troubles=troubles,
    )
