"""`python -m sim.soak hours=24`: hours of load with mild faults; what is held must stay flat."""

# ruff: noqa: T201 - a command

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil
import trio

from trio_worker.config import load_config
from trio_worker.core.memory import MemoryReading
from trio_worker.ports import Broker, Engine, Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.simulated.engine import Faults, open_simulated_engine
from trio_worker.worker import World, run_worker

from .harness import run_deterministic
from .plan import WORDS

MB = 2**20
SAMPLES = 24
WARM_UP = 4
"""Samples before anything has to be flat."""

FAULTS = Faults(
    slow_turn=1e-4,
    crash=2e-5,
    hang=2e-6,
    fail_sequence=1e-4,
    out_of_memory=2e-6,
    slow_tokenise=1e-3,
)
OPTIONS = (
    "worker.id=w1",
    "worker.requests.default_timeout_ms=20000",
    "worker.request_queue.max_depth=50",
    "worker.monitoring.report_interval_ms=10000",
)


@dataclass
class Ledger:
    """Who waits for an answer, and what became of the others."""

    waiting: dict[str, float] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    strays: int = 0
    """Messages that nobody waits for: a second terminal message, or one after it."""

    def take(self, message: Message) -> None:
        terminal = message.headers.get("Terminal")
        if message.headers.get("Status") == "503":
            self.outcomes["no worker"] += self.waiting.pop(message.subject, None) is not None
        elif message.subject not in self.waiting:
            self.strays += 1
        elif terminal is not None:
            del self.waiting[message.subject]
            self.outcomes[message.headers.get("Nats-Service-Error", "ok").partition(":")[0]] += 1


@dataclass(frozen=True)
class Sample:
    at_s: float
    objects: int
    rss: int
    waiting: int
    tasks: int


class Swinging:
    """Memory that is over the soft limit for a minute in each hour."""

    def read(self, _engine_pid: int | None) -> MemoryReading:
        used = 8500 if trio.current_time() % 3600 < 60 else 500
        return MemoryReading(used=used * MB, available=8000 * MB, total=16_000 * MB)


def soak(*, hours: float, rate: float, seed: int) -> tuple[Ledger, list[Sample]]:
    ledger = Ledger()
    samples: list[Sample] = []

    async def main() -> None:
        server = MemoryServer(random=random.Random(seed))
        stops_send, stops = trio.open_memory_channel[None](2)
        ready = trio.Event()
        opened: dict[str, MemoryBroker] = {}
        config = load_config(None, environ={}, overrides=list(OPTIONS), hostname="host")

        @asynccontextmanager
        async def open_broker() -> AsyncIterator[Broker]:
            async with open_memory_broker(server, name="worker") as broker:
                opened["worker"] = broker
                yield broker

        @asynccontextmanager
        async def open_engine() -> AsyncIterator[Engine]:
            async with open_simulated_engine(
                config.worker.simulated,
                model_name=config.worker.model_name,
                faults=FAULTS,
                random=random.Random(seed),
                turn_timeout_s=5.0,
                prefix_cache_tokens=2048,
            ) as engine:
                yield engine

        async def run() -> None:
            world = World(
                stops=stops,
                open_broker=open_broker,
                open_engine=open_engine,
                probe=Swinging(),
                rng=random.Random(seed),
                wall_clock=lambda: 1_700_000_000.0,
                on_ready=lambda _: ready.set(),
            )
            await run_worker(config, world)

        async with open_memory_broker(server, name="caller") as caller:
            await caller.subscribe("_INBOX.soak.*", ledger.take)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await ready.wait()
                async with trio.open_nursery() as world:
                    world.start_soon(_sample, hours, ledger, samples)
                    world.start_soon(_trouble, hours, opened["worker"])
                    await _load(hours, rate, caller, ledger, random.Random(seed))
                await trio.sleep(60)
                stops_send.send_nowait(None)

    run_deterministic(main, seed=seed)
    return ledger, samples


async def _load(
    hours: float, rate: float, caller: MemoryBroker, ledger: Ledger, rng: random.Random
) -> None:
    number = 0
    while trio.current_time() < hours * 3600:
        await trio.sleep(rng.expovariate(rate))
        number += 1
        inbox = f"_INBOX.soak.{number}"
        fields: dict[str, object] = {
            "request_id": f"s{number}",
            "prompt": " ".join(rng.choices(WORDS, k=rng.choice((2, 8, 30)))),
            "max_tokens": rng.choice((1, 3, 10)),
            "priority": rng.randrange(3),
            "stream": rng.random() < 0.2,
        }
        if rng.random() < 0.02:
            fields["timeout_ms"] = 50
        ledger.waiting[inbox] = trio.current_time()
        caller.publish(
            Message(subject="inference.w1", body=json.dumps(fields).encode(), reply=inbox)
        )
        if rng.random() < 0.02:
            body = json.dumps({"request_id": f"s{number - 1}"}).encode()
            caller.publish(Message(subject="inference.cancel", body=body))


async def _trouble(hours: float, broker: MemoryBroker) -> None:
    while trio.current_time() < hours * 3600 - 700:
        await trio.sleep(600)
        broker.disconnect()
        await trio.sleep(1)
        broker.reconnect()


async def _sample(hours: float, ledger: Ledger, samples: list[Sample]) -> None:
    process = psutil.Process()
    for index in range(1, SAMPLES + 1):
        await trio.sleep_until(hours * 3600 * index / SAMPLES)
        gc.collect()
        samples.append(
            Sample(
                at_s=trio.current_time(),
                objects=len(gc.get_objects()),
                rss=process.memory_info().rss,
                waiting=len(ledger.waiting),
                tasks=trio.lowlevel.current_statistics().tasks_living,
            )
        )


def main(arguments: list[str]) -> int:
    options = dict(each.split("=", 1) for each in arguments)
    hours, rate = float(options.get("hours", "24")), float(options.get("rate", "5"))
    began = time.monotonic()
    ledger, samples = soak(hours=hours, rate=rate, seed=int(options.get("seed", "0")))
    print("virtual h   objects   RSS MB  waiting  tasks")
    for each in samples:
        print(
            f"{each.at_s / 3600:9.2f} {each.objects:9d} {each.rss / MB:8.1f} "
            f"{each.waiting:8d} {each.tasks:6d}"
        )
    print(f"{sum(ledger.outcomes.values())} requests: {dict(ledger.outcomes)}")
    print(f"lost: {len(ledger.waiting)}, strays: {ledger.strays}")
    print(f"{hours:g} virtual hours in {time.monotonic() - began:.0f} s")
    warm, last = samples[WARM_UP - 1], samples[-1]
    is_flat = last.objects < 1.02 * warm.objects and last.rss < warm.rss + 8 * MB
    # What was under way to the worker when its line broke is lost: core NATS is at most once.
    is_complete = len(ledger.waiting) <= 0.001 * sum(ledger.outcomes.values())
    print("flat" if is_flat else "NOT FLAT", "complete" if is_complete else "INCOMPLETE")
    return 0 if is_flat and is_complete and not ledger.strays else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
