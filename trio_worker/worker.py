"""The nursery tree and the order of the drain: the only file that wires.

    run_worker
    ├ run_notify             from the first moment to the last: the service manager is told
    └ open_broker            closed last: flushed and bounded
      └ open_engine          the engine; returns while the model loads
        └ services           cancelled when `requests` is empty; a crash here cancels all below
          ├ run_batcher, run_monitor, run_readiness, run_reporter, run_control, run_service,
          │ run_pulse, serve_http
          └ requests         at drain: deadline = now + drain_timeout
            ├ respond(r)     one per admitted request; scope = the request's deadline
            └ run_intake     subscribes when the engine is ready

Whatever ends the worker, everything below goes first, and the terminal messages that the requests
put into the outbox while they end are delivered by the broker's close.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol

import trio
from loguru import logger

from trio_worker.config import Config, WorkerConfig
from trio_worker.core.admission import Admission
from trio_worker.core.formation import Formation
from trio_worker.core.memory import MB, PressureGauge, ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.priority import held_most_s, level_of
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Ending
from trio_worker.errors import WorkerFault
from trio_worker.flow.door import Door
from trio_worker.flow.request_channel import open_priority_channel
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, heartbeats
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.observed_worker import Overview
from trio_worker.ports import (
    Broker,
    Engine,
    MemoryProbe,
    ProgressSink,
    ServiceManager,
    StackSampler,
)
from trio_worker.stages.batcher import BatchRules, run_batcher
from trio_worker.stages.claim import claim_id
from trio_worker.stages.control import Control, run_control
from trio_worker.stages.intake import open_intake_buffer, run_intake
from trio_worker.stages.monitor import read_memory, run_monitor
from trio_worker.stages.notify import Standing, run_notify
from trio_worker.stages.pulse import PULSE_S, run_pulse
from trio_worker.stages.readiness import run_readiness
from trio_worker.stages.reporter import run_reporter
from trio_worker.stages.respond import respond
from trio_worker.stages.service import run_service
from trio_worker.supervisor.restart_budget import RestartBudget
from trio_worker.wire.native import RequestLimits


class ServeHttp(Protocol):
    """Serves the monitoring endpoints; started with the port that it listens on."""

    def __call__(
        self, *, host: str, port: int, observed: Observed, task_status: trio.TaskStatus[int]
    ) -> Awaitable[None]: ...


class _Stop:
    """What asks the worker to stop: the first time gently, the second time at once."""

    def __init__(
        self, run: trio.CancelScope, standing: Standing, *, drain_timeout_s: float
    ) -> None:
        self.requested = trio.Event()
        self._run = run
        self._standing = standing
        self._drain_timeout_s = drain_timeout_s
        self._requests: trio.CancelScope | None = None

    def ready(self, requests: trio.CancelScope) -> None:
        """From now on a first call begins a drain, and a second one cancels `requests`."""
        self._requests = requests

    async def listen(self, stops: AsyncIterable[object]) -> None:
        async for _ in stops:
            if self._requests is None:
                logger.info("Stopping before the worker was ready")
                self._standing.stopping(0)
                self._run.cancel(reason="stopped before the worker was ready")
            elif self.requested.is_set():
                logger.warning("Stopping now: running requests end with WORKER_DRAINING")
                self._requests.cancel(reason="asked to stop a second time")
            else:
                self._standing.stopping(self._drain_timeout_s)
                self.requested.set()


async def run_worker(
    config: Config,
    *,
    stops: AsyncIterable[object],
    open_broker: Callable[[], AbstractAsyncContextManager[Broker]],
    open_engine: Callable[[], AbstractAsyncContextManager[Engine]],
    probe: MemoryProbe,
    rng: random.Random,
    wall_clock: Callable[[], float],
    serve_http: ServeHttp | None = None,
    greet: Callable[[Broker], Awaitable[None]] | None = None,
    on_ready: Callable[[Observed], None] | None = None,
    on_progress: ProgressSink | None = None,
    service_manager: ServiceManager | None = None,
    standing: Standing | None = None,
    sampler: StackSampler | None = None,
) -> None:
    """Serve until `stops` yields, then drain; returns when nothing of the worker is left.

    A second item of `stops` cuts the drain short; one that comes before the worker is ready ends
    the run there. `greet` runs beside the requests once the worker is ready. `standing` is given
    by who has more to tell the service manager, such as the progress of the load. `sampler` says
    what has blocked the event loop, if that runs on the real clock. `on_progress` is told how many
    of the requests that a drain began with have ended.

    Raises:
        StopWorker: alone or in exception groups, with the status to exit with.
    """
    worker = config.worker
    standing = standing or Standing()
    async with trio.open_nursery() as root:
        if service_manager is not None:
            report_interval_s = worker.monitoring.report_interval_ms / 1000
            root.start_soon(
                partial(run_notify, report_interval_s=report_interval_s), service_manager, standing
            )
        with trio.CancelScope() as run:
            stop = _Stop(run, standing, drain_timeout_s=worker.drain_timeout_ms / 1000)
            root.start_soon(stop.listen, stops)
            async with open_broker() as broker, open_engine() as engine:
                await _serve(
                    config,
                    stop,
                    broker=broker,
                    engine=engine,
                    probe=probe,
                    rng=rng,
                    wall_clock=wall_clock,
                    serve_http=serve_http,
                    greet=greet,
                    on_ready=on_ready,
                    on_progress=on_progress,
                    standing=standing,
                    sampler=sampler,
                )
        root.cancel_scope.cancel(reason="the worker has ended")


async def _serve(
    config: Config,
    stop: _Stop,
    *,
    broker: Broker,
    engine: Engine,
    probe: MemoryProbe,
    rng: random.Random,
    wall_clock: Callable[[], float],
    serve_http: ServeHttp | None,
    greet: Callable[[Broker], Awaitable[None]] | None,
    on_ready: Callable[[Observed], None] | None,
    on_progress: ProgressSink | None,
    standing: Standing,
    sampler: StackSampler | None,
) -> None:
    worker = config.worker
    batching, queueing, limits = (
        worker.continuous_batching,
        worker.request_queue,
        worker.resource_limits,
    )
    slots = batching.max_batch_size if batching.enabled else 1
    aging_s = None if queueing.aging_ms is None else queueing.aging_ms / 1000
    gauge = PressureGauge(
        soft_bytes=limits.max_memory_mb * MB, critical_bytes=limits.critical_memory_mb * MB
    )
    ledger = ReservationLedger(limit_bytes=gauge.critical_bytes)
    rate, arrivals = ServiceRate(), ArrivalRate()
    # Every place, and room for what leaves the batch for a while.
    queue = RequestQueue(max_size=(queueing.max_depth if queueing.enabled else slots) + slots)
    admission = Admission(
        queue_enabled=queueing.enabled,
        max_depth=queueing.max_depth,
        reject_when_full=queueing.reject_when_full,
        slots=slots,
        refuse_unmeetable=worker.requests.refuse_unmeetable,
        gauge=gauge,
        queue=queue,
        rate=rate,
        arrivals=arrivals,
    )
    door = Door(admission)
    beats = heartbeats(
        trio.current_time(),
        turn_timeout_s=batching.turn_timeout_ms / 1000,
        check_interval_s=limits.check_interval_ms / 1000,
        report_interval_s=worker.monitoring.report_interval_ms / 1000,
        pulse_s=PULSE_S,
    )
    send, receive = open_priority_channel(
        queue, on_put=lambda: beats.batcher.wake(Awaited.WORK, trio.current_time())
    )
    scheduler = Scheduler(
        slots=slots,
        prefill=PrefillBudget(
            chunk_max=batching.prefill_chunk_tokens,
            gap_target_s=worker.engine.token_gap_target_ms / 1000,
        ),
        ledger=ledger,
    )
    batches, counters = BatchCounters(), RequestCounters()
    overview = Overview(
        worker,
        admission=admission,
        door=door,
        queue=queue,
        scheduler=scheduler,
        batches=batches,
        counters=counters,
        engine=engine,
        broker=broker,
        heartbeats=beats,
    )

    logger.info(
        "Queue of {} places and {} priorities, batches of up to {}, memory limits {} and {} MB",
        admission.max_depth,
        queueing.priority_levels,
        slots,
        limits.max_memory_mb,
        limits.critical_memory_mb,
    )
    async with trio.open_nursery() as services:
        services.start_soon(
            partial(
                run_batcher,
                engine=engine,
                scheduler=scheduler,
                door=door,
                rules=_batch_rules(worker, slots, aging_s),
                budget=RestartBudget(
                    max_restarts=worker.engine.max_restarts,
                    window_s=worker.engine.restart_window_s,
                ),
                heartbeat=beats.batcher,
                gauge=gauge,
                arrivals=arrivals,
                batches=batches,
                counters=counters,
            ),
            receive,
        )
        services.start_soon(
            partial(
                run_monitor,
                probe=probe,
                engine=engine,
                gauge=gauge,
                scheduler=scheduler,
                door=door,
                heartbeat=beats.monitor,
                check_interval_s=limits.check_interval_ms / 1000,
                relief_timeout_s=limits.relief_timeout_ms / 1000,
            )
        )
        services.start_soon(partial(run_readiness, engine=engine, door=door, batcher=beats.batcher))
        services.start_soon(run_pulse, counters.metrics, beats.pulse, sampler)
        services.start_soon(_watch_broker, broker)
        services.start_soon(_show_drain, stop, door, on_progress)
        if serve_http is not None and worker.monitoring.port is not None:
            await services.start(
                partial(
                    serve_http,
                    host=worker.monitoring.host,
                    port=worker.monitoring.port,
                    observed=overview,
                )
            )
        services.start_soon(
            partial(
                run_reporter,
                broker=broker,
                worker_id=worker.id,
                snapshot=overview.snapshot,
                heartbeat=beats.reporter,
                interval_s=worker.monitoring.report_interval_ms / 1000,
            )
        )
        info = await engine.wait_ready()
        ledger.bytes_per_token = info.cache_bytes_per_token
        read_memory(probe, engine, gauge, scheduler)
        reply_prefixes = config.nats.reply_prefixes
        await claim_id(broker, worker.id, reply_prefixes)
        intake_buffer = open_intake_buffer()
        control = Control(broker, door, reply_prefixes)
        await services.start(
            partial(
                run_control,
                broker=broker,
                worker_id=worker.id,
                intake=intake_buffer[0],
                heartbeat=beats.intake,
            ),
            control,
        )
        await services.start(
            partial(
                run_service,
                broker=broker,
                worker=worker,
                info=info,
                counters=counters,
                snapshot=overview.snapshot,
                reply_prefixes=reply_prefixes,
                started_at=wall_clock(),
            )
        )
        intake_ended = trio.Event()
        async with trio.open_nursery() as requests:
            intake = partial(
                run_intake,
                requests,
                broker=broker,
                door=door,
                buffer=intake_buffer,
                act_on_control=control.act,
                respond=partial(
                    respond,
                    engine=engine,
                    door=door,
                    queue=send,
                    scheduler=scheduler,
                    counters=counters,
                    rate=rate,
                    worker_id=worker.id,
                    model_name=worker.model_name,
                    priority_levels=queueing.priority_levels,
                    default_max_tokens=worker.requests.default_max_tokens,
                    wall_clock=wall_clock,
                ),
                limits=_request_limits(config),
                worker_id=worker.id,
                reply_prefixes=reply_prefixes,
                aging_s=aging_s,
                counters=counters,
                rng=rng,
                heartbeat=beats.intake,
            )
            await requests.start(_noting_the_end, intake, intake_ended)
            services.start_soon(standing.follow, door.state)
            stop.ready(requests.cancel_scope)
            logger.info("Worker {} serves {} on {}", worker.id, info.model, info.device)
            _say_ready(overview, standing, on_ready)
            if greet is not None:
                services.start_soon(greet, broker)
            await stop.requested.wait()
            await _drain(door, intake_ended)
            # What runs may finish; at the deadline the rest ends with WORKER_DRAINING.
            requests.cancel_scope.deadline = trio.current_time() + worker.drain_timeout_ms / 1000
        logger.info("Drained")
        services.cancel_scope.cancel(reason="drained")


def _say_ready(
    overview: Overview, standing: Standing, on_ready: Callable[[Observed], None] | None
) -> None:
    """Requests reach the worker: whoever waits for that is told."""
    overview.is_subscribed = True
    standing.serving(overview)
    if on_ready is not None:
        on_ready(overview)


async def _drain(door: Door, intake_ended: trio.Event) -> None:
    """The first half of a drain: nothing comes in any more, and what has no token yet goes."""
    logger.info("Draining: {} requests in flight", len(door.admission.in_flight))
    door.close()
    await intake_ended.wait()
    for sequence in list(door.admission.in_flight.values()):
        if not sequence.produced:
            sequence.end(Ending.DRAINING)


async def _show_drain(stop: _Stop, door: Door, on_progress: ProgressSink | None) -> None:
    """From the stop on, say how many requests have ended at each that does, until all have."""
    await stop.requested.wait()
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


async def _noting_the_end(  # noqa: ASYNC128 - what it runs reports the start
    run: Callable[..., Awaitable[None]],
    ended: trio.Event,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a startable task, and set `ended` when it has ended."""
    try:
        await run(task_status=task_status)
    finally:
        ended.set()


async def _watch_broker(broker: Broker) -> None:
    reason = await broker.wait_lost()
    raise WorkerFault(f"the connection to NATS has ended for good: {reason}")


def _batch_rules(worker: WorkerConfig, slots: int, aging_s: float | None) -> BatchRules:
    batching = worker.continuous_batching
    return BatchRules(
        formation=Formation(
            min_batch_size=min(batching.min_batch_size, slots),
            timeout_s=batching.batch_timeout_ms / 1000,
            adaptive=batching.adaptive_timeout,
        ),
        preempt=batching.preempt,
        degraded_max_tokens=worker.resource_limits.degraded_max_tokens,
        levels=worker.request_queue.priority_levels,
        held_most_s=held_most_s(worker.request_queue.priority_levels, aging_s),
        recycle_after_tokens=worker.engine.recycle_after_tokens,
    )


def _request_limits(config: Config) -> RequestLimits:
    worker = config.worker
    levels = worker.request_queue.priority_levels
    requests = worker.requests
    return RequestLimits(
        model_name=worker.model_name,
        max_tokens_limit=requests.max_tokens_limit,
        default_timeout_ms=requests.default_timeout_ms,
        timeout_limit_ms=requests.timeout_limit_ms,
        max_body_bytes=requests.max_prompt_bytes,
        priority_levels=levels,
        default_buffered=level_of(requests.default_priority.buffered, levels),
        default_streaming=level_of(requests.default_priority.streaming, levels),
    )
