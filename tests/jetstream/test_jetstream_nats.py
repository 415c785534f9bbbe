"""The facts about JetStream on a real nats-server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import pytest
from support.broker_conformance import nats_system
from support.jetstream_conformance import FACTS, Ground, ground_of
from support.nats_fixtures import NatsServer, running_server

pytestmark = pytest.mark.nats


@pytest.fixture(name="server")
def server_fixture() -> Iterator[NatsServer]:
    with running_server(jetstream=True) as server:
        yield server


@pytest.mark.parametrize("fact", FACTS, ids=lambda each: each.__name__)
async def test_fact(server: NatsServer, fact: Callable[[Ground], Awaitable[None]]) -> None:
    async with ground_of(nats_system(server.url)) as ground:
        await fact(ground)
