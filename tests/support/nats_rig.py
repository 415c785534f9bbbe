"""What tests of the NATS broker against real servers, and against what is none, have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from loguru import logger

from support.broker_conformance import PATIENCE_S, Inbox
from support.nats_fixtures import fresh_subject
from trio_worker.nats.broker import NatsBroker, open_nats_broker
from trio_worker.ports import Message

SECRET = "s3cret-horse"


@pytest.fixture(name="log")
def log_fixture() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lambda line: lines.append(str(line)), level=0, format="{level} {message}")
    yield lines
    logger.remove(number)


async def wait_until(condition: Callable[[], bool]) -> None:
    """For what the server does in its own time, and the port has no event for."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def works(broker: NatsBroker) -> bool:
    subject, inbox = fresh_subject(), Inbox()
    subscription = await broker.subscribe(subject, inbox)
    broker.publish(Message(subject=subject))
    await inbox.wait()
    await subscription.drain()
    return True


quick = partial(open_nats_broker, name="test", reconnect_wait_s=0.05)


@asynccontextmanager
async def fake_server(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
) -> AsyncIterator[str]:
    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await handler(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, serve, [listener]))
        yield f"127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()
