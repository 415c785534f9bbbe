"""Several whole workers in one virtual world, and callers who ask whichever of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from support.factories import make_beat
from support.worker_rig import Reply, Rig, running_worker
from trio_worker.client import Client
from trio_worker.errors import WorkerError
from trio_worker.ports import Message, Subscription
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.wire import beats, subjects

MODEL = "smollm2-135m-instruct"
SETTLED_S = 1.5
"""After that all have heard of each other."""


@dataclass
class Fleet:
    server: MemoryServer
    workers: dict[str, Rig]
    caller: MemoryBroker
    replies: list[Reply] = field(default_factory=list)
    """Of all who have asked by `ask_many`, in the order in which they ended."""

    @property
    def client(self) -> Client:
        """One that does not ask again: what it hears is what the fleet says."""
        return Client(self.caller, timeout_ms=None, attempts=1)

    def __getitem__(self, worker_id: str) -> Rig:
        return self.workers[worker_id]

    async def ask(self, **fields: Any) -> Reply:
        """Ask the group and collect the whole answer, or the error."""
        reply = Reply()
        try:
            async with self.client.ask(fields) as answer:
                async for chunk in answer:
                    reply.chunks.append(chunk)
                    reply.times.append(trio.current_time())
        except WorkerError as error:
            reply.error = error
            reply.times.append(trio.current_time())
        self.replies.append(reply)
        return reply

    async def ask_many(self, count: int, *, gap_s: float = 0.0, **fields: Any) -> list[Reply]:
        """So many at once, or one after the other; returns when the last has ended."""
        before = len(self.replies)
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(partial(self.ask, **fields))
                if gap_s:
                    await trio.sleep(gap_s)
        return self.replies[before:]

    def counted(self, name: str) -> Counter[str]:
        """The counter of this name of every worker, by worker."""
        return Counter(
            {
                worker_id: getattr(rig.observed.parts.counters.metrics, name).total()
                for worker_id, rig in self.workers.items()
            }
        )

    def handed_on(self) -> Counter[str]:
        """By reason, of all workers."""
        found: Counter[str] = Counter()
        for rig in self.workers.values():
            for (reason,), count in rig.observed.parts.counters.metrics.handed_on.values.items():
                found[reason] += count
        return +found


def served_by(replies: Sequence[Reply]) -> Counter[str]:
    return Counter(reply.worker["id"] for reply in replies if reply.error is None)


def codes(replies: Sequence[Reply]) -> Counter[str]:
    return Counter(reply.code for reply in replies)


@asynccontextmanager
async def running_fleet(
    *overrides: str,
    ids: Sequence[str] = ("w1", "w2", "w3"),
    apart: Mapping[str, Sequence[str]] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    delay_s: float = 0.0002,
) -> AsyncIterator[Fleet]:
    """A fleet whose workers have heard of each other; `apart` has what holds of one of them."""
    server = MemoryServer(random=random.Random(seed), delay_s=delay_s)
    async with AsyncExitStack() as stack:
        caller = await stack.enter_async_context(open_memory_broker(server, name="callers"))
        workers = {}
        for number, worker_id in enumerate(ids):
            workers[worker_id] = await stack.enter_async_context(
                running_worker(
                    *overrides,
                    *(apart or {}).get(worker_id, ()),
                    server=server,
                    worker_id=worker_id,
                    rng=random.Random(100 * seed + number),
                    **(options or {}),
                )
            )
        await trio.sleep(SETTLED_S)
        yield Fleet(server, workers, caller)


@dataclass
class Peer:
    """Another worker as a worker knows it: beats, and what is passed on to it."""

    broker: MemoryBroker
    id: str
    received: list[Message] = field(default_factory=list)
    subscription: Subscription | None = None

    def beat(self, **changes: Any) -> None:
        beat = make_beat(self.id, **{"model": MODEL, **changes})
        self.broker.publish(Message(subject=subjects.beat(self.id), body=beats.encode(beat)))

    async def listen(self) -> None:
        self.subscription = await self.broker.subscribe(
            subjects.direct(self.id), self.received.append
        )


@asynccontextmanager
async def peer_of(
    rig: Rig, worker_id: str = "w2", *, listens: bool = True, **changes: Any
) -> AsyncIterator[Peer]:
    """A peer that has said once how it is; one that does not listen is as good as dead."""
    async with open_memory_broker(rig.server, name=f"peer-{worker_id}") as broker:
        peer = Peer(broker, worker_id)
        if listens:
            await peer.listen()
        peer.beat(**changes)
        await trio.sleep(0.01)
        yield peer
