"""Seconds to the first token, and between tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import trio

from trio_worker.bench.figures import ms, p95, print_comparison, say
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.prompts import request_for, stories, words
from trio_worker.bench.setup import Setup

SHARING = 16
SYSTEM_WORDS = 600

STREAMS = 7
NEWCOMER_WORDS = 4000
SETTLED_TOKENS = 8
"""This many tokens of every stream come before gaps are measured."""
MEASURED_TOKENS = 32
"""When every stream has this many, the newcomer comes."""


async def prefix(setup: Setup) -> None:
    """What it gains that what prompts begin with is computed once."""
    wide = setup.having("continuous_batching", max_batch_size=SHARING)
    none = wide.having("engine", prefix_cache_mb=0)
    async with wide.worker() as reusing, none.worker() as computing:

        async def first_token_s(worker: MeasuredWorker, number: int) -> float:
            system = words(SYSTEM_WORDS, seed=number)
            waits = await _first_token_waits(worker, stories(str(number), SHARING), system)
            return statistics.median(waits)

        await print_comparison(
            f"{SHARING} requests with the same {SYSTEM_WORDS} tokens before them, without and "
            "with reuse, median seconds to the first token",
            partial(first_token_s, computing),
            partial(first_token_s, reusing),
            rounds=setup.rounds,
            required="4.0",
        )


async def _first_token_waits(
    worker: MeasuredWorker, prompts: Sequence[str], system: str
) -> list[float]:
    """How many seconds each prompt waits for its first text, all asked at the same time."""
    waits: list[float] = []

    async def one(prompt: str) -> None:
        began_at = trio.current_time()
        async with worker.ask(request_for(prompt, system=system, max_tokens=2)) as answer:
            async for chunk in answer:
                if chunk.text:
                    waits.append(trio.current_time() - began_at)
                    break

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(one, prompt)
    return waits


async def newcomer(setup: Setup) -> None:
    """The gaps between tokens of several streams, before and while a long prompt is computed."""
    target_ms = setup.config.worker.engine.token_gap_target_ms
    async with setup.worker() as worker:
        usual, late, largest = [], [], []
        for number in range(1, setup.rounds + 1):
            gaps = await _gaps_around_a_newcomer(worker, number)
            before, during = gaps.before, gaps.during
            usual.append(statistics.median(during))
            late.append(p95(during))
            largest.append(max(during))
            say(
                f"  round {number}: gaps of {STREAMS} streams, median, p95 and largest, "
                f"{ms(statistics.median(before))}, {ms(p95(before))} and {ms(max(before))} ms; "
                f"{ms(usual[-1])}, {ms(late[-1])} and {ms(largest[-1])} ms while a prompt of "
                f"{gaps.prompt_tokens} tokens was computed, which took {gaps.seconds:.1f} s"
            )
        say(
            f"gaps beside a newcomer with a long prompt: median {ms(statistics.median(usual))} "
            f"ms, p95 {ms(statistics.median(late))} ms, "
            f"largest {ms(statistics.median(largest))} ms; {target_ms} wanted"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gaps:
    """Seconds between tokens of the streams, without and beside a newcomer."""

    before: list[float]
    during: list[float]
    prompt_tokens: int
    """Of the newcomer, whose only token took `seconds`."""
    seconds: float


async def _gaps_around_a_newcomer(worker: MeasuredWorker, number: int) -> _Gaps:
    gaps: list[float] = []
    settled, measured = ([trio.Event() for _ in range(STREAMS)] for _ in range(2))

    def note(stream: int, token: int, gap_s: float) -> None:
        if token > SETTLED_TOKENS:
            gaps.append(gap_s)
            settled[stream].set()
        if token > MEASURED_TOKENS:
            measured[stream].set()

    async with trio.open_nursery() as nursery:
        for stream in range(STREAMS):
            nursery.start_soon(_tell_stories, worker, f"{number}/{stream}", partial(note, stream))
        for each in settled:
            await each.wait()
        gaps.clear()
        for each in measured:
            await each.wait()
        before = list(gaps)
        gaps.clear()
        began_at = trio.current_time()
        request = request_for(words(NEWCOMER_WORDS, seed=number), max_tokens=1)
        async with worker.ask(request) as answer:
            async for chunk in answer:
                usage = chunk.usage
        assert usage is not None
        seconds = trio.current_time() - began_at
        during = list(gaps)
        nursery.cancel_scope.cancel(reason="measured")
    return _Gaps(
        before=before, during=during, prompt_tokens=usage["prompt_tokens"], seconds=seconds
    )


async def _tell_stories(
    worker: MeasuredWorker, name: str, note: Callable[[int, float], None]
) -> None:
    """One story after the other; notes the number of every token, and the gap before it."""
    for again in count():
        (story,) = stories(f"{name}/{again}", 1)
        async with worker.ask(request_for(story, max_tokens=1024)) as answer:
            token, last_at = 0, trio.current_time()
            async for chunk in answer:
                if chunk.text:
                    now = trio.current_time()
                    token += 1
                    note(token, now - last_at)
                    last_at = now
