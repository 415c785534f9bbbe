"""The tasks of a worker, with what each is given."""

from __future__ import annotations

from functools import partial

import trio

from trio_worker.errors import WorkerFault
from trio_worker.flow.job import JobStreams
from trio_worker.flow.reception import Respond
from trio_worker.jetstream.client import JetStream
from trio_worker.monitoring.counters import JobCounters
from trio_worker.ports import (
    Broker,
    Message,
)
from trio_worker.protocol.turn import EngineInfo
from trio_worker.stages.batcher import run_batcher
from trio_worker.stages.beat import run_beat
from trio_worker.stages.control import Control, run_control
from trio_worker.stages.controller import Departure, run_controller
from trio_worker.stages.intake import IntakeBuffer, run_intake
from trio_worker.stages.job import JobMeans, do_job
from trio_worker.stages.jobs import run_jobs
from trio_worker.stages.monitor import run_monitor
from trio_worker.stages.pulse import run_pulse
from trio_worker.stages.readiness import run_readiness
from trio_worker.stages.reporter import run_reporter
from trio_worker.stages.respond import respond
from trio_worker.stages.service import Endpoint, run_service
from trio_worker.wire import subjects
from trio_worker.wire.mlx_serving import Member, member_id
from trio_worker.worker.parts import Worker
from trio_worker.worker.world import ServeHttp


async def batcher(worker: Worker) -> None:
    await run_batcher(
        worker.serving,
        batches=worker.batches,
        counters=worker.counters,
        heartbeat=worker.beats.batcher,
    )


async def monitor(worker: Worker) -> None:
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


async def readiness(worker: Worker) -> None:
    serving = worker.serving
    await run_readiness(engine=serving.engine, door=serving.door, batcher=worker.beats.batcher)


async def pulse(worker: Worker) -> None:
    await run_pulse(worker.counters.metrics, worker.beats.pulse, worker.world.sampler)


async def reporter(worker: Worker) -> None:
    await run_reporter(
        broker=worker.broker,
        worker_id=worker.config.worker.id,
        snapshot=worker.observed.snapshot,
        heartbeat=worker.beats.reporter,
        interval_s=worker.config.worker.monitoring.report_interval_ms / 1000,
    )


async def serve_http(  # noqa: ASYNC128 - what it runs reports the start
    worker: Worker, serve_http: ServeHttp, *, task_status: trio.TaskStatus[int]
) -> None:
    monitoring = worker.config.worker.monitoring
    assert monitoring.port is not None
    await serve_http(
        host=monitoring.host,
        port=monitoring.port,
        observed=worker.observed,
        task_status=task_status,
    )


async def control(  # noqa: ASYNC128 - what it runs reports the start
    worker: Worker,
    acts: Control,
    intake: trio.MemorySendChannel[Message],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    await run_control(
        acts,
        broker=worker.broker,
        door=worker.serving.door,
        worker_id=worker.config.worker.id,
        intake=intake,
        heartbeat=worker.beats.intake,
        task_status=task_status,
    )


async def service(  # noqa: ASYNC128 - what it runs reports the start
    worker: Worker, info: EngineInfo, *, task_status: trio.TaskStatus[None]
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


async def beat(  # noqa: ASYNC128 - what it runs reports the start
    worker: Worker, *, task_status: trio.TaskStatus[None]
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


def _controllers_endpoint(worker: Worker) -> tuple[Endpoint, ...]:
    if not worker.has_controllers:
        return ()
    return (Endpoint(name="controller", subject=from_controllers(worker)),)


def from_controllers(worker: Worker) -> str:
    return subjects.from_controllers(member_id(worker.config.worker.id))


async def intake(  # noqa: ASYNC128 - what it runs reports the start
    worker: Worker,
    requests: trio.Nursery,
    buffer: IntakeBuffer,
    acts: Control,
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
        act_on_control=acts.act,
        worker_id=worker.config.worker.id,
        reply_prefixes=worker.config.nats.reply_prefixes,
        hand_on=worker.hand_on,
        counters=worker.counters,
        heartbeat=worker.beats.intake,
        task_status=task_status,
    )


def _respond(worker: Worker) -> Respond:
    return partial(
        respond,
        serving=worker.serving,
        counters=worker.counters,
        worker_id=worker.config.worker.id,
        wall_clock=worker.world.wall_clock,
    )


async def jobs(  # noqa: ASYNC128 - what it runs reports the start
    worker: Worker,
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


async def join_controllers(
    worker: Worker, intake: trio.Nursery, requests: trio.Nursery
) -> Departure | None:
    """Run the membership in `intake`, where the dialect is spoken; returns how to end it."""
    if not worker.has_controllers:
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


async def watch_broker(broker: Broker) -> None:
    reason = await broker.wait_lost()
    raise WorkerFault(f"the connection to NATS has ended for good: {reason}")
