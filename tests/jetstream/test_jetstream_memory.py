"""The facts about JetStream on what stands in for it, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
from support.broker_conformance import System
from support.jetstream_conformance import FACTS, Ground, ground_of

from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.jetstream import MemoryJetStream


def memory_system() -> System:
    server = MemoryServer(random=random.Random(7))
    MemoryJetStream(server)
    return System(name="memory", open=lambda **more: open_memory_broker(server, **more))


@pytest.mark.parametrize("fact", FACTS, ids=lambda each: each.__name__)
async def test_fact(autojump_clock: object, fact: Callable[[Ground], Awaitable[None]]) -> None:
    async with ground_of(memory_system()) as ground:
        await fact(ground)
