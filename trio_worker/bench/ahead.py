"""What the worker costs where steps are fast."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from trio_worker.bench import clocked_engine
from trio_worker.bench.figures import say
from trio_worker.bench.load import Load, Measured
from trio_worker.bench.measured_worker import MeasuredWorker, open_measured_worker
from trio_worker.bench.programs import open_program
from trio_worker.bench.prompts import stories
from trio_worker.bench.setup import Setup

DEVICE_MS = 2.0
WARMUP_S = 0.5
MEASURED_S = 2.5
SLOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Required:
    """Of a worker with so many streams."""

    share: float | None = None
    """Of what is possible: all streams get a token whenever the device has done a step."""
    cpu_us: float | None = None
    """At most, of the worker's process, for a token."""


REQUIRED: Mapping[float, Mapping[int, Required]] = {
    0.5: {
        1: Required(share=0.98, cpu_us=250),
        8: Required(),
        16: Required(share=0.96, cpu_us=30),
        64: Required(share=0.90, cpu_us=18),
    },
    1.7: {
        1: Required(share=0.95),
        8: Required(),
        16: Required(share=0.90),
        64: Required(share=0.75),
    },
}
"""By what a step takes on the host, in milliseconds, and by the number of streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What callers got, and what it cost the process in which the worker runs."""

    got: Measured
    worker_cpu_s: float


async def device(setup: Setup) -> None:
    """Streams of an engine whose every step takes a given time."""
    for host_ms, by_streams in REQUIRED.items():
        async with _open_clocked_worker(setup, device_ms=DEVICE_MS, host_ms=host_ms) as worker:
            for streams, required in by_streams.items():
                costs = [await _stream(worker, streams) for _ in range(setup.rounds)]
                _say_streams(host_ms, streams, costs, required)


def _say_streams(host_ms: float, streams: int, costs: Sequence[Cost], required: Required) -> None:
    possible = streams * 1000 / DEVICE_MS
    rate = statistics.median(cost.got.tokens / cost.got.seconds for cost in costs)
    cpu_us = statistics.median(1e6 * cost.worker_cpu_s / cost.got.tokens for cost in costs)
    callers_us = statistics.median(1e6 * cost.got.cpu_seconds / cost.got.tokens for cost in costs)
    first_ms = statistics.median(1000 * max(cost.got.first_token_s) for cost in costs)
    wanted = f" ({required.share:.2f} required)" if required.share else ""
    wanted_us = f" ({required.cpu_us:g} required)" if required.cpu_us else ""
    say(
        f"steps of {DEVICE_MS:g} ms on the device and {host_ms:g} on the host, streams: {streams}; "
        f"{rate:.0f} tokens/s, {rate / possible:.3f} of the possible{wanted}; "
        f"CPU a token {cpu_us:.0f} µs{wanted_us}"
    )
    say(f"  the callers' CPU a token {callers_us:.0f} µs; last first token {first_ms:.0f} ms")


async def _stream(worker: MeasuredWorker, streams: int) -> Cost:
    """So many streams, none of which ends while it is measured."""
    tokens = int(2 * (WARMUP_S + MEASURED_S + 1) * 1000 / DEVICE_MS)
    return await _load(
        Load(
            url=worker.nats_url,
            subject=worker.subject,
            request={"stream": True, "max_tokens": tokens, "timeout_ms": 600_000},
            prompts=tuple(stories("ahead", streams)),
            concurrent=streams,
            token_text=clocked_engine.TEXT,
            warmup_s=WARMUP_S,
            seconds=MEASURED_S,
        )
    )


async def _load(load: Load) -> Cost:
    async with open_program("trio_worker.bench.load") as callers:
        await callers.write(msgspec.to_builtins(load))
        await callers.read()
        began_at = time.process_time()
        got = msgspec.convert(await callers.read(), Measured)
        return Cost(got=got, worker_cpu_s=time.process_time() - began_at)


@asynccontextmanager
async def _open_clocked_worker(
    setup: Setup, *, device_ms: float, host_ms: float
) -> AsyncIterator[MeasuredWorker]:
    wide = (
        setup.having("continuous_batching", max_batch_size=SLOTS)
        .having("requests", max_tokens_limit=clocked_engine.CONTEXT)
        .having("monitoring", port=None)
    )
    program = (
        *(sys.executable, "-P", "-m", clocked_engine.__name__),
        *("--device-ms", str(device_ms), "--host-ms", str(host_ms)),
    )
    async with open_measured_worker(wide.config, "mlx", program) as worker:
        yield worker
