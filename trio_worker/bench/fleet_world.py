"""A fleet in virtual time: whole workers in this process, and callers who converse with it.

A program of its own: one line of JSON in (a `FleetLoad`), one out (what has come of it). Everything
between a caller's publish and its answer is what a worker does anyhow; only the engine and the
network are simulated.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio
import trio.testing

from trio_worker.bench.figures import p95
from trio_worker.bench.prompts import words
from trio_worker.client import Client
from trio_worker.config import Config, load_config
from trio_worker.core.memory import MB, MemoryReading
from trio_worker.launch import settle_garbage_collection
from trio_worker.logs import set_up_logging
from trio_worker.ports import Broker
from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.engine import SimulatedEngine, open_simulated_engine
from trio_worker.worker import World, run_worker

CONTEXT = 32_768
PATIENCE_MS = 500_000
"""Of the callers: nobody's answer is cut off for having waited, so what is slow shows."""
HOP_S = 0.000_15
"""From a publish to its delivery, as over a nats-server on the same network."""


class FleetLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet, and what is asked of it."""

    hand_on: bool
    """Whether workers hand on; else the queue group chooses alone, at random."""
    seed: int
    speeds: tuple[float, ...]
    """Of each worker, as a share of the usual."""
    conversations: int
    turns: int
    slots: int = 8
    prefill_tokens_per_s: float = 2_000.0
    token_ms: float = 25.0
    cache_tokens: int = 80_000
    tenants: int = 10
    system_tokens: int = 1_500
    question_tokens: tuple[int, int] = (40, 160)
    answer_tokens: int = 150
    begin_s: float = 600.0
    """Within which the conversations begin, one after the other at random."""
    think_s: float = 35.0
    """On average, between an answer and the next question."""


class FleetFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What has come of a load."""

    cached_share: float
    """Of all tokens of all prompts, those that need not be computed."""
    first_token_p50_s: float
    first_token_p95_s: float
    workers_per_conversation: float
    virtual_s: float


class Plenty:
    """Memory that never runs short."""

    def read(self, _engine_pid: int | None) -> MemoryReading:
        return MemoryReading(used=100 * MB, available=64_000 * MB, total=128_000 * MB)


class Conversations:
    """The callers. Their state: what has come so far."""

    def __init__(self, load: FleetLoad, client: Client) -> None:
        self._load = load
        self._client = client
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._first_token_s: list[float] = []
        self._asked: defaultdict[int, set[str]] = defaultdict(set)
        """Which workers have answered, by conversation."""
        self._systems = [
            f"tenant{tenant} {words(load.system_tokens - 1, seed=tenant)}"
            for tenant in range(load.tenants)
        ]

    async def hold(self) -> FleetFigures:
        """All of them, to their ends."""
        async with trio.open_nursery() as nursery:
            for number in range(self._load.conversations):
                nursery.start_soon(self._converse, number)
        return FleetFigures(
            cached_share=self._cached_tokens / self._prompt_tokens,
            first_token_p50_s=statistics.median(self._first_token_s),
            first_token_p95_s=p95(self._first_token_s),
            workers_per_conversation=statistics.mean(map(len, self._asked.values())),
            virtual_s=trio.current_time(),
        )

    async def _converse(self, number: int) -> None:
        """One conversation: a question, its answer, a thought, and the next with all before it."""
        load = self._load
        drawn = random.Random(f"{load.seed}.{number}")  # noqa: S311 - no secret
        messages = [{"role": "system", "content": drawn.choice(self._systems)}]
        await trio.sleep(drawn.uniform(0, load.begin_s))
        for turn in range(load.turns):
            length = drawn.randint(*load.question_tokens)
            question = words(length - 1, seed=drawn.randrange(2**32))
            messages.append({"role": "user", "content": f"{number}.{turn} {question}"})
            answer = await self._ask(number, messages)
            messages.append({"role": "assistant", "content": answer})
            if turn < load.turns - 1:
                await trio.sleep(drawn.expovariate(1 / load.think_s))

    async def _ask(self, number: int, messages: list[dict[str, str]]) -> str:
        began_at = trio.current_time()
        request = {
            "messages": messages,
            "max_tokens": self._load.answer_tokens,
            "timeout_ms": PATIENCE_MS,
            "priority": "medium",
        }
        whole = await self._client.complete(request)
        assert whole.usage is not None
        assert whole.worker is not None
        # A whole answer comes with its last token: what came before the first one is the rest.
        decoded_s = whole.worker["decode_ms"] / 1000
        self._first_token_s.append(trio.current_time() - began_at - decoded_s)
        self._prompt_tokens += whole.usage["prompt_tokens"]
        self._cached_tokens += whole.usage["prompt_tokens_details"]["cached_tokens"]
        self._asked[number].add(whole.worker["id"])
        return whole.text


async def measure(load: FleetLoad) -> FleetFigures:
    """Let the callers converse with such a fleet. To be run on a clock that jumps."""
    server = MemoryServer(random=random.Random(load.seed), delay_s=HOP_S)  # noqa: S311 - no secret
    stops_of: list[trio.MemorySendChannel[None]] = []
    async with (
        open_memory_broker(server, name="callers", subscription_limit=100_000) as broker,
        trio.open_nursery() as nursery,
    ):
        for number, speed in enumerate(load.speeds, 1):
            send, stops = trio.open_memory_channel[None](1)
            stops_of.append(send)
            await nursery.start(_run_worker, server, load, f"w{number}", speed, stops)
        settle_garbage_collection()
        figures = await Conversations(load, Client(broker, attempts=1_000)).hold()
        for send in stops_of:
            send.send_nowait(None)
    return figures


async def _run_worker(
    server: MemoryServer,
    load: FleetLoad,
    worker_id: str,
    speed: float,
    stops: trio.MemoryReceiveChannel[None],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    config = config_of(load, worker_id, speed)

    @asynccontextmanager
    async def open_broker() -> AsyncIterator[Broker]:
        async with open_memory_broker(server, name=worker_id) as broker:
            yield broker

    @asynccontextmanager
    async def open_engine() -> AsyncIterator[SimulatedEngine]:
        async with open_simulated_engine(
            config.worker.simulated,
            model_name=config.worker.model_name,
            context_length=CONTEXT,
            prefix_cache_tokens=load.cache_tokens,
            cache_bytes_per_token=1,
        ) as engine:
            yield engine

    await run_worker(
        config,
        World(
            stops=stops,
            open_broker=open_broker,
            open_engine=open_engine,
            probe=Plenty(),
            rng=random.Random(f"{load.seed}.{worker_id}"),  # noqa: S311 - no secret
            wall_clock=trio.current_time,
            on_ready=lambda _: task_status.started(),
        ),
    )


def config_of(load: FleetLoad, worker_id: str, speed: float) -> Config:
    """Of one of the workers."""
    values = {
        "fleet.hand_on": str(load.hand_on).lower(),
        "worker.id": worker_id,
        "worker.model": "simulated",
        "worker.continuous_batching.max_batch_size": load.slots,
        "worker.request_queue.max_depth": load.conversations,
        "worker.simulated.turn_ms": load.token_ms / speed,
        "worker.simulated.prefill_ms_per_token": 1000 / load.prefill_tokens_per_s / speed,
        "worker.simulated.vocabulary": 50_000,
        "worker.monitoring.port": "null",
    }
    return load_config(
        None,
        environ={},
        overrides=[f"{path}={value}" for path, value in values.items()],
        hostname="bench",
    )


def run_virtual(load: FleetLoad) -> FleetFigures:
    """Measure, in as much time as it takes to compute."""
    return trio.run(measure, load, clock=trio.testing.MockClock(autojump_threshold=0))


def main() -> None:
    set_up_logging(log_format="human", level="error")
    load = msgspec.json.decode(sys.stdin.readline(), type=FleetLoad)
    sys.stdout.write(msgspec.json.encode(run_virtual(load)).decode() + "\n")


if __name__ == "__main__":
    main()
