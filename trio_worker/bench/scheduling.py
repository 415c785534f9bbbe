"""Measures what scheduling costs: the core's own operations, and priorities at work."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import trio

from trio_worker.bench.measurements import Bench, Part, running
from trio_worker.client import Client
from trio_worker.core.admission import Admission
from trio_worker.core.memory import MB, PressureGauge
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request import Request
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Event, Sequence, queue_key
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.protocol.turn import RequestId, Sampling

DEPTHS = (0, 100, 1_000, 10_000)
SAMPLES = 2_000
ROWS = 8
FAST_TURN_MS = 2.0
"""As a small model on a Mac's GPU."""
FORMATION_WAVES = 40
LOW_REQUESTS = 24
HIGH_REQUESTS = 20
SATURATED_S = 2.0
LOW_TOKENS = 80
HIGH_TOKENS = 5

# --- overhead -----------------------------------------------------------------------------


class _Scope:
    def cancel(self, reason: str | None = None) -> None:
        """Nobody is waiting in it."""


async def bench_overhead(bench: Bench) -> None:
    """Print microseconds per request of admission, queue and check, at several depths.

    And how long batches take to form, in a whole worker with turns as short as a fast model's.
    """
    _print("microseconds a request, median / p99, with so many requests queued:")
    for depth in DEPTHS:
        admission, queue = _filled(depth)
        check = _time(partial(_check, admission))
        cycle = _time(partial(_admit_queue_take, admission, queue))
        _print(
            f"  {depth:6d}: admission check {check}, admit + queue + take {cycle} "
            "(required under 5000; aimed at: under 500 at p99)"
        )
    gauge = PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB)
    _print(f"  memory check {_time(lambda _: gauge.level)} (required under 1000; aimed at: 10)")
    _print(
        f"  what a turn of {ROWS} rows writes into the metrics "
        f"{_time(partial(_write_a_turn, RequestCounters()))} "
        "(required: under 1 % of a turn, which is 200 at 20 ms)"
    )
    fast = replace(bench, engine="simulated").having(
        "simulated", turn_ms=FAST_TURN_MS, prefill_ms_per_token=0
    )
    for wanted, window_ms in ((1, 0), (ROWS, 50)):
        await _formation(
            fast.having("continuous_batching", min_batch_size=wanted, adaptive_timeout=False),
            window_ms,
        )


async def _formation(bench: Bench, window_ms: int) -> None:
    """Callers who come and go; one in four is alone, and waits for company in vain."""
    async with running(bench) as worker:
        for number in range(FORMATION_WAVES):
            async with trio.open_nursery() as nursery:
                for _ in range(3 * ROWS if number % 4 else 1):
                    nursery.start_soon(partial(_ask, worker.client, max_tokens=10, priority=1))
        within_ms = worker.formation_within_ms()
    _print(
        f"batch formation in turns of {FAST_TURN_MS:g} ms, waiting for company at most "
        f"{window_ms} ms: 99 % within {within_ms(0.99):g} ms, all within {within_ms(1):g} ms "
        f"(required under {window_ms + 50})"
    )


def _write_a_turn(counters: RequestCounters, index: int) -> None:
    """As the batcher does for one turn in which every row gets a token."""
    metrics = counters.metrics
    for row in range(ROWS):
        counters.inter_token.observe(0.02 + row / 1000)
    metrics.turn_seconds.observe(0.02)
    metrics.batch_size.observe(ROWS)
    counters.throughput.add(ROWS, now=index * 0.02)


def _check(admission: Admission, index: int) -> None:
    assert admission.refusal(_sequence(f"check{index}")) is None


def _filled(depth: int) -> tuple[Admission, RequestQueue]:
    queue = RequestQueue(max_size=depth + 16)
    admission = Admission(
        queue_enabled=True,
        max_depth=depth + 8,
        reject_when_full=True,
        slots=8,
        refuse_unmeetable=True,
        gauge=PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB),
        queue=queue,
        rate=ServiceRate(),
        arrivals=ArrivalRate(),
    )
    for _ in range(8):
        admission.rate.record(0.0001)
    for index in range(depth):
        sequence = _sequence(f"queued{index}")
        admission.enter(sequence)
        sequence.advance(Event.TOKENISED)
        queue.add(sequence)
    return admission, queue


_arrivals = itertools.count()


def _sequence(request_id: str) -> Sequence:
    arrival = next(_arrivals)
    level = arrival % 3
    return Sequence(
        request=Request(
            request_id=RequestId(request_id),
            prompt="x",
            messages=(),
            max_tokens=None,
            sampling=Sampling(),
            stop=(),
            stream=False,
            priority=level,
            timeout_s=1e9,
        ),
        reply_subject="_INBOX.x",
        arrival=arrival,
        arrived_at=arrival * 1e-3,
        scope=_Scope(),
        key=queue_key(enqueued_at=arrival * 1e-3, level=level, aging_s=5.0, arrival=arrival),
    )


def _admit_queue_take(admission: Admission, queue: RequestQueue, index: int) -> None:
    sequence = _sequence(f"new{index}")
    assert admission.refusal(sequence) is None
    admission.enter(sequence)
    admission.assess()
    sequence.advance(Event.TOKENISED)
    queue.add(sequence)
    taken = queue.take()
    admission.batched(taken)
    admission.leave(taken)
    admission.assess()


def _time(call: Callable[[int], object]) -> str:
    """Median and 99th percentile of many calls, in microseconds."""
    samples = []
    for index in range(SAMPLES):
        began = time.perf_counter_ns()
        call(index)
        samples.append((time.perf_counter_ns() - began) / 1000)
    samples.sort()
    return f"{statistics.median(samples):.1f} / {samples[int(0.99 * SAMPLES)]:.1f}"


# --- priority -----------------------------------------------------------------------------


async def bench_priority(bench: Bench) -> None:
    """Eight slots saturated by LOW, one HIGH a second; beside it the same with one level only."""
    turn_s = bench.config.worker.simulated.turn_ms / 1000
    levels = await _high_among_low(bench, levels=3)
    fifo = await _high_among_low(bench, levels=1)
    _print(
        f"time to first token of HIGH, median: {1000 * levels:.0f} ms "
        f"({levels / turn_s:.1f} turns; required: under 3 turns and its prefill); "
        f"with one level only {1000 * fifo:.0f} ms: {fifo / levels:.0f} times as long"
    )


async def _high_among_low(bench: Bench, *, levels: int) -> float:
    """The median seconds to the first token of the urgent requests."""
    bench = replace(bench, engine="simulated").having(
        "request_queue", priority_levels=levels, max_depth=200
    )
    firsts: list[float] = []
    low_seconds: list[float] = []

    async def low(client: Client) -> None:
        while True:
            began_at = trio.current_time()
            await _ask(client, max_tokens=100, priority=levels - 1)
            low_seconds.append(trio.current_time() - began_at)

    async with running(bench) as worker, trio.open_nursery() as nursery:
        for _ in range(LOW_REQUESTS):
            nursery.start_soon(low, worker.client)
        await trio.sleep(SATURATED_S)
        for _ in range(HIGH_REQUESTS):
            began_at = trio.current_time()
            firsts.append(await _ask(worker.client, max_tokens=10, priority=0) - began_at)
            await trio.sleep_until(began_at + 1)
        nursery.cancel_scope.cancel(reason="measured")
    aging_s = (bench.config.worker.request_queue.aging_ms or 0) / 1000
    _print(
        f"  levels: {levels}; {HIGH_REQUESTS} HIGH, meanwhile {len(low_seconds)} LOW completed, "
        f"the slowest in {max(low_seconds):.1f} s (a LOW is overtaken by arrivals of "
        f"{(levels - 1) * aging_s:g} s only)"
    )
    return statistics.median(firsts)


async def _ask(client: Client, *, max_tokens: int, priority: int) -> float:
    """Ask and read to the end; returns when the first token came."""
    first_at = 0.0
    request = {
        "prompt": "Once upon a time there was a town by the sea",
        "max_tokens": max_tokens,
        "priority": priority,
        "stream": True,
        "timeout_ms": 600_000,
    }
    async with client.ask(request) as answer:
        async for chunk in answer:
            if chunk.text and not first_at:
                first_at = trio.current_time()
    return first_at


# --- preemption ---------------------------------------------------------------------------


async def bench_preemption(bench: Bench) -> None:
    """What it costs that one request gives its slot to another: the time beyond both alone."""
    for kept_mb in (512, 0):
        alone = bench.having("continuous_batching", max_batch_size=1)
        async with running(alone.having("engine", prefix_cache_mb=kept_mb)) as worker:
            client = worker.client
            await _ask(client, max_tokens=LOW_TOKENS, priority=2)
            costs = [await _cost_of_preemption(client) for _ in range(bench.rounds)]
            how = "kept" if kept_mb else "computed again"
            _print(
                f"a preemption after {LOW_TOKENS // 2} tokens, cache {how}: "
                f"{1000 * statistics.median(costs):.0f} ms beyond both requests alone "
                f"({len(costs)} rounds)"
            )


async def _cost_of_preemption(client: Client) -> float:
    async def timed(max_tokens: int, priority: int) -> float:
        began_at = trio.current_time()
        await _ask(client, max_tokens=max_tokens, priority=priority)
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


PARTS: Mapping[str, Part] = {
    "overhead": bench_overhead,
    "priority": bench_priority,
    "preemption": bench_preemption,
}


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
