"""The nursery tree and the order of the drain: who owns whom, and what ends when.

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

from collections.abc import AsyncIterable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial

import trio
from loguru import logger
from trio_util import AsyncValue, move_on_when

from trio_worker.config import Config
from trio_worker.core.sequence import Ending
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.protocol.turn import EngineInfo
from trio_worker.stages.claim import claim_id
from trio_worker.stages.control import Control
from trio_worker.stages.controller import Departure
from trio_worker.stages.intake import open_intake_buffer
from trio_worker.stages.monitor import read_memory
from trio_worker.stages.notify import Standing, run_notify
from trio_worker.wire import subjects
from trio_worker.worker import tasks
from trio_worker.worker.parts import Worker, make_worker
from trio_worker.worker.world import World


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
                    make_worker(
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


async def _serve(worker: Worker) -> None:
    """The tasks of a worker, from the first to the last."""
    world = worker.world
    async with trio.open_nursery() as services:
        services.start_soon(tasks.batcher, worker)
        services.start_soon(tasks.monitor, worker)
        services.start_soon(tasks.readiness, worker)
        services.start_soon(tasks.pulse, worker)
        services.start_soon(tasks.watch_broker, worker.broker)
        services.start_soon(_show_drain, worker)
        if world.serve_http is not None and worker.config.worker.monitoring.port is not None:
            await services.start(tasks.serve_http, worker, world.serve_http)
        services.start_soon(tasks.reporter, worker)
        async with _gateway(worker):
            await _serve_requests(worker, services)
        services.cancel_scope.cancel(reason="drained")


async def _serve_requests(worker: Worker, services: trio.Nursery) -> None:
    """From the loaded model to the last answer of the drain."""
    world, door = worker.world, worker.serving.door
    info = await _wait_loaded(worker)
    send, receive = open_intake_buffer()
    reply_prefixes = worker.config.nats.reply_prefixes
    control = Control(worker.broker, door, reply_prefixes, worker.hand_on.cancel)
    await services.start(tasks.control, worker, control, send.clone())
    if worker.speaks_native:
        # Whoever asks for workers in this way goes on to ask them in the native dialect.
        await services.start(tasks.service, worker, info)
        await services.start(tasks.beat, worker)
    async with _jetstream(worker) as jetstream, trio.open_nursery() as requests:
        async with trio.open_nursery() as intake:
            if worker.speaks_native:
                await intake.start(tasks.intake, worker, requests, (send, receive), control)
            else:
                receive.close()  # so control messages are acted on at once
            if jetstream is not None:
                await intake.start(tasks.jobs, worker, requests, jetstream)
            departure = await tasks.join_controllers(worker, intake, requests)
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


async def _wait_loaded(worker: Worker) -> EngineInfo:
    """Return once the model is loaded, memory has been read and the worker's id is ours."""
    serving, config = worker.serving, worker.config
    info = await serving.engine.wait_ready()
    serving.ledger.bytes_per_token = info.cache_bytes_per_token
    read_memory(worker.world.probe, serving.engine, serving.gauge, serving.scheduler)
    await claim_id(worker.broker, config.worker.id, config.nats.reply_prefixes)
    return info


def _say_ready(worker: Worker, info: EngineInfo) -> None:
    """Requests reach the worker: whoever waits for that is told."""
    worker.ready.set()
    logger.info("Worker {} serves {} on {}", worker.config.worker.id, info.model, info.device)
    worker.observed.is_subscribed = True
    worker.standing.serving(worker.observed)
    if worker.world.on_ready is not None:
        worker.world.on_ready(worker.observed)


def _jetstream(worker: Worker) -> AbstractAsyncContextManager[JetStream | None]:
    if not worker.config.nats.jetstream.enabled:
        return nullcontext()
    broker = worker.broker
    life = broker.new_inbox().rpartition(".")[2]
    return open_jetstream(broker, inbox=subjects.jetstream_inbox(worker.config.worker.id, life))


def _gateway(worker: Worker) -> AbstractAsyncContextManager[None]:
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


def _begin_drain(worker: Worker) -> None:
    worker.standing.stopping(worker.longest_drain_s)
    logger.info("Draining: {} requests in flight", len(worker.serving.admission.in_flight))
    worker.serving.door.close()
    if worker.speaks_native:
        # In the same section: it is the first that anybody else hears of the drain.
        worker.own_beat.say()


def _end_without_a_token(worker: Worker) -> None:
    """Whose caller asks another worker, that is: mlx-serving's controllers ask nobody again."""
    for sequence in list(worker.serving.admission.in_flight.values()):
        is_asked_again = sequence.subject != tasks.from_controllers(worker)
        if is_asked_again and not any(row.produced for row in sequence.rows):
            sequence.end(Ending.DRAINING)


async def _cut_short(stops: AsyncValue[int], requests: trio.CancelScope) -> None:
    await stops.wait_value(_twice)
    logger.warning("Stopping now: running requests end with WORKER_DRAINING")
    requests.cancel(reason="asked to stop a second time")


async def _show_drain(worker: Worker) -> None:
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
