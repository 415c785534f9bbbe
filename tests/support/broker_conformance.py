"""What every broker is asked in tests: a sink to look into, and the two systems to ask."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import trio

from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Broker, Message
from trio_worker.simulated.broker import MemoryServer, open_memory_broker

PATIENCE_S = 5.0
"""Long enough for a loaded machine; what takes longer is missing."""


class Inbox:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._arrived = trio.Event()

    def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self._arrived.set()

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.messages]

    async def wait(self, count: int = 1) -> list[Message]:
        with trio.fail_after(PATIENCE_S):
            while len(self.messages) < count:
                self._arrived = trio.Event()
                await self._arrived.wait()
        return self.messages


@dataclass(frozen=True, kw_only=True)
class System:
    """A message system: opens any number of connections to itself."""

    name: str
    open: Callable[..., AbstractAsyncContextManager[Broker]]


def memory_system(**options: Any) -> System:
    server = MemoryServer(random=random.Random(7), **options)
    return System(name="memory", open=lambda **more: open_memory_broker(server, **more))


def nats_system(url: str) -> System:
    return System(
        name="nats", open=lambda **options: open_nats_broker(url, **({"name": "test"} | options))
    )
