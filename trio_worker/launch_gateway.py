"""From a configuration to a running gateway: by itself, or beside a worker.

launch_gateway
├ follow_stops      the first stop begins the drain, a second one cuts it short
└ connect           NATS; closed last
  └ serve_gateway   its own tree: see gateway/serve.py
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio
from loguru import logger

from trio_worker.config import Config, GatewayConfig
from trio_worker.gateway.key_file import KeyFile
from trio_worker.gateway.serve import serve_gateway
from trio_worker.http.drain import Drain
from trio_worker.http.listening import address_of, open_listeners
from trio_worker.launch_nats import connect
from trio_worker.machine.service_manager import open_service_manager
from trio_worker.ports import Broker, Notice, ServiceManager
from trio_worker.supervisor.gateway_process import GatewayProcess, GatewaySettings

DEFAULT_PORT = 8000
"""Of a gateway that runs by itself."""
INBOX_MESSAGES = 200_000
"""What workers may say while the gateway is behind, all on one subscription; beyond it, or beyond
64 MiB, newer messages are thrown away, and the answers that miss them end in an error."""
CLOSING_S = 5.0
"""What a stop takes beside the drain."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells the gateway that it starts. There are secrets in it."""

    config: Config
    log_level: str


def gateway_beside(config: Config, *, log_level: str) -> GatewayProcess | None:
    """The gateway that a worker runs, if it is to have one.

    Raises:
        ConfigError: if the file of keys cannot be read, or something in it is wrong.
    """
    gateway = config.gateway
    if gateway.port is None:
        return None
    KeyFile(gateway.keys_file)
    settings = GatewaySettings(
        host=gateway.host,
        port=gateway.port,
        drain_timeout_s=gateway.drain_timeout_ms / 1000,
        hello=msgspec.json.encode(Hello(config=config, log_level=log_level)) + b"\n",
    )
    return GatewayProcess(settings)


async def launch_gateway(
    config: Config,
    *,
    stops: AsyncIterable[object],
    listeners: Sequence[trio.SocketListener] = (),
) -> None:
    """Take requests over HTTP until `stops` yields, then drain; returns when nothing is left.

    The second item of `stops` cuts the drain short; one that comes before anybody can connect
    ends the run there. Without `listeners` the configured address is listened on.

    Raises:
        StopWorker: alone or in exception groups, with the status to exit with.
    """
    KeyFile(config.gateway.keys_file)
    course = _Course()
    with open_service_manager(os.environ) as service_manager:
        async with trio.open_nursery() as root:
            root.start_soon(_follow_stops, stops, course, config.gateway, service_manager)
            with course.run:
                async with connect(
                    config.nats,
                    name="trio-worker gateway",
                    # Workers answer nowhere else.
                    inbox_prefix=config.nats.reply_prefixes[0].rstrip("."),
                    subscription_limit=INBOX_MESSAGES,
                ) as broker:
                    await _serve(broker, config, listeners, course, service_manager)
            root.cancel_scope.cancel(reason="the gateway has ended")


async def _serve(
    broker: Broker,
    whole: Config,
    given: Sequence[trio.SocketListener],
    course: _Course,
    service_manager: ServiceManager,
) -> None:
    config = whole.gateway
    port = DEFAULT_PORT if config.port is None else config.port
    listeners = list(given) or await open_listeners(config.host, port, section="cluster.gateway")
    address = address_of(config.host, listeners)
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                serve_gateway,
                broker,
                listeners,
                config=config,
                jetstream=whole.nats.jetstream,
                drain=course.drain,
            )
        )
        course.is_serving = True
        logger.info("OpenAI's API on {}/v1", address)
        service_manager.notify(Notice(ready=True, status=f"on {address}"))


@dataclass(slots=True)
class _Course:
    """How far the gateway is, and what a stop means there."""

    run: trio.CancelScope = field(default_factory=trio.CancelScope)
    drain: Drain = field(default_factory=Drain)
    is_serving: bool = False

    def stop(self) -> None:
        """The first one begins the drain, if there is anything to drain; the next one ends all."""
        if not self.is_serving:
            logger.info("Stopping before the gateway was ready")
            self.run.cancel(reason="stopped before the gateway was ready")
        elif not self.drain.is_begun:
            logger.info("Draining")
            self.drain.begin()
        else:
            logger.warning("Stopping now: answers that are under way are cut off")
            self.run.cancel(reason="asked to stop a second time")


async def _follow_stops(
    stops: AsyncIterable[object],
    course: _Course,
    config: GatewayConfig,
    service_manager: ServiceManager,
) -> None:
    stop_s = config.drain_timeout_ms / 1000 + CLOSING_S
    async for _ in stops:
        course.stop()
        service_manager.notify(Notice(stopping=True, status="draining", extend_timeout_s=stop_s))
