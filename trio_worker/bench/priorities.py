"""What an urgent request gains, and what it costs the one that gives it its slot."""

from __future__ import annotations

import statistics
from dataclasses import replace

import trio

from trio_worker.bench.figures import say
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.setup import Setup

LOW_REQUESTS = 24
HIGH_REQUESTS = 20
SATURATED_S = 2.0
LOW_TOKENS = 80
HIGH_TOKENS = 5


async def priority(setup: Setup) -> None:
    """Eight slots saturated by LOW, one HIGH a second; beside it the same with one level only."""
    turn_s = setup.config.worker.simulated.turn_ms / 1000
    levels = await _high_among_low(setup, levels=3)
    fifo = await _high_among_low(setup, levels=1)
    say(
        f"time to first token of HIGH, median: {1000 * levels:.0f} ms "
        f"({levels / turn_s:.1f} turns; required: under 3 turns and its prefill); "
        f"with one level only {1000 * fifo:.0f} ms: {fifo / levels:.0f} times as long"
    )


async def _high_among_low(setup: Setup, *, levels: int) -> float:
    """The median seconds to the first token of the urgent requests."""
    simulated = replace(setup, engine="simulated").having(
        "request_queue", priority_levels=levels, max_depth=200
    )
    firsts: list[float] = []
    low_seconds: list[float] = []

    async def low(worker: MeasuredWorker) -> None:
        while True:
            began_at = trio.current_time()
            await worker.tell_story(max_tokens=100, level=levels - 1)
            low_seconds.append(trio.current_time() - began_at)

    async with simulated.worker() as worker, trio.open_nursery() as nursery:
        for _ in range(LOW_REQUESTS):
            nursery.start_soon(low, worker)
        await trio.sleep(SATURATED_S)
        for _ in range(HIGH_REQUESTS):
            began_at = trio.current_time()
            first_at = await worker.tell_story(max_tokens=10, level=0)
            firsts.append(first_at - began_at)
            await trio.sleep_until(began_at + 1)
        nursery.cancel_scope.cancel(reason="measured")
    aging_s = (setup.config.worker.request_queue.aging_ms or 0) / 1000
    say(
        f"  levels: {levels}; {HIGH_REQUESTS} HIGH, meanwhile {len(low_seconds)} LOW completed, "
        f"the slowest in {max(low_seconds):.1f} s (a LOW is overtaken by arrivals of "
        f"{(levels - 1) * aging_s:g} s only)"
    )
    return statistics.median(firsts)


async def preemption(setup: Setup) -> None:
    """What it costs that one request gives its slot to another: the time beyond both alone."""
    for kept_mb in (512, 0):
        alone = setup.having("continuous_batching", max_batch_size=1)
        async with alone.having("engine", prefix_cache_mb=kept_mb).worker() as worker:
            await worker.tell_story(max_tokens=LOW_TOKENS, level=2)
            costs = [await _cost_of_preemption(worker) for _ in range(setup.rounds)]
            how = "kept" if kept_mb else "computed again"
            say(
                f"a preemption after {LOW_TOKENS // 2} tokens, cache {how}: "
                f"{1000 * statistics.median(costs):.0f} ms beyond both requests alone "
                f"({len(costs)} rounds)"
            )


async def _cost_of_preemption(worker: MeasuredWorker) -> float:
    async def timed(max_tokens: int, level: int) -> float:
        began_at = trio.current_time()
        await worker.tell_story(max_tokens=max_tokens, level=level)
        return trio.current_time() - began_at

    low_s, high_s = await timed(LOW_TOKENS, 2), await timed(HIGH_TOKENS, 0)
    both_s = 0.0

    async def low() -> None:
        nonlocal both_s
        both_s = await timed(LOW_TOKENS, 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(low)
        await trio.sleep(low_s / 2)
        await timed(HIGH_TOKENS, 0)
    return both_s - low_s - high_s
