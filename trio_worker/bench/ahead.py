"""What a worker costs where steps are fast, on an engine whose steps take a given time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from trio_worker.bench import clocked_engine
from trio_worker.bench.cost import Cost, cost_of, median
from trio_worker.bench.figures import print_comparison, say
from trio_worker.bench.load import Load
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.programs import open_program
from trio_worker.bench.prompts import stories
from trio_worker.bench.setup import Setup

DEVICE_MS = 2.0
"""Of a step: as of a small model on a GPU."""
WARMUP_S = 0.5
MEASURED_S = 2.5
ENDLESS_TOKENS = 100_000
"""More than any stream gets while it is measured."""
REQUEST_CPU_US = 120
"""At most, of the worker for a request of one token."""
IN_FLIGHT = (1, 8, 16, 64)
RESPONDER = "bench.responder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Required:
    """Of a worker with so many streams; None: nothing."""

    share: float | None = None
    """Of what is possible, at least: each stream a token a step, the device never idle."""
    cpu_us: int | None = None
    """For a token, at most."""


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
"""By the milliseconds that a step takes on the host, and by the number of streams."""


async def device(setup: Setup) -> None:
    """How much of what the device can do reaches the callers, and the worker's CPU a token."""
    for host_ms, by_streams in REQUIRED.items():
        async with clocked(setup, device_ms=DEVICE_MS, host_ms=host_ms).worker() as worker:
            for streams, required in by_streams.items():
                load = _streams(worker, streams)
                costs = [await cost_of(load) for _ in range(setup.rounds)]
                title = (
                    f"{DEVICE_MS:g} ms on the device, {host_ms:g} on the host, {streams} streams"
                )
                _say_streams(title, costs, streams * 1000 / DEVICE_MS, required)


async def requests(setup: Setup) -> None:
    """Requests that cost the engine nothing, against a responder that does nothing with them."""
    async with (
        clocked(setup, device_ms=0.0, host_ms=0.0).worker() as worker,
        open_program("trio_worker.bench.responder", worker.nats_url, RESPONDER) as responder,
    ):
        await responder.read()
        for in_flight in IN_FLIGHT:
            costs: list[Cost] = []
            ours = _requests(worker, in_flight)
            await print_comparison(
                f"a worker against a bare nats-py responder, {in_flight} in flight, requests/s",
                partial(_answer_rate, ours, costs),
                partial(_answer_rate, msgspec.structs.replace(ours, subject=RESPONDER), []),
                rounds=setup.rounds,
                required="0.35",
            )
            cpu_us = median(costs, lambda cost: 1e6 * cost.cpu_s / cost.got.answers)
            say(f"  CPU a request {cpu_us:.0f} µs ({REQUEST_CPU_US} required)")


def _say_streams(title: str, costs: Sequence[Cost], possible: float, required: Required) -> None:
    rate = median(costs, lambda cost: cost.token_rate)
    cpu_us = median(costs, lambda cost: 1e6 * cost.cpu_s / cost.got.tokens)
    callers_us = median(costs, lambda cost: 1e6 * cost.got.cpu_seconds / cost.got.tokens)
    first_ms = median(costs, lambda cost: 1000 * max(cost.got.first_token_s))
    say(
        f"{title}: {rate:.0f} tokens/s, {rate / possible:.3f} of the possible"
        + (f" ({required.share:.2f} required)" if required.share is not None else "")
        + f"; CPU a token {cpu_us:.0f} µs"
        + (f" ({required.cpu_us} required)" if required.cpu_us is not None else "")
    )
    say(f"  the callers' own {callers_us:.0f} µs; the last first token after {first_ms:.0f} ms")


def _streams(worker: MeasuredWorker, streams: int) -> Load:
    """So many streams, none of which ends while it is measured."""
    return Load(
        url=worker.nats_url,
        subject=worker.subject,
        request={"stream": True, "max_tokens": ENDLESS_TOKENS, "timeout_ms": 600_000},
        prompts=tuple(stories("device", streams)),
        concurrent=streams,
        token_text=clocked_engine.TEXT,
        warmup_s=WARMUP_S,
        seconds=MEASURED_S,
    )


def _requests(worker: MeasuredWorker, in_flight: int) -> Load:
    """So many one-token requests at any time."""
    return Load(
        url=worker.nats_url,
        subject=worker.subject,
        request={"max_tokens": 1, "timeout_ms": 600_000},
        prompts=tuple(stories("requests", in_flight)),
        concurrent=in_flight,
        warmup_s=WARMUP_S,
        seconds=MEASURED_S,
    )


async def _answer_rate(load: Load, costs: list[Cost], _number: int) -> float:
    """Answers a second; what they cost is added to `costs`."""
    costs.append(await cost_of(load))
    return costs[-1].answer_rate


def clocked(setup: Setup, *, device_ms: float, host_ms: float) -> Setup:
    """The same with an engine whose steps take so long, and place for all."""
    program = (
        *(sys.executable, "-P", "-m", clocked_engine.__name__),
        *("--device-ms", str(device_ms), "--host-ms", str(host_ms)),
    )
    return (
        replace(setup, engine="mlx", engine_program=program)
        .having("continuous_batching", max_batch_size=max(IN_FLIGHT))
        .having("requests", max_tokens_limit=clocked_engine.CONTEXT)
    )
