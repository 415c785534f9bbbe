"""Callers that come, go, leave early and fail at a gateway, for minutes; then nothing has grown.

    python -m chaos.gateway seconds=600 seed=7

Real processes: nats-server, and a worker whose engine is simulated. The gateway and its callers are
in this process, so what either of them held would show. Between rounds all callers rest, and what
is held is counted.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import gc
import json
import random
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import trio
from loguru import logger
from support.commands import RunningCommand, running_command, until
from support.gateway_loopback import Door, EventTimes, leave_with_a_reset, open_door, request
from support.gateway_rig import events, say, send
from support.nats_fixtures import running_server

from trio_worker.nats.broker import NatsBroker, open_nats_broker

MB = 2**20
CALLERS = 24
ROUNDS = 12
WARM_UP = 3
"""Rounds before anything has to be flat."""
REST_S = 15.0
GROWTH_OBJECTS = 0.02
GROWTH_MB = 8.0
SETTINGS = (
    "nats.embedded=never",
    "worker.simulated.turn_ms=10",
    "worker.continuous_batching.max_batch_size=32",
    "worker.request_queue.max_depth=16",
)
MAY_HEAR = {"200", "429", "503", "504", "broken"}
"""What a caller may hear that asks nothing wrong, but for little time at times."""

Call: TypeAlias = Callable[[Door, random.Random], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is held while all callers rest."""

    at_s: float
    objects: int
    rss_mb: float
    descriptors: int
    tasks: int
    subscriptions: int
    inboxes: int
    worker_rss_mb: float
    worker_descriptors: int

    def line(self) -> str:
        return (
            f"{self.at_s:6.0f} {self.objects:9d} {self.rss_mb:8.1f} {self.descriptors:6d} "
            f"{self.tasks:6d} {self.subscriptions:5d} {self.inboxes:7d} "
            f"{self.worker_rss_mb:10.1f} {self.worker_descriptors:9d}"
        )


HEADING = "     s   objects   RSS MB    fds  tasks  subs inboxes  worker MB worker fds"


def growth(samples: list[Sample]) -> list[str]:
    """What has grown since everything was warm."""
    warm, last = samples[WARM_UP - 1], samples[-1]
    grown: list[str] = []
    if last.objects > (1 + GROWTH_OBJECTS) * warm.objects:
        grown.append(f"objects: {warm.objects} → {last.objects}")
    for name in ("rss_mb", "worker_rss_mb"):
        before, after = getattr(warm, name), getattr(last, name)
        if after > before + GROWTH_MB:
            grown.append(f"{name}: {before:.1f} → {after:.1f}")
    for name in ("descriptors", "tasks", "subscriptions", "inboxes", "worker_descriptors"):
        before, after = getattr(warm, name), getattr(last, name)
        if after > before:
            grown.append(f"{name}: {before} → {after}")
    return grown


# --- callers ----------------------------------------------------------------------------------


def _question(rng: random.Random, **fields: Any) -> dict[str, Any]:
    words = " ".join(rng.choices(("abc", "defg", "h"), k=rng.randrange(1, 40)))
    return say(words, **{"max_tokens": rng.choice((1, 5, 40, 200)), "timeout_ms": 20_000, **fields})


async def ask_whole(door: Door, rng: random.Random) -> str:
    heard = await door.ask(_question(rng))
    if heard.status == 200:
        assert json.loads(heard.body)["choices"][0]["finish_reason"]
    return str(heard.status)


async def ask_stream(door: Door, rng: random.Random) -> str:
    heard = await door.ask(_question(rng, stream=True, stream_options={"include_usage": True}))
    if heard.status != 200:
        return str(heard.status)
    return "200" if events(heard.body)[-1] == "[DONE]" else "broken"


async def ask_for_too_short_a_time(door: Door, rng: random.Random) -> str:
    heard = await door.ask(_question(rng, max_tokens=200, timeout_ms=rng.choice((1, 50, 300))))
    return str(heard.status)


async def ask_wrongly(door: Door, rng: random.Random) -> str:
    body = rng.choice(({"messages": 1}, say("hi", model="other"), say("hi", tools=[{"type": "x"}])))
    heard = await door.ask(body)
    assert heard.status in (400, 404)
    return "refused"


async def leave_early(door: Door, rng: random.Random) -> str:
    caller = await door.connect()
    await send(caller, _question(rng, max_tokens=500, stream=rng.random() < 0.5))
    with trio.move_on_after(rng.random() * 0.5):
        await caller.stream.receive_some(1)
        await trio.sleep_forever()
    if rng.random() < 0.5:
        leave_with_a_reset(caller)
    else:
        await caller.stream.aclose()
    return "left"


async def break_off(door: Door, rng: random.Random) -> str:
    """In the middle of a request, or with what is none."""
    whole = request(_question(rng))
    caller = await door.connect()
    async with caller.stream:
        with suppress(trio.BrokenResourceError):
            await caller.stream.send_all(whole[: rng.randrange(len(whole))])
            if rng.random() < 0.3:
                await caller.stream.send_all(rng.randbytes(100))
    return "broken off"


async def listen_for_a_while(door: Door, rng: random.Random) -> str:
    times = EventTimes()
    with trio.move_on_after(rng.random() * 3):
        await times.take(door, _question(rng, max_tokens=200, stream=True))
    return "listened"


CALLS: tuple[Call, ...] = (
    *(ask_whole, ask_stream, ask_stream, ask_for_too_short_a_time, ask_wrongly),
    *(leave_early, leave_early, break_off, listen_for_a_while),
)


# --- the run ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Soak:
    """A gateway, what is behind it, and what its callers have heard."""

    door: Door
    broker: NatsBroker
    worker: RunningCommand
    rng: random.Random
    heard: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        began_at = trio.current_time()
        for _ in range(ROUNDS):
            until_s = trio.current_time() + seconds / ROUNDS
            async with trio.open_nursery() as nursery:
                for _ in range(CALLERS):
                    own = random.Random(self.rng.random())
                    nursery.start_soon(self._keep_calling, own, until_s)
            await self._rest()
            self.samples.append(self._sample(trio.current_time() - began_at))

    async def _keep_calling(self, rng: random.Random, until_s: float) -> None:
        while trio.current_time() < until_s:
            call = rng.choice(CALLS)
            heard = await call(self.door, rng)
            self.heard[heard] += 1
            if heard in ("429", "503"):
                await trio.sleep(0.1)

    async def _rest(self) -> None:
        async def is_at_rest() -> bool:
            stats = await self.worker.stats()
            return self.door.is_at_rest and not stats["requests"]["in_flight"]

        await until(is_at_rest, within_s=REST_S)
        await trio.sleep(0.2)

    def _sample(self, at_s: float) -> Sample:
        # What somebody else in this process has frozen is not counted, and what is left jumps.
        gc.unfreeze()
        gc.collect()
        process, worker = psutil.Process(), psutil.Process(self.worker.process.pid)
        return Sample(
            at_s=at_s,
            objects=len(gc.get_objects()),
            rss_mb=process.memory_info().rss / MB,
            descriptors=process.num_fds(),
            tasks=trio.lowlevel.current_statistics().tasks_living,
            subscriptions=len(self.broker.connection.client._subs),
            inboxes=len(self.door.api.forward._inboxes._open),
            worker_rss_mb=worker.memory_info().rss / MB,
            worker_descriptors=worker.num_fds(),
        )

    def summary(self) -> str:
        lines = [HEADING, *(each.line() for each in self.samples)]
        told = dict(sorted(self.heard.items()))
        return "\n".join([*lines, f"{sum(self.heard.values())} calls: {told}"])


async def run_soak(folder: Path, *, seconds: float, seed: int) -> str:
    """One run; returns what there is to tell. Raises `AssertionError` with what has grown."""
    settings = [part for each in SETTINGS for part in ("--set", each)]
    with running_server() as server:
        async with running_command(
            folder, "--engine", "simulated", *settings, url=server.url
        ) as worker:
            await worker.wait_ready()
            async with (
                open_nats_broker(server.url, name="gateway") as broker,
                open_door(broker) as door,
            ):
                await trio.sleep(0.5)
                soak = Soak(door, broker, worker, random.Random(seed))
                await soak.run(seconds)
                summary, grown = soak.summary(), growth(soak.samples)
                assert not grown, "\n".join([summary, *grown])
                stray = set(soak.heard) - MAY_HEAR - {"refused", "left", "broken off", "listened"}
                assert not stray, f"{summary}\nheard for no reason: {stray}"
    return summary


def main(arguments: list[str]) -> int:
    logger.remove()
    options = dict(each.split("=", 1) for each in arguments)
    seconds = float(options.get("seconds", 600))
    seed = int(options["seed"]) if "seed" in options else secrets.randbelow(10_000)
    print(f"python -m chaos.gateway seconds={seconds:g} seed={seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            print(trio.run(partial(run_soak, Path(folder), seconds=seconds, seed=seed)))
        except AssertionError as exc:
            print(f"FAILED  {exc}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
