"""A worker against mlx-lm's own loop, which runs in a process of its own (`engine/baseline.py`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from trio_worker.bench.figures import print_comparison, say
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.programs import Program, open_program
from trio_worker.bench.prompts import messages_for, stories
from trio_worker.bench.setup import Setup
from trio_worker.bench.throughput import CONCURRENT


async def bare(setup: Setup) -> None:
    """What the worker costs on top of the model."""
    if setup.engine == "simulated":
        say("a worker against mlx-lm's own loop: not with a simulated engine")
        return
    for concurrent in (1, CONCURRENT, 2 * CONCURRENT):
        wide = setup.having("continuous_batching", max_batch_size=concurrent)
        async with wide.worker() as worker, open_baseline_loop(wide.config.worker.model) as loop:
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

    def __init__(self, program: Program) -> None:
        self._program = program

    async def rate(self, prompts: Sequence[str], max_tokens: int, *, concurrent: int) -> float:
        """Tokens per second of all these prompts, `concurrent` at a time."""
        asked = {
            "prompts": [messages_for(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "concurrent": concurrent,
        }
        await self._program.write(asked)
        answer = await self._program.read()
        return float(answer["tokens"] / answer["seconds"])


@asynccontextmanager
async def open_baseline_loop(model: str) -> AsyncIterator[BaselineLoop]:
    """Such a loop, loaded. Raises `WorkerFault` if it ends."""
    async with open_program("trio_worker.engine", "bare", model, says_errors=False) as program:
        await program.read()
        yield BaselineLoop(program)
