"""A worker with a model so small that what is around it shows, against what else serves it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from trio_worker.bench.baseline import BaselineLoop, open_baseline_loop
from trio_worker.bench.cost import cost_of
from trio_worker.bench.figures import print_comparison, say
from trio_worker.bench.load import Load
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.programs import free_port, open_program
from trio_worker.bench.prompts import stories
from trio_worker.bench.setup import Setup

STREAMS = (1, 8, 16)
ANSWER_TOKENS = 600
"""Long enough that the beginnings of the answers do not matter."""


async def tiny(setup: Setup) -> None:
    """Against mlx-lm's own loop, and against its HTTP server with callers of the same kind."""
    async with (
        open_tiny_model() as model,
        with_model(setup, model).worker() as worker,
        open_baseline_loop(model) as loop,
        open_http_server(model) as url,
    ):
        say(f"a tiny model on {worker.device}:")
        await _worker_rate(worker, 1, 0)
        await _loop_rate(loop, 1, 0)
        for streams in STREAMS:
            ours = partial(_worker_rate, worker, streams)
            title = f"a worker against %s, {streams} at a time, tokens/s"
            await print_comparison(
                title % "mlx-lm's own loop",
                ours,
                partial(_loop_rate, loop, streams),
                rounds=setup.rounds,
                required="0.75",
            )
            await print_comparison(
                title % "mlx_lm.server",
                ours,
                partial(server_rate, url, streams),
                rounds=setup.rounds,
                required="1.0",
            )


@asynccontextmanager
async def open_tiny_model() -> AsyncIterator[str]:
    """The folder of one with random weights, which is made now and is there during the block."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "tiny")
        async with open_program("trio_worker.engine", "tiny", model):
            pass  # it ends by itself
        yield model


def with_model(setup: Setup, model: str) -> Setup:
    """The same with this model, and place for all streams."""
    wide = setup.having("continuous_batching", max_batch_size=max(STREAMS))
    worker = msgspec.structs.replace(wide.config.worker, model=model)
    return replace(wide, engine="mlx", config=msgspec.structs.replace(wide.config, worker=worker))


@asynccontextmanager
async def open_http_server(model: str) -> AsyncIterator[str]:
    """mlx-lm's, starting; its URL, where it is to be asked for chats."""
    port = free_port()
    program = open_program(
        "trio_worker.engine", "http", model, "--port", str(port), says_errors=False
    )
    async with program:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        # It loads the model for its first request.
        await server_rate(url, 1, 0)
        yield url


async def _worker_rate(worker: MeasuredWorker, streams: int, number: int) -> float:
    load = answers(worker.nats_url, worker.subject, streams, number)
    return (await cost_of(load)).token_rate


async def server_rate(url: str, streams: int, number: int) -> float:
    """Tokens a second of an HTTP server."""
    load = answers(url, "", streams, number)
    return (await cost_of(load, callers="trio_worker.bench.http_load")).token_rate


async def _loop_rate(loop: BaselineLoop, streams: int, number: int) -> float:
    prompts = stories(f"{number}/{streams}", streams)
    return await loop.rate(prompts, ANSWER_TOKENS, concurrent=streams)


def answers(url: str, subject: str, streams: int, number: int) -> Load:
    """A long answer for each, all at once."""
    return Load(
        url=url,
        subject=subject,
        request={"stream": True, "max_tokens": ANSWER_TOKENS, "timeout_ms": 600_000},
        prompts=tuple(stories(f"{number}/{streams}", streams)),
        concurrent=streams,
    )
