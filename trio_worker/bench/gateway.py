"""What the gateway costs: callers over HTTP against the same over NATS.

The gateway is a process of its own, as the callers are; the worker runs in this one.
"""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec

from trio_worker.bench.ahead import clocked
from trio_worker.bench.clocked_engine import TEXT
from trio_worker.bench.cost import Cost, cost_of, median
from trio_worker.bench.figures import p99, print_comparison, say
from trio_worker.bench.load import Load
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.programs import Program, open_program
from trio_worker.bench.prompts import stories
from trio_worker.bench.setup import Setup
from trio_worker.bench.tiny import (
    STREAMS,
    open_http_server,
    open_tiny_model,
    server_rate,
    with_model,
)

EVENT_SHARE = "0.6"
"""Of the messages a second that callers over NATS get, at least."""
EVENT_CPU_US = 100
"""At most, of the gateway for an event."""
FIRST_BYTE_MS = 5
"""At most, 99 times in 100: from a worker's first message to a caller's first byte."""
ALL_STREAMS = 64
STREAM_TOKENS = 600
PACE_MS = 50.0
"""Of a step: 20 tokens a second."""
WARMUP_S = 1.0
MEASURED_S = 4.0
IN_FLIGHT = (1, 8, 64)
FIRST_BYTES = 400
"""Answers whose first byte is looked at."""


class MeasuredGateway:
    """A gateway that runs, and how it is asked."""

    def __init__(self, program: Program, url: str) -> None:
        self._program = program
        self.url = url

    async def cpu_s(self) -> float:
        """The processor time that it has taken so far."""
        await self._program.write({})
        return float((await self._program.read())["cpu_s"])

    async def cost_of(self, load: Load) -> Cost:
        """Of callers over HTTP."""
        load = msgspec.structs.replace(load, url=self.url)
        return await cost_of(load, callers="trio_worker.bench.http_load", cpu_s=self.cpu_s)


@asynccontextmanager
async def open_gateway(nats_url: str) -> AsyncIterator[MeasuredGateway]:
    """One that listens. Raises `WorkerFault` if it ends."""
    async with open_program("trio_worker.bench.gateway_process", nats_url) as program:
        yield MeasuredGateway(program, (await program.read())["url"])


async def events(setup: Setup) -> None:
    """Streams, as fast as they come and as fast as people read."""
    async with _clocked(setup).worker() as worker, open_gateway(worker.nats_url) as gateway:
        load = _load(worker, ALL_STREAMS, tokens=STREAM_TOKENS, prompts=ALL_STREAMS)
        title = f"a gateway against its worker, {ALL_STREAMS} streams at once, events/s"
        await _compare(setup, title, gateway, load, required=EVENT_SHARE)
    async with (
        _clocked(setup, device_ms=PACE_MS).worker() as worker,
        open_gateway(worker.nats_url) as gateway,
    ):
        load = msgspec.structs.replace(
            _load(worker, ALL_STREAMS, tokens=100_000, prompts=ALL_STREAMS),
            token_text=TEXT,
            warmup_s=WARMUP_S,
            seconds=MEASURED_S,
        )
        title = f"the same at {1000 / PACE_MS:g} tokens/s each"
        await _compare(setup, title, gateway, load, required=None)


async def calls(setup: Setup) -> None:
    """Requests that cost the engine nothing, whole: what one costs; and first bytes."""
    async with _clocked(setup).worker() as worker, open_gateway(worker.nats_url) as gateway:
        for in_flight in IN_FLIGHT:
            load = msgspec.structs.replace(
                _load(worker, in_flight, tokens=1, prompts=in_flight),
                request=_request(tokens=1, stream=False),
                warmup_s=WARMUP_S,
                seconds=MEASURED_S,
            )
            costs: list[Cost] = []
            await print_comparison(
                f"a gateway against its worker, {in_flight} in flight, requests/s",
                partial(_answer_rate, gateway, load, costs),
                partial(_answer_rate, None, load, []),
                rounds=setup.rounds,
                required=None,
            )
            cpu_us = median(costs, lambda cost: 1e6 * cost.cpu_s / cost.got.answers)
            say(f"  the gateway's CPU a request {cpu_us:.0f} µs")
        await _first_bytes(setup, worker, gateway)


async def fronts(setup: Setup) -> None:
    """A tiny model behind the gateway, against mlx-lm's HTTP server with the same callers."""
    async with (
        open_tiny_model() as model,
        with_model(setup, model).worker() as worker,
        open_gateway(worker.nats_url) as gateway,
        open_http_server(model) as url,
    ):
        say(f"a tiny model on {worker.device}:")
        for streams in STREAMS:
            await print_comparison(
                f"a gateway and a worker against mlx_lm.server, {streams} at a time, tokens/s",
                partial(server_rate, gateway.url, streams),
                partial(server_rate, url, streams),
                rounds=setup.rounds,
                required="1.0",
            )


async def behind(setup: Setup) -> None:
    """The configured model: callers over HTTP against callers over NATS."""
    wide = setup.having("continuous_batching", max_batch_size=8)
    async with wide.worker() as worker, open_gateway(worker.nats_url) as gateway:
        load = _load(worker, 8, tokens=setup.max_tokens, prompts=16)

        async def rate(way: MeasuredGateway | None, number: int) -> float:
            asked = msgspec.structs.replace(load, prompts=tuple(stories(f"{number}/{way}", 16)))
            return (await _cost(way, asked)).token_rate

        await print_comparison(
            f"{setup.config.worker.model} on {worker.device}, 8 at a time: "
            "a gateway against its worker, tokens/s",
            partial(rate, gateway),
            partial(rate, None),
            rounds=setup.rounds,
            required="0.97",
        )


async def _compare(
    setup: Setup, title: str, gateway: MeasuredGateway, load: Load, *, required: str | None
) -> None:
    """Print the events a second of both ways, and what one costs."""
    costs: list[Cost] = []
    await print_comparison(
        title,
        partial(_message_rate, gateway, load, costs),
        partial(_message_rate, None, load, []),
        rounds=setup.rounds,
        required=required,
    )
    cpu_us = median(costs, lambda cost: 1e6 * cost.cpu_s / cost.got.messages)
    cores = median(costs, lambda cost: cost.cpu_s / cost.got.seconds)
    tokens = median(costs, lambda cost: cost.got.tokens / cost.got.messages)
    callers_us = median(costs, lambda cost: 1e6 * cost.got.cpu_seconds / cost.got.messages)
    say(
        f"  the gateway's CPU an event {cpu_us:.0f} µs ({EVENT_CPU_US} required), "
        f"{100 * cores:.0f} % of a core; {tokens:.1f} tokens an event; "
        f"the callers' own {callers_us:.0f} µs"
    )


async def _first_bytes(setup: Setup, worker: MeasuredWorker, gateway: MeasuredGateway) -> None:
    """Print by how much later callers over HTTP get their first byte: the way there, too."""
    for in_flight in IN_FLIGHT[:2]:
        load = _load(worker, in_flight, tokens=2, prompts=FIRST_BYTES)
        over_http: list[float] = []
        over_nats: list[float] = []
        for _ in range(setup.rounds):
            over_http += (await _cost(gateway, load)).got.first_token_s
            over_nats += (await _cost(None, load)).got.first_token_s
        middle, late = (
            [1000 * figure(way) for way in (over_http, over_nats)]
            for figure in (statistics.median, p99)
        )
        say(
            f"first byte, {in_flight} in flight, p99: {late[0]:.1f} to {late[1]:.1f} ms, "
            f"{late[0] - late[1]:.1f} more ({FIRST_BYTE_MS} required); "
            f"median {middle[0]:.1f} to {middle[1]:.1f} ms"
        )


async def _cost(way: MeasuredGateway | None, load: Load) -> Cost:
    """Of the same callers through a gateway, or without one."""
    return await (cost_of(load) if way is None else way.cost_of(load))


async def _message_rate(
    way: MeasuredGateway | None, load: Load, costs: list[Cost], _number: int
) -> float:
    """Messages a second; what they cost is added to `costs`."""
    costs.append(await _cost(way, load))
    return costs[-1].message_rate


async def _answer_rate(
    way: MeasuredGateway | None, load: Load, costs: list[Cost], _number: int
) -> float:
    """Answers a second; what they cost is added to `costs`."""
    costs.append(await _cost(way, load))
    return costs[-1].answer_rate


def _load(worker: MeasuredWorker, concurrent: int, *, tokens: int, prompts: int) -> Load:
    """So many streams at a time, to the end of the last."""
    return Load(
        url=worker.nats_url,
        subject=worker.subject,
        request=_request(tokens=tokens, stream=True),
        prompts=tuple(stories("gateway", prompts)),
        concurrent=concurrent,
    )


def _request(*, tokens: int, stream: bool) -> dict[str, object]:
    return {"stream": stream, "max_tokens": tokens, "timeout_ms": 600_000}


def _clocked(setup: Setup, *, device_ms: float = 0.0) -> Setup:
    return clocked(setup, device_ms=device_ms, host_ms=0.0)
