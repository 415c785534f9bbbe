"""All that stands between a client and a model, but the model: gateway, nats-server and worker.

They run in the loop of the test, in real time. Clients that block, or have another loop, run in a
thread or a process beside it.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from msgspec.structs import replace

from support.metric_values import samples_in
from support.nats_fixtures import NatsServer, running_server
from support.nats_rig import wait_until
from support.worker_rig import FakeProbe, make_config
from trio_worker.config import GatewayConfig
from trio_worker.exception_groups import sole_exceptions
from trio_worker.gateway.serve import serve_gateway
from trio_worker.http.drain import Drain
from trio_worker.http.listening import open_listeners
from trio_worker.monitoring.observed import Observed
from trio_worker.nats.broker import NatsBroker, open_nats_broker
from trio_worker.simulated.engine import Faults, SimulatedEngine, open_simulated_engine
from trio_worker.worker import World, run_worker

MODEL = "smollm2-135m-instruct"
FAILING = "broken"
"""A prompt with this word fails in the engine."""
TURN = "worker.simulated.turn_ms=2"
LONG = 1_500
"""Tokens of an answer that lasts for longer than a test waits for something to happen."""
KEY = "secret"
PATIENCE_S = 20


@dataclass(frozen=True, slots=True)
class Front:
    """A gateway before one worker, as clients reach it."""

    root: str
    """Its address, without a slash at the end."""
    nats: NatsServer
    broker: NatsBroker
    """The gateway's connection."""
    worker: Observed
    engine: SimulatedEngine
    drain: Drain
    """Ends the gateway when it begins."""

    @property
    def base_url(self) -> str:
        """What OpenAI's clients want to be told."""
        return f"{self.root}/v1"

    async def until_computing(self) -> None:
        """Return when a request is in the engine."""
        await wait_until(lambda: bool(self.engine.residents))

    async def until_cancelled(self, count: int) -> None:
        """Return when so many requests have been cancelled at the worker, and none runs."""

        def are_cancelled() -> bool:
            outcomes = self.worker.snapshot().requests.by_outcome
            return outcomes.get("CANCELLED") == count and not self.engine.residents

        await wait_until(are_cancelled)

    async def counts(self) -> Mapping[str, float]:
        """The metrics of the gateway that are not 0, such as `gateway_left_total`."""
        samples = samples_in((await self.get("/metrics"))[1])
        return {name: value for name, value in samples.items() if value}

    async def until_counted(self, name: str, value: float) -> None:
        """Return when a metric is what it should be; nothing tells."""
        with trio.fail_after(PATIENCE_S):
            while (await self.counts()).get(name) != value:  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def get(self, path: str) -> tuple[int, str]:
        """A page of the gateway, asked for without any client."""
        host, _, port = self.root.removeprefix("http://").partition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            await stream.send_all(head.encode())
            answer = b"".join([part async for part in stream])
        head, _, body = answer.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body


@asynccontextmanager
async def open_front(*overrides: str, **gateway: Any) -> AsyncIterator[Front]:
    """Enters when the gateway knows of the worker. `gateway` is fields of its configuration.

    With `JOBS_ON` among `overrides` there is a JetStream, for both.
    """
    jetstream = make_config(*overrides).nats.jetstream
    with running_server(jetstream=jetstream.enabled) as server, sole_exceptions():
        async with (
            _running_worker(server, *overrides) as (worker, engine),
            open_nats_broker(server.url, name="gateway", reconnect_wait_s=0.05) as broker,
            trio.open_nursery() as nursery,
        ):
            (listener,) = await open_listeners("127.0.0.1", 0, section="cluster.gateway")
            port = listener.socket.getsockname()[1]
            config, drain = replace(GatewayConfig(), **gateway), Drain()
            await nursery.start(
                partial(
                    serve_gateway,
                    broker,
                    [listener],
                    config=config,
                    jetstream=jetstream,
                    drain=drain,
                )
            )
            front = Front(f"http://127.0.0.1:{port}", server, broker, worker, engine, drain)
            with trio.fail_after(PATIENCE_S):
                while (await front.get("/readyz"))[0] != 200:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            yield front
            drain.begin()


@asynccontextmanager
async def _running_worker(
    server: NatsServer, *overrides: str
) -> AsyncIterator[tuple[Observed, SimulatedEngine]]:
    """Enters when it takes requests; at the end it is stopped as by SIGTERM."""
    config = make_config(TURN, *overrides)
    stop, stops = trio.open_memory_channel[None](1)
    ready, engines, workers = trio.Event(), list[SimulatedEngine](), list[Observed]()

    @asynccontextmanager
    async def open_engine() -> AsyncIterator[SimulatedEngine]:
        async with open_simulated_engine(
            config.worker.simulated,
            model_name=config.worker.model_name,
            faults=Faults(failing_words=frozenset({FAILING})),
        ) as engine:
            engines.append(engine)
            yield engine

    def on_ready(worker: Observed) -> None:
        workers.append(worker)
        ready.set()

    world = World(
        stops=stops,
        open_broker=partial(open_nats_broker, server.url, name="worker", reconnect_wait_s=0.05),
        open_engine=open_engine,
        probe=FakeProbe(),
        rng=random.Random(1),
        wall_clock=time.time,
        on_ready=on_ready,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_worker, config, world)
        with trio.fail_after(PATIENCE_S):
            await ready.wait()
        yield workers[0], engines[0]
        stop.send_nowait(None)
