"""The monitoring pages on the mock clock.

The server runs unchanged on a Unix socket, which the kernel serves at once, so that the clock may
jump whenever every task waits.
"""

from __future__ import annotations

import json
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import trio

from support.observed import fake_exposition
from trio_worker.monitoring import http_server
from trio_worker.monitoring.http_server import serve_http

Connect: TypeAlias = Callable[[], Awaitable[trio.SocketStream]]


@asynccontextmanager
async def serving(observed: Any, exposition: Any = fake_exposition) -> AsyncIterator[Connect]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "s")
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await listening.bind(path)
        listening.listen(100)

        async def listen(*_: Any, section: str) -> list[trio.SocketListener]:
            return [trio.SocketListener(listening)]

        with mock.patch.object(http_server, "open_listeners", listen):
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    partial(
                        serve_http, host="here", port=0, observed=observed, exposition=exposition
                    )
                )
                yield partial(trio.open_unix_socket, path)
                nursery.cancel_scope.cancel()


def request(path: str, method: str = "GET", *, close: bool = False, accept: str = "*/*") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: worker\r\nAccept: {accept}\r\n"
    return f"{head}Connection: {'close' if close else 'keep-alive'}\r\n\r\n".encode()


async def get(connect: Connect, path: str, method: str = "GET", accept: str = "*/*") -> Any:
    """Status, headers and body of an answer on a connection of its own."""
    async with await connect() as stream:
        await stream.send_all(request(path, method, close=True, accept=accept))
        answer = b"".join([chunk async for chunk in stream])
    head, _, body = answer.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


async def until_cut(stream: trio.SocketStream) -> float:
    """The time at which the other side closes."""
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(2**20):
            pass
    return trio.current_time()


async def open_stream(connect: Connect) -> trio.SocketStream:
    stream = await connect()
    await stream.send_all(request("/events"))
    return stream


async def read_events(stream: trio.SocketStream) -> list[tuple[str, Any]]:
    """Names and contents of what has come by now."""
    text = ""
    while True:
        with trio.move_on_after(1e-6) as scope:
            text += (await stream.receive_some(2**20)).decode()
        if scope.cancelled_caught:
            break
    text = re.sub(r"\r\n[0-9a-f]+\r\n", "", text.replace("\r\n\r\n", "\r\n\r\n\r\n"))
    return [
        (name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    ]


async def until_said(stream: trio.SocketStream) -> None:
    """Read what has come by now."""
    with trio.move_on_after(1e-6):
        while True:
            await stream.receive_some(2**20)
