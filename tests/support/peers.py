"""Whoever a client talks to in a test: a worker that acts as scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import nats
import trio
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg

from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from trio_worker import client_asyncio
from trio_worker.errors import BY_CODE

Reply = tuple[bytes, dict[str, str]]


async def in_asyncio(work: Callable[[], Awaitable[None]], *, within_s: float = 20) -> None:
    """Run asyncio code in a thread of its own, as a program without Trio does."""

    async def bounded() -> None:
        async with asyncio.timeout(within_s):
            await work()

    def run() -> None:
        # `asyncio.run` would get a loop of trio-asyncio's, whose policy it asks.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(bounded())

    await trio.to_thread.run_sync(run)


class ScriptedPeer:
    """`ScriptedWorker` on a real server."""

    def __init__(self, connection: Connection, subject: str, scripts: list[list[Reply]]) -> None:
        self._connection = connection
        self._subject = subject
        self._scripts = iter(scripts)
        self.requests: list[Any] = []
        self.cancels: asyncio.Queue[Msg] = asyncio.Queue()

    async def take(self, message: Msg) -> None:
        self.requests.append(json.loads(message.data))
        for body, headers in next(self._scripts, []):
            await self._connection.publish(
                message.reply, body, reply=f"{self._subject}.ctl.r", headers=headers
            )

    async def listen(self) -> None:
        await self._connection.subscribe(self._subject, cb=self.take)
        await self._connection.subscribe(f"{self._subject}.ctl.*", cb=self.cancels.put)
        await self._connection.flush()


@asynccontextmanager
async def scripted_peer(
    url: str, name: str, *scripts: list[Reply], listening: bool = True
) -> AsyncIterator[tuple[ScriptedPeer, client_asyncio.Client]]:
    """A worker of the id `name`, which no other test uses."""
    async with await nats.connect(url) as connection:
        peer = ScriptedPeer(connection, f"inference.{name}", list(scripts))
        if listening:
            await peer.listen()
        async with client_asyncio.open_client(url, timeout_ms=5000) as client:
            yield peer, client


CONTROL = "inference.w1.ctl.r"


def chunk(sequence: int, text: str = "", *, terminal: bool = False) -> Reply:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    headers = {"Sequence": str(sequence), "Worker-Id": "w1"}
    if terminal:
        headers["Terminal"] = "done"
    return json.dumps({"choices": [choice]}).encode(), headers


def refusal(code: str, *, retry_after_ms: int | None = 1000, sequence: int = 0) -> Reply:
    error = {
        "code": code,
        "message": "no",
        "retryable": BY_CODE[code].retryable,
        "retry_after_ms": retry_after_ms,
        "details": {"depth": 3},
    }
    return (
        json.dumps({"error": error}).encode(),
        {"Sequence": str(sequence), "Terminal": "error"},
    )
