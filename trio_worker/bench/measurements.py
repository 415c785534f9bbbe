"""Measures a whole worker on this machine: NATS in, NATS out, streaming.

Every figure is the median of ratios of two measurements, taken in turn in the same run, since
machines are noisy. No prompt comes twice, so nothing is answered from an earlier measurement.
"""

from __future__ import annotations

import json
import math
import random
import socket
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count
from typing import Any, TypeAlias

import msgspec
import trio

from trio_worker.client import Client
from trio_worker.config import Config
from trio_worker.errors import WorkerFault
from trio_worker.launch import EngineKind, launch
from trio_worker.monitoring.metrics import BATCH_FORMATION, HistogramMetric
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.snapshot import Snapshot
from trio_worker.ports import Broker

Measurement: TypeAlias = Callable[[int], Awaitable[float]]
"""Of the round with this number."""

CONCURRENT = 8
SHARING = 16
SYSTEM_WORDS = 600
NEWCOMER_WORDS = 4000
SETTLED_TOKENS = 8
"""So many tokens of every stream come before gaps are measured."""
MEASURED_TOKENS = 32
"""When every stream has so many, the newcomer comes."""

SUBJECTS = (
    "a lighthouse keeper and the sea",
    "the city of Paris and its history",
    "a bicycle race through the mountains",
    "a river and the people who live on it",
    "the weather on a small island",
    "a baker who rises before dawn",
    "a train that crosses the desert",
    "a good teacher and a bad pupil",
)
WORDS = (
    "the sea was calm and blue that day when old men went out to fish for their supper while "
    "young boys ran along the sand looking for wood rope glass or bread"
)
"""Short and common: about a token each."""

PLAIN: Sequence[Mapping[str, Any]] = ({},)
HALF_DRAWN: Sequence[Mapping[str, Any]] = ({}, {"temperature": 1.0})
HALF_SEEDED: Sequence[Mapping[str, Any]] = ({}, {"temperature": 1.0, "seed": 1})
ALL_DIFFERENT: Sequence[Mapping[str, Any]] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_p": 0.9},
    {"temperature": 1.2, "seed": 3, "top_k": 40},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05},
    {"repetition_penalty": 1.2},
    {"temperature": 0.9, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": {"100": -5.0}, "logprobs": True, "top_logprobs": 2},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured, and how thoroughly."""

    config: Config
    engine: EngineKind
    max_tokens: int
    rounds: int

    def having(self, section: str, **keys: object) -> Bench:
        """The same with keys of a section of `worker` replaced."""
        worker = self.config.worker
        changed = msgspec.structs.replace(getattr(worker, section), **keys)
        worker = msgspec.structs.replace(worker, **{section: changed})
        return replace(self, config=msgspec.structs.replace(self.config, worker=worker))


Part: TypeAlias = Callable[[Bench], Awaitable[None]]


async def run_bench(bench: Bench, parts: Sequence[Part]) -> None:
    """Measure these parts, and print a line for each figure with what is required of it.

    Cancelled: what has been printed stands. Raises what `launch` raises.
    """
    for part in parts:
        await part(bench)


# --- the parts ----------------------------------------------------------------------------


async def _batching(bench: Bench) -> None:
    async with running(bench) as worker:

        async def rate(concurrent: int, number: int) -> float:
            stories = _stories(f"{number}/{concurrent}", CONCURRENT)
            return await worker.rate(stories, bench.max_tokens, concurrent=concurrent)

        await _compare(
            f"{CONCURRENT} requests together against one at a time, tokens/s",
            partial(rate, CONCURRENT),
            partial(rate, 1),
            rounds=bench.rounds,
            required="4.0",
        )
        _print(f"  on {worker.device}; the largest batch had {worker.largest_batch} requests")


async def _bare(bench: Bench) -> None:
    if bench.engine == "simulated":
        _print("a worker against mlx-lm's own loop: not with a simulated engine")
        return
    for concurrent in (1, CONCURRENT, 2 * CONCURRENT):
        wide = bench.having("continuous_batching", max_batch_size=concurrent)
        async with running(wide) as worker, _running_loop(wide) as loop:
            measured: list[_Worker | _Loop] = [worker, loop]
            ours, theirs = (partial(_story_rate, bench, each, concurrent) for each in measured)
            await theirs(0)
            await _compare(
                f"a worker against mlx-lm's own loop, {concurrent} at a time, tokens/s",
                ours,
                theirs,
                rounds=bench.rounds,
                required="0.97",
            )


async def _story_rate(
    bench: Bench, measured: _Worker | _Loop, concurrent: int, number: int
) -> float:
    stories = _stories(str(number), 2 * concurrent)
    return await measured.rate(stories, bench.max_tokens, concurrent=concurrent)


async def _prefix(bench: Bench) -> None:
    wide = bench.having("continuous_batching", max_batch_size=SHARING)
    none = wide.having("engine", prefix_cache_mb=0)
    async with running(wide) as reusing, running(none) as computing:

        async def first_token_s(worker: _Worker, number: int) -> float:
            system = _words(SYSTEM_WORDS, seed=number)
            waits = await worker.first_token_waits(_stories(str(number), SHARING), system)
            return statistics.median(waits)

        await _compare(
            f"{SHARING} requests with the same {SYSTEM_WORDS} tokens before them, without and "
            "with reuse, median seconds to the first token",
            partial(first_token_s, computing),
            partial(first_token_s, reusing),
            rounds=bench.rounds,
            required="4.0",
        )


async def _seeds(bench: Bench) -> None:
    await _compare_samplings(
        bench,
        "half of the requests seeded against none, tokens/s",
        HALF_SEEDED,
        HALF_DRAWN,
        required="0.95",
    )


async def _mixing(bench: Bench) -> None:
    await _compare_samplings(
        bench,
        "every request with sampling of its own against all greedy, tokens/s",
        ALL_DIFFERENT,
        PLAIN,
        required=None,
    )


async def _compare_samplings(
    bench: Bench,
    title: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    *,
    required: str | None,
) -> None:
    async with running(bench) as worker:

        async def rate(name: str, samplings: Sequence[Mapping[str, Any]], number: int) -> float:
            stories = _stories(f"{number}/{name}", 2 * CONCURRENT)
            return await worker.rate(
                stories, bench.max_tokens, concurrent=CONCURRENT, samplings=samplings
            )

        await _compare(
            title,
            partial(rate, "ours", ours),
            partial(rate, "theirs", theirs),
            rounds=bench.rounds,
            required=required,
        )


async def _newcomer(bench: Bench) -> None:
    """The gaps between tokens of seven streams, before and while a long prompt is computed."""
    target_ms = bench.config.worker.engine.token_gap_target_ms
    async with running(bench) as worker:
        usual, late, largest = [], [], []
        for number in range(1, bench.rounds + 1):
            before, during, tokens, seconds = await worker.gaps_around_a_newcomer(number)
            usual.append(statistics.median(during))
            late.append(_p95(during))
            largest.append(max(during))
            _print(
                f"  round {number}: gaps of {CONCURRENT - 1} streams, median, p95 and largest, "
                f"{_ms(statistics.median(before))}, {_ms(_p95(before))} and {_ms(max(before))} ms; "
                f"{_ms(usual[-1])}, {_ms(late[-1])} and {_ms(largest[-1])} ms while a prompt of "
                f"{tokens} tokens was computed, which took {seconds:.1f} s"
            )
        _print(
            f"gaps beside a newcomer with a long prompt: median {_ms(statistics.median(usual))} "
            f"ms, p95 {_ms(statistics.median(late))} ms, "
            f"largest {_ms(statistics.median(largest))} ms; {target_ms} wanted"
        )


PARTS: Mapping[str, Part] = {
    "batching": _batching,
    "bare": _bare,
    "prefix": _prefix,
    "seeds": _seeds,
    "newcomer": _newcomer,
    "mixing": _mixing,
}


# --- what is asked ------------------------------------------------------------------------


def _stories(name: str, number: int) -> list[str]:
    """Prompts with long answers, unlike those of any other name from the first words on."""
    return [
        f"{name}.{i}: write a long story about {SUBJECTS[i % len(SUBJECTS)]}."
        for i in range(number)
    ]


def _words(number: int, *, seed: int) -> str:
    words = WORDS.split()
    drawn = random.Random(seed)  # noqa: S311 - no secret
    return " ".join(drawn.choice(words) for _ in range(number))


class _Worker:
    """A running worker, and the client that measures it."""

    def __init__(self, client: Client, worker_id: str, observed: Observed) -> None:
        self.client = client
        self._worker_id = worker_id
        self._observed = observed

    @property
    def device(self) -> str:
        return str(self._snapshot().engine.device)

    @property
    def largest_batch(self) -> int:
        return self._snapshot().batch.max_batch_seen

    async def rate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        *,
        concurrent: int,
        samplings: Sequence[Mapping[str, Any]] = PLAIN,
    ) -> float:
        """Tokens per second of all these prompts, so many at a time."""
        tokens = 0
        limiter = trio.CapacityLimiter(concurrent)

        async def one(prompt: str, sampling: Mapping[str, Any]) -> None:
            nonlocal tokens
            request = _request(prompt, max_tokens=max_tokens, **sampling)
            async with limiter, self.client.ask(request, worker_id=self._worker_id) as answer:
                async for chunk in answer:
                    if chunk.usage is not None:
                        tokens += chunk.usage["completion_tokens"]

        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for i, prompt in enumerate(prompts):
                nursery.start_soon(one, prompt, samplings[i % len(samplings)])
        return tokens / (trio.current_time() - began_at)

    async def first_token_waits(self, prompts: Sequence[str], system: str) -> list[float]:
        """How many seconds each prompt waits for its first text, all asked at the same time."""
        waits: list[float] = []

        async def one(prompt: str) -> None:
            began_at = trio.current_time()
            request = _request(prompt, system=system, max_tokens=2)
            async with self.client.ask(request, worker_id=self._worker_id) as answer:
                async for chunk in answer:
                    if chunk.text:
                        waits.append(trio.current_time() - began_at)
                        break

        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(one, prompt)
        return waits

    async def gaps_around_a_newcomer(
        self, number: int
    ) -> tuple[list[float], list[float], int, float]:
        """The gaps between tokens without and beside a newcomer, its tokens, and its wait."""
        gaps: list[float] = []
        settled, measured = ([trio.Event() for _ in range(CONCURRENT - 1)] for _ in range(2))

        def note(index: int, token: int, gap_s: float) -> None:
            if token > SETTLED_TOKENS:
                gaps.append(gap_s)
                settled[index].set()
            if token > MEASURED_TOKENS:
                measured[index].set()

        async with trio.open_nursery() as nursery:
            for index in range(CONCURRENT - 1):
                nursery.start_soon(self._tell_stories, f"{number}/{index}", partial(note, index))
            for each in settled:
                await each.wait()
            gaps.clear()
            for each in measured:
                await each.wait()
            before = list(gaps)
            gaps.clear()
            began_at = trio.current_time()
            request = _request(_words(NEWCOMER_WORDS, seed=number), max_tokens=1)
            async with self.client.ask(request, worker_id=self._worker_id) as answer:
                async for chunk in answer:
                    usage = chunk.usage
            assert usage is not None
            seconds = trio.current_time() - began_at
            during = list(gaps)
            nursery.cancel_scope.cancel(reason="measured")
        return before, during, usage["prompt_tokens"], seconds

    async def _tell_stories(self, name: str, note: Callable[[int, float], None]) -> None:
        """One story after the other; notes the number of every token, and the gap before it."""
        for again in count():
            (story,) = _stories(f"{name}/{again}", 1)
            request = _request(story, max_tokens=1024)
            async with self.client.ask(request, worker_id=self._worker_id) as answer:
                token, last_at = 0, trio.current_time()
                async for chunk in answer:
                    if chunk.text:
                        now = trio.current_time()
                        token += 1
                        note(token, now - last_at)
                        last_at = now

    def formation_within_ms(self) -> Callable[[float], float]:
        """Bounds of the time that such a share of all batches took to form, in milliseconds."""
        (formation,) = (
            each
            for each in self._observed.metrics()
            if isinstance(each, HistogramMetric) and each.description is BATCH_FORMATION
        )
        counts = [sum(column) for column in zip(*formation.counts.values(), strict=True)]
        bounds = (*formation.description.buckets, math.inf)

        def within(share: float) -> float:
            reached = accumulate(counts)
            return next(
                1000 * bound
                for bound, so_far in zip(bounds, reached, strict=True)
                if so_far >= share * sum(counts)
            )

        return within

    def _snapshot(self) -> Snapshot:
        snapshot = self._observed.snapshot()
        assert isinstance(snapshot, Snapshot)
        return snapshot


def _request(prompt: str, *, system: str | None = None, **fields: object) -> Mapping[str, Any]:
    return {
        "messages": _messages(prompt, system),
        "temperature": 0,
        "stream": True,
        "timeout_ms": 600_000,
        **fields,
    }


def _messages(prompt: str, system: str | None = None) -> list[Mapping[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": prompt}]


# --- what answers -------------------------------------------------------------------------


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[_Worker]:
    """A worker on a NATS server of its own, its monitoring off, and one connection for both."""
    quiet = bench.having("monitoring", port=None).config
    nats = msgspec.structs.replace(quiet.nats, url=_free_url(), embedded="always")
    config = msgspec.structs.replace(quiet, nats=nats)
    stop, stops = trio.open_memory_channel[None](1)
    ready = trio.Event()
    seen: list[Observed] = []
    brokers: list[Broker] = []

    async def greet(broker: Broker) -> None:
        brokers.append(broker)
        ready.set()
        await trio.sleep_forever()

    async def serve() -> None:
        await launch(config, engine=bench.engine, stops=stops, greet=greet, on_ready=seen.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113 - `ready` is waited for
        await ready.wait()
        assert config.worker.id is not None
        yield _Worker(Client(brokers[0], timeout_ms=None, attempts=1), config.worker.id, seen[0])
        stop.send_nowait(None)


class _Loop:
    """mlx-lm's own loop in a process of its own (`engine/baseline.py`)."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions = process.stdin
        self._answers = process.stdout
        self._held = b""

    async def read(self) -> Any:
        while b"\n" not in self._held:
            data = await self._answers.receive_some()
            if not data:
                raise WorkerFault("mlx-lm's own loop ended before it had answered")
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    async def rate(self, prompts: Sequence[str], max_tokens: int, *, concurrent: int) -> float:
        """Tokens per second of all these prompts, so many at a time."""
        asked = {
            "prompts": [_messages(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "concurrent": concurrent,
        }
        await self._questions.send_all(json.dumps(asked).encode() + b"\n")
        answer = await self.read()
        return float(answer["tokens"] / answer["seconds"])


@asynccontextmanager
async def _running_loop(bench: Bench) -> AsyncIterator[_Loop]:
    command = [sys.executable, "-P", "-m", "trio_worker.engine", "bare", bench.config.worker.model]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        )
        loop = _Loop(process)
        await loop.read()
        yield loop
        nursery.cancel_scope.cancel(reason="measured")


def _free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"nats://127.0.0.1:{probe.getsockname()[1]}"


# --- figures ------------------------------------------------------------------------------


async def _compare(
    title: str, one: Measurement, other: Measurement, *, rounds: int, required: str | None
) -> None:
    """Print the median of the ratios of `one` to `other`, which take turns in going first."""
    pairs: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        if number % 2:
            first = await one(number)
            pairs.append((first, await other(number)))
        else:
            second = await other(number)
            pairs.append((await one(number), second))
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    _print(
        f"{title}: {medians[0]:.1f} to {medians[1]:.1f}, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        + (f"; {required} required" if required else "")
    )


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
