"""The monitoring pages over a real loopback connection."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import trio

from support.observed import FakeWorker, fake_exposition
from trio_worker.monitoring.http_server import serve_http


@contextlib.asynccontextmanager
async def serving(worker: FakeWorker) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(5):
            port = await nursery.start(
                lambda task_status: serve_http(
                    host="127.0.0.1",
                    port=0,
                    observed=worker,
                    exposition=fake_exposition,
                    task_status=task_status,
                )
            )
        yield port
        nursery.cancel_scope.cancel()


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    head, body = await ask(port, path, method)
    return int(head.split()[1]), body


async def ask(port: int, path: str, method: str = "GET", accept: str = "*/*") -> tuple[str, str]:
    """The head and the body of an answer."""
    with trio.fail_after(5):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request(method, path, accept))
            answer = b"".join([chunk async for chunk in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode().lower(), body.decode()


def request(method: str, path: str, accept: str) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: worker\r\nAccept: {accept}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode()


async def get_when_free(port: int, path: str) -> int:
    """Ask until a connection is not refused any more."""
    with trio.fail_after(5):
        while True:
            with contextlib.suppress(IndexError, trio.BrokenResourceError):
                head, body = await ask(port, path)
                if "too many connections" not in body:
                    return int(head.split()[1])


async def read_events(stream: trio.SocketStream, count: int) -> list[tuple[str, Any]]:
    """Names and contents of the next events of a response that is being streamed."""
    text = ""
    with trio.fail_after(5):
        while text.count("\n\n") < count:
            text += (await stream.receive_some(65536)).decode().replace("\r\n", "")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    return [(name, json.loads(data)) for name, data in events]


async def status_of_a_stream(port: int) -> int:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request("GET", "/events", "*/*"))
        return int((await stream.receive_some(100)).split()[1])
