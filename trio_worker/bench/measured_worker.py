"""A worker that is measured as a whole: NATS in, NATS out, streaming."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import accumulate
from typing import Any

import msgspec
import trio

from trio_worker.bench.programs import free_port
from trio_worker.bench.prompts import request_for
from trio_worker.client import Answer, Client
from trio_worker.config import Config
from trio_worker.launch import EngineKind, launch
from trio_worker.monitoring.metrics import BATCH_FORMATION, HistogramMetric
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.snapshot import Snapshot
from trio_worker.ports import Broker
from trio_worker.wire import subjects

STOP_S = 10.0
"""For a worker whose callers have left; after that it is cancelled."""


class MeasuredWorker:
    """A running worker, and the client that measures it."""

    def __init__(
        self, client: Client, worker_id: str, observed: Observed, *, nats_url: str
    ) -> None:
        self._client = client
        self._worker_id = worker_id
        self._observed = observed
        self.nats_url = nats_url

    @property
    def subject(self) -> str:
        """Where it is asked."""
        return subjects.direct(self._worker_id)

    @property
    def device(self) -> str:
        return str(self._snapshot().engine.device)

    @property
    def largest_batch(self) -> int:
        return self._snapshot().batch.max_batch_seen

    def ask(self, request: Mapping[str, Any]) -> AbstractAsyncContextManager[Answer]:
        """As the client does, of this worker."""
        return self._client.ask(request, worker_id=self._worker_id)

    async def tell_story(self, *, max_tokens: int, level: int) -> float:
        """Ask at this level for one and the same story, to its end; when its first token came."""
        first_at = 0.0
        request = {
            "prompt": "Once upon a time there was a town by the sea",
            "max_tokens": max_tokens,
            "priority": level,
            "stream": True,
            "timeout_ms": 600_000,
        }
        async with self.ask(request) as answer:
            async for chunk in answer:
                if chunk.text and not first_at:
                    first_at = trio.current_time()
        return first_at

    async def rate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        *,
        concurrent: int,
        samplings: Sequence[Mapping[str, Any]] = ({},),
    ) -> float:
        """Tokens per second of all these prompts, `concurrent` at a time.

        The samplings are given to the prompts in turn.
        """
        tokens = 0
        limiter = trio.CapacityLimiter(concurrent)

        async def one(prompt: str, sampling: Mapping[str, Any]) -> None:
            nonlocal tokens
            request = request_for(prompt, max_tokens=max_tokens, **sampling)
            async with limiter, self.ask(request) as answer:
                async for chunk in answer:
                    if chunk.usage is not None:
                        tokens += chunk.usage["completion_tokens"]

        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for i, prompt in enumerate(prompts):
                nursery.start_soon(one, prompt, samplings[i % len(samplings)])
        return tokens / (trio.current_time() - began_at)

    def formation_within_ms(self) -> Callable[[float], float]:
        """For a share of all batches: the milliseconds within which these were formed."""
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


@asynccontextmanager
async def open_measured_worker(
    config: Config, engine: EngineKind, engine_program: Sequence[str]
) -> AsyncIterator[MeasuredWorker]:
    """A worker on a NATS server of its own, and one connection for both.

    However the block is left, the worker stops as when it is told to. Raises what `launch` raises.
    """
    nats = msgspec.structs.replace(
        config.nats, url=f"nats://127.0.0.1:{free_port()}", embedded="always"
    )
    config = msgspec.structs.replace(config, nats=nats)
    stop, stops = trio.open_memory_channel[None](1)
    ready, ended = trio.Event(), trio.Event()
    seen: list[Observed] = []
    brokers: list[Broker] = []

    async def greet(broker: Broker) -> None:
        brokers.append(broker)
        ready.set()
        await trio.sleep_forever()

    async def serve() -> None:
        try:
            await launch(
                config,
                engine=engine,
                engine_program=engine_program,
                stops=stops,
                greet=greet,
                on_ready=seen.append,
            )
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113 - `ready` is waited for
        await ready.wait()
        client = Client(brokers[0], timeout_ms=None, attempts=1)
        try:
            yield MeasuredWorker(client, config.worker.id, seen[0], nats_url=nats.url)
        finally:
            stop.send_nowait(None)
            with trio.move_on_after(STOP_S, shield=True):
                await ended.wait()
