"""A gateway's tasks, from the first to the last.

serve_gateway
├ Directory.keep     asks every few seconds which workers there are
├ BatchTasks.keep    puts the requests of batches into the queue, where JetStream is enabled
├ watch_broker       ends the gateway when its connection has ended for good
└ serve              the HTTP server: one task a connection, one scope a request
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from trio_worker.config import GatewayConfig, JetStreamConfig
from trio_worker.config.hosts import is_loopback
from trio_worker.errors import WorkerFault
from trio_worker.exception_groups import sole_exceptions
from trio_worker.gateway.batch_pages import UPLOADS_MAX, BatchPages
from trio_worker.gateway.batch_queue import Streams
from trio_worker.gateway.batch_store import BatchStore
from trio_worker.gateway.batch_tasks import BatchTasks
from trio_worker.gateway.counts import GatewayCounts
from trio_worker.gateway.directory import Directory
from trio_worker.gateway.endpoints import Api
from trio_worker.gateway.fields import Rules
from trio_worker.gateway.forward import Forward
from trio_worker.gateway.inboxes import open_inboxes
from trio_worker.gateway.key_file import KeyFile
from trio_worker.gateway.keys import RunningRequests
from trio_worker.gateway.page import HEADERS, page_files
from trio_worker.gateway.shapes import UnknownFields
from trio_worker.http.drain import Drain
from trio_worker.http.limits import Limits
from trio_worker.http.server import serve
from trio_worker.jetstream.client import open_jetstream
from trio_worker.monitoring.prometheus import exposition
from trio_worker.ports import Broker


async def serve_gateway(  # noqa: ASYNC128 - what it runs reports the start
    broker: Broker,
    listeners: list[trio.SocketListener],
    *,
    config: GatewayConfig,
    jetstream: JetStreamConfig | None = None,
    drain: Drain,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `listeners` until `drain` has begun and what is under way has ended.

    Raises `ConfigError` for a file of keys that is wrong, and `WorkerFault` when the connection to
    NATS has ended for good. Cancelled: answers that are under way are cut, and cancelled at their
    workers.
    """
    async with open_api(broker, config, jetstream) as api:
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch_broker, broker)
                await serve(
                    api,
                    listeners,
                    limits=_limits(config),
                    drain=drain,
                    task_status=task_status,
                )
                nursery.cancel_scope.cancel(reason="drained")


@asynccontextmanager
async def open_api(
    broker: Broker,
    config: GatewayConfig,
    jetstream: JetStreamConfig | None = None,
    *,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Api]:
    """What answers requests, with what has to run for it.

    Batches are to be had with a `jetstream` that is enabled. Enters when all workers have been
    asked who they are. Raises `ConfigError` for a file of keys that is wrong.
    """
    key_file = KeyFile(config.keys_file)
    directory = Directory(wall_clock)
    rules = Rules(
        body_limit_bytes=config.max_body_bytes,
        timeout_ms=config.timeout_ms,
        unknown_fields=UnknownFields(config.unknown_fields),
    )
    jetstream = jetstream or JetStreamConfig()
    async with open_inboxes(broker) as inboxes, _open_store(broker, jetstream) as store:
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                await nursery.start(directory.keep, broker)
                if store is not None:
                    tasks = BatchTasks(
                        store=store,
                        streams=Streams(jobs=jetstream.stream, results=jetstream.results),
                        rules=rules,
                        limits_of=directory.limits_of,
                        now=wall_clock,
                    )
                    nursery.start_soon(tasks.keep)
                yield Api(
                    broker=broker,
                    forward=Forward(broker, inboxes, attempts=config.attempts),
                    directory=directory,
                    key_file=key_file,
                    running=RunningRequests(),
                    counts=GatewayCounts(),
                    rules=rules,
                    batches=_batch_pages(store, config, jetstream, key_file, wall_clock),
                    exposition=exposition,
                    page=page_files(),
                    page_headers=HEADERS,
                    cors_origins=config.cors_origins,
                    is_for_this_machine=is_loopback(config.host),
                )
                nursery.cancel_scope.cancel(reason="closed")


@asynccontextmanager
async def _open_store(
    broker: Broker, jetstream: JetStreamConfig
) -> AsyncIterator[BatchStore | None]:
    """Where batches are kept, if they are to be had."""
    if not jetstream.enabled:
        yield None
        return
    async with open_jetstream(broker) as opened:
        yield BatchStore(opened)


def _batch_pages(
    store: BatchStore | None,
    config: GatewayConfig,
    jetstream: JetStreamConfig,
    key_file: KeyFile,
    wall_clock: Callable[[], float],
) -> BatchPages:
    return BatchPages(
        store=store,
        results=jetstream.results,
        keep_results_s=jetstream.keep_results_s,
        key_file=key_file,
        cors_origins=config.cors_origins,
        max_file_bytes=config.max_file_bytes,
        max_body_bytes=config.max_body_bytes,
        uploads=trio.CapacityLimiter(UPLOADS_MAX),
        now=wall_clock,
    )


def _limits(config: GatewayConfig) -> Limits:
    return Limits(
        connections=config.max_connections,
        body_bytes=config.max_body_bytes,
        drain_s=config.drain_timeout_ms / 1000,
    )


async def _watch_broker(broker: Broker) -> None:
    reason = await broker.wait_lost()
    raise WorkerFault(f"the connection to NATS has ended: {reason}")
