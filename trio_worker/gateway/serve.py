"""A gateway's tasks, from the first to the last.

serve_gateway
├ Directory.keep     asks every few seconds which workers there are
├ watch_broker       ends the gateway when its connection has ended for good
└ serve              the HTTP server: one task a connection, one scope a request
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from trio_worker.config import GatewayConfig
from trio_worker.config.hosts import is_loopback
from trio_worker.errors import WorkerFault
from trio_worker.exception_groups import sole_exceptions
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
from trio_worker.monitoring.prometheus import exposition
from trio_worker.ports import Broker


async def serve_gateway(  # noqa: ASYNC128 - what it runs reports the start
    broker: Broker,
    listeners: list[trio.SocketListener],
    *,
    config: GatewayConfig,
    drain: Drain,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `listeners` until `drain` has begun and what is under way has ended.

    Raises `ConfigError` for a file of keys that is wrong, and `WorkerFault` when the connection to
    NATS has ended for good. Cancelled: answers that are under way are cut, and cancelled at their
    workers.
    """
    async with open_api(broker, config) as api:
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
async def open_api(broker: Broker, config: GatewayConfig) -> AsyncIterator[Api]:
    """What answers requests, with what has to run for it.

    Enters when all workers have been asked who they are. Raises `ConfigError` for a file of keys
    that is wrong.
    """
    key_file = KeyFile(config.keys_file)
    directory = Directory(time.time)
    async with open_inboxes(broker) as inboxes:
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                await nursery.start(directory.keep, broker)
                yield Api(
                    broker=broker,
                    forward=Forward(broker, inboxes, attempts=config.attempts),
                    directory=directory,
                    key_file=key_file,
                    running=RunningRequests(),
                    counts=GatewayCounts(),
                    rules=Rules(
                        body_limit_bytes=config.max_body_bytes,
                        timeout_ms=config.timeout_ms,
                        unknown_fields=UnknownFields(config.unknown_fields),
                    ),
                    exposition=exposition,
                    page=page_files(),
                    page_headers=HEADERS,
                    cors_origins=config.cors_origins,
                    is_for_this_machine=is_loopback(config.host),
                )
                nursery.cancel_scope.cancel(reason="closed")


def _limits(config: GatewayConfig) -> Limits:
    return Limits(
        connections=config.max_connections,
        body_bytes=config.max_body_bytes,
        drain_s=config.drain_timeout_ms / 1000,
    )


async def _watch_broker(broker: Broker) -> None:
    reason = await broker.wait_lost()
    raise WorkerFault(f"the connection to NATS has ended: {reason}")
