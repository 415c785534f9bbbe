"""A worker against mlx-lm's own loop, which runs in a process of its own (`engine/baseline.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from trio_worker.bench.figures import print_comparison, say
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.prompts import messages_for, stories
from trio_worker.bench.setup import Setup
from trio_worker.bench.throughput import CONCURRENT
from trio_worker.errors import WorkerFault


async def bare(setup: Setup) -> None:
    """What the worker costs on top of the model."""
    if setup.engine == "simulated":
        say("a worker against mlx-lm's own loop: not with a simulated engine")
        return
    for concurrent in (1, CONCURRENT, 2 * CONCURRENT):
        wide = setup.having("continuous_batching", max_batch_size=concurrent)
        async with wide.worker() as worker, _open_baseline_loop(wide) as loop:
            measured: list[MeasuredWorker | BaselineLoop] = [worker, loop]
            ours, theirs = (partial(_story_rate, setup, each, concurrent) for each in measured)
            await theirs(0)
            await print_comparison(
                f"a worker against mlx-lm's own loop, {concurrent} at a time, tokens/s",
                ours,
                theirs,
                rounds=setup.rounds,
                required="0.97",
            )


async def _story_rate(
    setup: Setup, measured: MeasuredWorker | BaselineLoop, concurrent: int, number: int
) -> float:
    prompts = stories(str(number), 2 * concurrent)
    return await measured.rate(prompts, setup.max_tokens, concurrent=concurrent)


class BaselineLoop:
    """mlx-lm's own loop in a process of its own (`engine/baseline.py`)."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions = process.stdin
        self._answers = process.stdout
        self._held = b""

    async def read(self) -> Any:
        """What it says next. Raises `WorkerFault` if it has ended."""
        while b"\n" not in self._held:
            data = await self._answers.receive_some()
            if not data:
                raise WorkerFault("mlx-lm's own loop ended before it had answered")
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    async def rate(self, prompts: Sequence[str], max_tokens: int, *, concurrent: int) -> float:
        """Tokens per second of all these prompts, `concurrent` at a time."""
        asked = {
            "prompts": [messages_for(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "concurrent": concurrent,
        }
        await self._questions.send_all(json.dumps(asked).encode() + b"\n")
        answer = await self.read()
        return float(answer["tokens"] / answer["seconds"])


@asynccontextmanager
async def _open_baseline_loop(setup: Setup) -> AsyncIterator[BaselineLoop]:
    command = [sys.executable, "-P", "-m", "trio_worker.engine", "bare", setup.config.worker.model]
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
        loop = BaselineLoop(process)
        await loop.read()
        yield loop
        nursery.cancel_scope.cancel(reason="measured")
