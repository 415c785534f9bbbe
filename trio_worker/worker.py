"""The nursery tree and the order of the drain: the only file that wires.

    run_worker
    ├ run_notify             from the first moment to the last: the service manager is told
    └ open_broker            closed last: flushed and bounded
      └ open_engine          the engine; returns while the model loads
        └ services           cancelled when `requests` is empty; a crash here cancels all below
          ├ run_batcher, run_monitor, run_readiness, run_reporter, run_control, run_service,
          │ run_pulse, run_beat, serve_http
          ├ gateway          HTTP in a process of its own: drains from the stop on, is waited for
          └ requests         at drain: deadline = now + drain_timeout
            ├ respond(r)     one per admitted request; scope = the request's deadline
            ├ do_job(j)      one per durable job, from its delivery to the stored answer
            └ intake         left when everything that had arrived is answered or admitted
              ├ run_intake   subscribes when the engine is ready
              ├ run_jobs     takes durable jobs, one for each free slot
              └ run_controller  a member of mlx-serving's clusters, where that is spoken

Whatever ends the worker, everything below goes first, and the terminal messages that the requests
put into the outbox while they end are delivered by the broker's close.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio
from loguru import logger
from trio_util import AsyncValue, move_on_when

from trio_worker.config import Config
from trio_worker.core.memory import MB, PressureGauge
from trio_worker.core.sequence import Ending
from trio_worker.errors import WorkerFault
from trio_worker.flow.hand_on import HandOn
from trio_worker.flow.job import JobsHeld, JobStreams
from trio_worker.flow.live_set import LiveSet
from trio_worker.flow.reception import Reception, Respond
from trio_worker.flow.serving import Serving, make_serving
from trio_worker.flow.troubles import Troubles
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.monitoring.counters import BatchCounters, JobCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, Heartbeats, heartbeats
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.observed_worker import ObservedWorker
from trio_worker.monitoring.worker_parts import WorkerParts
from trio_worker.ports import (
    Broker,
    Engine,
    Host,
    MemoryProbe,
    Message,
    ProgressSink,
    ServiceManager,
    StackSampler,
)
from trio_worker.protocol.turn import EngineInfo
from trio_worker.stages.batcher import run_batcher
from trio_worker.stages.beat import OwnBeat, run_beat
from trio_worker.stages.claim import claim_id
from trio_worker.stages.control import Control, run_control
from trio_worker.stages.controller import Departure, run_controller
from trio_worker.stages.intake import IntakeBuffer, open_intake_buffer, run_intake
from trio_worker.stages.job import JobMeans, do_job
from trio_worker.stages.jobs import run_jobs
from trio_worker.stages.monitor import read_memory, run_monitor
from trio_worker.stages.notify import Standing, run_notify
from trio_worker.stages.pulse import PULSE_S, run_pulse
from trio_worker.stages.readiness import run_readiness
from trio_worker.stages.reporter import run_reporter
from trio_worker.stages.respond import respond
from trio_worker.stages.service import Endpoint, run_service
from trio_worker.wire import subjects
from trio_worker.wire.mlx_serving import Member, member_id


class ServeHttp(Protocol):
    """Serves the monitoring endpoints; started with the port that it listens on."""

    def __call__(
        self, *, host: str, port: int, observed: Observed, task_status: trio.TaskStatus[int]
    ) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a worker is given from outside, and who is told how it goes."""

    stops: AsyncIterable[object]
    """The first item begins a drain, a second one cuts it short; one that comes before the worker
    is ready ends the run there."""
    open_broker: Callable[[], AbstractAsyncContextManager[Broker]]
    open_engine: Callable[[], AbstractAsyncContextManager[Engine]]
    probe: MemoryProbe
    rng: random.Random
    """Draws request ids and seeds, which callers see."""
    wall_clock: Callable[[], float]
    """Seconds since the epoch, for people to read."""
    host: Host | None = None
    """Has to be there where mlx-serving's dialect is spoken: its controllers are told of it."""
    serve_http: ServeHttp | None = None
    open_gateway: Callable[[AsyncValue[int]], AbstractAsyncContextManager[None]] | None = None
    """What takes requests over HTTP beside the worker, for as long as the block. It is given how
    often the worker has been asked to stop, and acts on that as the worker does; leaving waits for
    its end."""
    service_manager: ServiceManager | None = None
    standing: Standing | None = None
    """Given by who has more to tell the service manager, such as the progress of the load."""
    sampler: StackSampler | None = None
    """Says what has blocked the event loop, if that runs on the real clock."""
    greet: Callable[[Broker], Awaitable[None]] | None = None
    """Runs beside the requests once the worker is ready."""
    on_ready: Callable[[Observed], None] | None = None
    on_progress: ProgressSink | None = None
    """Told how many of the requests that a drain began with have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
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
    def drain_timeout_s(self) -> float:
        return self.config.worker.drain_timeout_ms / 1000

    @property
    def longest_drain_s(self) -> float:
        """Of the worker and of the gateway beside it, which drain at the same time."""
        if self.world.open_gateway is None:
            return self.drain_timeout_s
        return max(self.drain_timeout_s, self.config.gateway.drain_timeout_ms / 1000)


async def run_worker(config: Config, world: World) -> None:
    """Serve until `world.stops` yields, then drain; returns when nothing of the worker is left.

    Raises:
        StopWorker: alone or in exception groups, with the status to exit with.
    """
    standing = world.standing or Standing()
    stops, ready = AsyncValue(0), trio.Event()
    async with trio.open_nursery() as root:
        if world.service_manager is not None:
            report_interval_s = config.worker.monitoring.report_interval_ms / 1000
            root.start_soon(
                partial(run_notify, report_interval_s=report_interval_s),
                world.service_manager,
                standing,
            )
        root.start_soon(_count_stops, world.stops, stops)
        run = trio.CancelScope()
        root.start_soon(_stop_while_loading, stops, ready, run, standing)
        with run:
            async with world.open_broker() as broker, world.open_engine() as engine:
                await _serve(
                    _make_worker(
                        config,
                        world,
                        broker=broker,
                        engine=engine,
                        standing=standing,
                        stops=stops,
                        ready=ready,
                    )
                )
        root.cancel_scope.cancel(reason="the worker has ended")


async def _serve(worker: _Worker) -> None:
    """The tasks of a worker, from the first to the last."""
    world = worker.world
    async with trio.open_nursery() as services:
        services.start_soon(_run_batcher, worker)
        services.start_soon(_run_monitor, worker)
        services.start_soon(_run_readiness, worker)
        services.start_soon(_run_pulse, worker)
        services.start_soon(_watch_broker, worker.broker)
        services.start_soon(_show_drain, worker)
        if world.serve_http is not None and worker.config.worker.monitoring.port is not None:
            await services.start(_serve_http, worker, world.serve_http)
        services.start_soon(_run_reporter, worker)
        async with _gateway(worker):
            await _serve_requests(worker, services)
        services.cancel_scope.cancel(reason="drained")


async def _serve_requests(worker: _Worker, services: trio.Nursery) -> None:
    """From the loaded model to the last answer of the drain."""
    world, door = worker.world, worker.serving.door
    info = await _wait_loaded(worker)
    send, receive = open_intake_buffer()
    reply_prefixes = worker.config.nats.reply_prefixes
    control = Control(worker.broker, door, reply_prefixes, worker.hand_on.cancel)
    await services.start(_run_control, worker, control, send.clone())
    speaks_native = "native" in worker.config.nats.dialects
    if speaks_native:
        # Whoever asks for workers in this way goes on to ask them in the native dialect.
        await services.start(_run_service, worker, info)
        await services.start(_run_beat, worker)
    async with _jetstream(worker) as jetstream, trio.open_nursery() as requests:
        async with trio.open_nursery() as intake:
            if speaks_native:
                await intake.start(_run_intake, worker, requests, (send, receive), control)
            else:
                receive.close()  # so control messages are acted on at once
            if jetstream is not None:
                await intake.start(_run_jobs, worker, requests, jetstream)
            departure = await _join_controllers(worker, intake, requests)
            services.start_soon(worker.standing.follow, door.state)
            _say_ready(worker, info)
            if world.greet is not None:
                services.start_soon(world.greet, worker.broker)
            await worker.stops.wait_value(_once)
            # To cancel a nursery that has been left changes nothing.
            services.start_soon(_cut_short, worker.stops, requests.cancel_scope)  # noqa: ASYNC111
            try:
                await _leave_controllers(departure)
            finally:
                _begin_drain(worker)
        # Intake has ended: nothing comes in any more. What has no token yet goes.
        _end_without_a_token(worker)
        # What runs may finish; at the deadline the rest ends with WORKER_DRAINING.
        requests.cancel_scope.deadline = trio.current_time() + worker.drain_timeout_s
    await worker.hand_on.settle()
    logger.info("Drained")


async def _wait_loaded(worker: _Worker) -> EngineInfo:
    """Return once the model is loaded, memory has been read and the worker's id is ours."""
    serving, config = worker.serving, worker.config
    info = await serving.engine.wait_ready()
    serving.ledger.bytes_per_token = info.cache_bytes_per_token
    read_memory(worker.world.probe, serving.engine, serving.gauge, serving.scheduler)
    await claim_id(worker.broker, config.worker.id, config.nats.reply_prefixes)
    return info


def _say_ready(worker: _Worker, info: EngineInfo) -> None:
    """Requests reach the worker: whoever waits for that is told."""
    worker.ready.set()
    logger.info("Worker {} serves {} on {}", worker.config.worker.id, info.model, info.device)
    worker.observed.is_subscribed = True
    worker.standing.serving(worker.observed)
    if worker.world.on_ready is not None:
        worker.world.on_ready(worker.observed)


def _jetstream(worker: _Worker) -> AbstractAsyncContextManager[JetStream | None]:
    if not worker.config.nats.jetstream.enabled:
        return nullcontext()
    broker = worker.broker
    life = broker.new_inbox().rpartition(".")[2]
    return open_jetstream(broker, inbox=subjects.jetstream_inbox(worker.config.worker.id, life))


def _gateway(worker: _Worker) -> AbstractAsyncContextManager[None]:
    open_gateway = worker.world.open_gateway
    return nullcontext() if open_gateway is None else open_gateway(worker.stops)


# --- how it stops ---------------------------------------------------------------------------


async def _count_stops(stops: AsyncIterable[object], count: AsyncValue[int]) -> None:
    async for _ in stops:
        count.value += 1


def _once(count: int) -> bool:
    return count >= 1


def _twice(count: int) -> bool:
    return count >= 2


async def _stop_while_loading(
    stops: AsyncValue[int], ready: trio.Event, run: trio.CancelScope, standing: Standing
) -> None:
    """Until requests reach the worker there is nothing to drain: a stop ends the run."""
    async with move_on_when(ready.wait):
        await stops.wait_value(_once)
        if not ready.is_set():
            logger.info("Stopping before the worker was ready")
            standing.stopping(0)
            run.cancel(reason="stopped before the worker was ready")


async def _leave_controllers(departure: Departure | None) -> None:
    """Return when no controller sends anything any more; what it has sent is served as ever."""
    if departure is not None:
        departure.asked.set()
        await departure.done.wait()


def _begin_drain(worker: _Worker) -> None:
    worker.standing.stopping(worker.longest_drain_s)
    logger.info("Draining: {} requests in flight", len(worker.serving.admission.in_flight))
    worker.serving.door.close()
    # In the same section: it is the first that anybody else hears of the drain.
    worker.own_beat.say()


def _end_without_a_token(worker: _Worker) -> None:
    """Whose caller asks another worker, that is: mlx-serving's controllers ask nobody again."""
    for sequence in list(worker.serving.admission.in_flight.values()):
        is_asked_again = sequence.subject != _from_controllers(worker)
        if is_asked_again and not any(row.produced for row in sequence.rows):
            sequence.end(Ending.DRAINING)


async def _cut_short(stops: AsyncValue[int], requests: trio.CancelScope) -> None:
    await stops.wait_value(_twice)
    logger.warning("Stopping now: running requests end with WORKER_DRAINING")
    requests.cancel(reason="asked to stop a second time")


async def _show_drain(worker: _Worker) -> None:
    """From the stop on, say how many requests have ended at each that does, until all have."""
    on_progress, door = worker.world.on_progress, worker.serving.door
    await worker.stops.wait_value(_once)
    in_flight = door.admission.in_flight
    total = left = len(in_flight)
    if not total or on_progress is None:
        return
    on_progress("draining", 0, total, "requests")
    while left:
        await door.changed.wait()
        if len(in_flight) != left:
            left = len(in_flight)
            on_progress("draining", total - left, total, "requests")


# --- its tasks, with what each is given -----------------------------------------------------


async def _run_batcher(worker: _Worker) -> None:
    await run_batcher(
        worker.serving,
        batches=worker.batches,
        counters=worker.counters,
        heartbeat=worker.beats.batcher,
    )


async def _run_monitor(worker: _Worker) -> None:
    serving, limits = worker.serving, worker.config.worker.resource_limits
    await run_monitor(
        probe=worker.world.probe,
        engine=serving.engine,
        gauge=serving.gauge,
        scheduler=serving.scheduler,
        door=serving.door,
        heartbeat=worker.beats.monitor,
        check_interval_s=limits.check_interval_ms / 1000,
        relief_timeout_s=limits.relief_timeout_ms / 1000,
    )


async def _run_readiness(worker: _Worker) -> None:
    serving = worker.serving
    await run_readiness(engine=serving.engine, door=serving.door, batcher=worker.beats.batcher)


async def _run_pulse(worker: _Worker) -> None:
    await run_pulse(worker.counters.metrics, worker.beats.pulse, worker.world.sampler)


async def _run_reporter(worker: _Worker) -> None:
    await run_reporter(
        broker=worker.broker,
        worker_id=worker.config.worker.id,
        snapshot=worker.observed.snapshot,
        heartbeat=worker.beats.reporter,
        interval_s=worker.config.worker.monitoring.report_interval_ms / 1000,
    )


async def _serve_http(  # noqa: ASYNC128 - what it runs reports the start
    worker: _Worker, serve_http: ServeHttp, *, task_status: trio.TaskStatus[int]
) -> None:
    monitoring = worker.config.worker.monitoring
    assert monitoring.port is not None
    await serve_http(
        host=monitoring.host,
        port=monitoring.port,
        observed=worker.observed,
        task_status=task_status,
    )


async def _run_control(  # noqa: ASYNC128 - what it runs reports the start
    worker: _Worker,
    control: Control,
    intake: trio.MemorySendChannel[Message],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    await run_control(
        control,
        broker=worker.broker,
        door=worker.serving.door,
        worker_id=worker.config.worker.id,
        intake=intake,
        heartbeat=worker.beats.intake,
        task_status=task_status,
    )


async def _run_service(  # noqa: ASYNC128 - what it runs reports the start
    worker: _Worker, info: EngineInfo, *, task_status: trio.TaskStatus[None]
) -> None:
    await run_service(
        broker=worker.broker,
        worker=worker.config.worker,
        info=info,
        counters=worker.counters,
        snapshot=worker.observed.snapshot,
        reply_prefixes=worker.config.nats.reply_prefixes,
        started_at=worker.world.wall_clock(),
        also=_controllers_endpoint(worker),
        task_status=task_status,
    )


async def _run_beat(  # noqa: ASYNC128 - what it runs reports the start
    worker: _Worker, *, task_status: trio.TaskStatus[None]
) -> None:
    await run_beat(
        worker.own_beat,
        broker=worker.broker,
        door=worker.serving.door,
        hand_on=worker.hand_on,
        ready=worker.ready,
        heartbeat=worker.beats.beat,
        interval_s=worker.config.fleet.beat_interval_ms / 1000,
        task_status=task_status,
    )


def _controllers_endpoint(worker: _Worker) -> tuple[Endpoint, ...]:
    if "mlx-serving" not in worker.config.nats.dialects:
        return ()
    return (Endpoint(name="controller", subject=_from_controllers(worker)),)


def _from_controllers(worker: _Worker) -> str:
    return subjects.from_controllers(member_id(worker.config.worker.id))


async def _run_intake(  # noqa: ASYNC128 - what it runs reports the start
    worker: _Worker,
    requests: trio.Nursery,
    buffer: IntakeBuffer,
    control: Control,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    await run_intake(
        requests,
        serving=worker.serving,
        reception=worker.reception,
        broker=worker.broker,
        respond=_respond(worker),
        buffer=buffer,
        act_on_control=control.act,
        worker_id=worker.config.worker.id,
        reply_prefixes=worker.config.nats.reply_prefixes,
        hand_on=worker.hand_on,
        counters=worker.counters,
        heartbeat=worker.beats.intake,
        task_status=task_status,
    )


def _respond(worker: _Worker) -> Respond:
    return partial(
        respond,
        serving=worker.serving,
        counters=worker.counters,
        worker_id=worker.config.worker.id,
        wall_clock=worker.world.wall_clock,
    )


async def _run_jobs(  # noqa: ASYNC128 - what it runs reports the start
    worker: _Worker,
    requests: trio.Nursery,
    jetstream: JetStream,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    config = worker.config.nats.jetstream
    names = JobStreams(jobs=config.stream, results=config.results, dead=config.dead)
    counters = JobCounters(worker.counters.metrics)
    means = JobMeans(
        jetstream=jetstream,
        streams=names,
        serving=worker.serving,
        reception=worker.reception,
        respond=_respond(worker),
        held=worker.jobs_held,
        counters=counters,
        troubles=worker.jobs_troubles,
        worker_id=worker.config.worker.id,
        max_deliver=config.max_deliver,
        ack_wait_s=config.ack_wait_ms / 1000,
    )
    await run_jobs(
        requests,
        jetstream=jetstream,
        names=names,
        keep_results_s=config.keep_results_s,
        ack_wait_s=means.ack_wait_s,
        serving=worker.serving,
        held=worker.jobs_held,
        do_job=partial(do_job, means=means),
        counters=counters,
        troubles=worker.jobs_troubles,
        task_status=task_status,
    )


async def _join_controllers(
    worker: _Worker, intake: trio.Nursery, requests: trio.Nursery
) -> Departure | None:
    """Run the membership in `intake`, where the dialect is spoken; returns how to end it."""
    if "mlx-serving" not in worker.config.nats.dialects:
        return None
    world, config, serving = worker.world, worker.config.worker, worker.serving
    assert world.host is not None, "who speaks mlx-serving's dialect says where it runs"
    departure = Departure()
    await intake.start(
        partial(
            run_controller,
            member=Member(
                id=member_id(config.id),
                hostname=world.host.hostname,
                ip=world.host.address,
                port=config.monitoring.port,
                model_name=config.model_name,
                model=config.model,
                loaded_at=world.wall_clock(),
            ),
            reception=worker.reception,
            door=serving.door,
            broker=worker.broker,
            respond=_respond(worker),
            worker_id=config.id,
            counters=worker.counters,
            memory_bytes=lambda: serving.gauge.used,
            cpu_percent=world.host.cpu_percent,
            wall_clock=world.wall_clock,
            departure=departure,
        ),
        requests,
    )
    return departure


async def _watch_broker(broker: Broker) -> None:
    reason = await broker.wait_lost()
    raise WorkerFault(f"the connection to NATS has ended for good: {reason}")


# --- what it is made of ---------------------------------------------------------------------


def _make_worker(
    config: Config,
    world: World,
    *,
    broker: Broker,
    engine: Engine,
    standing: Standing,
    stops: AsyncValue[int],
    ready: trio.Event,
) -> _Worker:
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
    return _Worker(
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
