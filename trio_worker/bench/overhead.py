"""What the core's own operations cost, and how long batches take to form."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import trio

from trio_worker.bench.figures import say
from trio_worker.bench.setup import Setup
from trio_worker.core.admission import Admission
from trio_worker.core.fair_shares import FairShares
from trio_worker.core.memory import MB, PressureGauge
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request import Request
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Event, Sequence, queue_key
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.protocol.turn import RequestId, Sampling

DEPTHS = (0, 100, 1_000, 10_000)

SAMPLES = 2_000
CALLERS = 100
ANSWER_TOKENS = 20
ROWS = 8
FAST_TURN_MS = 2.0
"""As a small model on a Mac's GPU."""

FORMATION_WAVES = 40


class _Scope:
    def cancel(self, reason: str | None = None) -> None:
        """Nobody is waiting in it."""


async def overhead(setup: Setup) -> None:
    """Print microseconds per request of admission, queue and check, at several depths.

    And how long batches take to form, in a whole worker with turns as short as a fast model's.
    """
    say("microseconds of processor time, median / p99, with so many requests queued:")
    for depth in DEPTHS:
        for callers in (1, CALLERS):
            admission, queue, shares = _filled(depth, callers)
            check = _time(partial(_check, admission, callers))
            cycle = _time(partial(_admit_queue_take, admission, queue, shares, callers))
            say(
                f"  {depth:6d} of {callers:3d} callers: admission check {check}, "
                f"admit + queue + take + book {cycle} "
                "(required under 5000; aimed at: under 500 at p99)"
            )
    gauge = PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB)
    say(f"  memory check {_time(lambda _: gauge.level)} (required under 1000; aimed at: 10)")
    say(
        f"  what a turn of {ROWS} rows writes into the metrics "
        f"{_time(partial(_write_a_turn, RequestCounters()))} "
        "(required: under 1 % of a turn, which is 200 at 20 ms)"
    )
    fast = replace(setup, engine="simulated").having(
        "simulated", turn_ms=FAST_TURN_MS, prefill_ms_per_token=0
    )
    for wanted, window_ms in ((1, 0), (ROWS, 50)):
        await _formation(
            fast.having("continuous_batching", min_batch_size=wanted, adaptive_timeout=False),
            window_ms,
        )


async def _formation(setup: Setup, window_ms: int) -> None:
    """Callers who come and go; one in four is alone, and waits for company in vain."""
    async with setup.worker() as worker:
        for number in range(FORMATION_WAVES):
            async with trio.open_nursery() as nursery:
                for _ in range(3 * ROWS if number % 4 else 1):
                    nursery.start_soon(partial(worker.tell_story, max_tokens=10, level=1))
        within_ms = worker.formation_within_ms()
    say(
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


def _check(admission: Admission, callers: int, index: int) -> None:
    assert admission.refusal(_sequence(f"check{index}", callers)) is None


def _filled(depth: int, callers: int) -> tuple[Admission, RequestQueue, FairShares]:
    shares = FairShares()
    queue = RequestQueue(max_size=depth + 16, shares=shares)
    admission = Admission(
        queue_enabled=True,
        max_depth=depth + 8,
        max_per_caller=None,
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
        sequence = _sequence(f"queued{index}", callers)
        admission.enter(sequence)
        sequence.advance(Event.TOKENISED)
        queue.add(sequence)
    return admission, queue, shares


_arrivals = itertools.count()


def _sequence(request_id: str, callers: int) -> Sequence:
    arrival = next(_arrivals)
    level = arrival % 3
    return Sequence(
        request=Request(
            request_id=RequestId(request_id),
            prompt="x",
            messages=(),
            max_tokens=None,
            fit_max_tokens=False,
            sampling=Sampling(),
            stop=(),
            stream=False,
            priority=level,
            timeout_s=1e9,
            caller=f"caller{arrival % callers}" if callers > 1 else None,
        ),
        reply_subject="_INBOX.x",
        arrival=arrival,
        arrived_at=arrival * 1e-3,
        scope=_Scope(),
        key=queue_key(enqueued_at=arrival * 1e-3, level=level, aging_s=5.0, arrival=arrival),
    )


def _admit_queue_take(
    admission: Admission, queue: RequestQueue, shares: FairShares, callers: int, index: int
) -> None:
    sequence = _sequence(f"new{index}", callers)
    assert admission.refusal(sequence) is None
    admission.enter(sequence)
    admission.assess()
    sequence.advance(Event.TOKENISED)
    queue.add(sequence)
    taken = queue.take()
    shares.charge(taken.level, taken.caller, ANSWER_TOKENS)
    admission.batched(taken)
    admission.leave(taken)
    admission.assess()


def _time(call: Callable[[int], object]) -> str:
    """Median and 99th percentile of many calls, in microseconds of processor time.

    By the clock on the wall, the 99th percentile is that of whatever else the machine does.
    """
    samples = []
    for index in range(SAMPLES):
        began = time.thread_time_ns()
        call(index)
        samples.append((time.thread_time_ns() - began) / 1000)
    samples.sort()
    return f"{statistics.median(samples):.1f} / {samples[int(0.99 * SAMPLES)]:.1f}"
