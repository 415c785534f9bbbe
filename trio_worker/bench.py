"""Measures a whole worker on this machine: NATS in, NATS out, streaming.

Every figure is a ratio of two measurements of one run, taken in turn, since machines are noisy.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from trio_worker.client import Client
from trio_worker.config import Config
from trio_worker.core.statistics import Snapshot
from trio_worker.launch import EngineKind, launch
from trio_worker.ports import Broker, Observed

CONCURRENT = 8
QUESTIONS = (
    "Why is the sky blue?",
    "Tell me about the city of Paris and its history.",
    "How does a bicycle stay upright?",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between weather and climate?",
    "Explain how bread rises in the oven.",
    "Name some rivers in Europe and where they flow.",
    "What makes a good teacher?",
)


async def bench_batching(
    config: Config, *, engine: EngineKind, max_tokens: int, rounds: int
) -> None:
    """Print tokens per second of eight requests one at a time, together, and the ratio."""
    async with _running(config, engine) as (client, observed):
        await _tokens_per_second(client, 1, max_tokens)  # warms up, and is not counted
        ratios = []
        for number in range(1, rounds + 1):
            alone = await _tokens_per_second(client, 1, max_tokens)
            together = await _tokens_per_second(client, CONCURRENT, max_tokens)
            ratios.append(together / alone)
            _print(
                f"round {number}: one at a time {alone:.1f} tokens/s, "
                f"{CONCURRENT} together {together:.1f} tokens/s, ratio {ratios[-1]:.2f}"
            )
        snapshot = observed.snapshot()
        assert isinstance(snapshot, Snapshot)
        _print(
            f"median ratio {statistics.median(ratios):.2f} on {snapshot.engine.device}; "
            f"the largest batch had {snapshot.batch.max_batch_seen} requests"
        )


async def _tokens_per_second(client: Client, concurrent: int, max_tokens: int) -> float:
    """Of all questions, `concurrent` of them at a time."""
    tokens = 0
    limiter = trio.CapacityLimiter(concurrent)

    async def one(question: str) -> None:
        nonlocal tokens
        request: Mapping[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            # Every answer goes to its full length, so that both halves do the same work.
            "stop": [],
            "temperature": 0,
            "stream": True,
            "timeout_ms": 600_000,
        }
        async with limiter, client.ask(request) as answer:
            async for chunk in answer:
                if chunk.usage is not None:
                    tokens += chunk.usage["completion_tokens"]

    began_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        for question in QUESTIONS:
            nursery.start_soon(one, question)
    return tokens / (trio.current_time() - began_at)


@asynccontextmanager
async def _running(config: Config, engine: EngineKind) -> AsyncIterator[tuple[Client, Observed]]:
    """A worker with its monitoring off, and a client on its own connection to NATS."""
    worker = msgspec.structs.replace(
        config.worker,
        monitoring=msgspec.structs.replace(config.worker.monitoring, port=None),
    )
    config = msgspec.structs.replace(config, worker=worker)
    stop, stops = trio.open_memory_channel[None](1)
    ready = trio.Event()
    seen: list[Observed] = []
    brokers: list[Broker] = []

    async def greet(broker: Broker) -> None:
        brokers.append(broker)
        ready.set()
        await trio.sleep_forever()

    async def serve() -> None:
        await launch(config, engine=engine, stops=stops, greet=greet, on_ready=seen.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113 - `ready` is waited for
        await ready.wait()
        yield Client(brokers[0]), seen[0]
        stop.send_nowait(None)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
