"""Callers of an HTTP server that runs on the other end of a stream, on any clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import h11
import trio
import trio.testing

from trio_worker.http.connection import serve_connection
from trio_worker.http.drain import Drain
from trio_worker.http.exchange import Endpoint, Exchange
from trio_worker.http.limits import Limits
from trio_worker.http.messages import Answer

LIMITS = Limits()
SECOND = 784111777
"""The second of RFC 9110's example of a date."""
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"

Pair: TypeAlias = tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]


@dataclass(frozen=True, kw_only=True)
class Heard:
    """An answer as a caller sees it."""

    status: int
    headers: dict[str, str]
    body: bytes


class Caller:
    """One end of a stream; its answers are read by h11, which does not forgive."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._received = b""

    async def send(self, *texts: str | bytes) -> None:
        for text in texts:
            data = text.encode() if isinstance(text, str) else text
            await self.stream.send_all(data.replace(b"\n", b"\r\n"))

    async def wait_for(self, part: bytes) -> bool:
        """Whether `part` comes before the other side closes; `hear` still has all of it."""
        while part not in self._received:
            data = await self.stream.receive_some(65536)
            if not data:
                return False
            self._received += data
        return True

    async def hear(self, method: str = "GET") -> Heard:
        """The next answer, to a request of this method; it has to be whole."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method=method, target="/", headers=[("Host", "w")]))
        connection.send(h11.EndOfMessage())
        if self._received:
            connection.receive_data(self._received)
        response, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await self.stream.receive_some(65536)))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
        self._received = connection.trailing_data[0]
        assert response is not None
        headers = {name.decode(): value.decode() for name, value in response.headers}
        return Heard(status=response.status_code, headers=headers, body=body)

    async def read_to_end(self) -> bytes:
        """Everything until the other side closes. Raises BrokenResourceError at a reset."""
        read = self._received
        self._received = b""
        async for data in self.stream:
            read += data
        return read

    async def is_closed(self) -> bool:
        """Whether the other side closes without another word."""
        return await self.read_to_end() == b""


@asynccontextmanager
async def calling(
    endpoint: Endpoint,
    limits: Limits = LIMITS,
    drain: Drain | None = None,
    pair: Pair | None = None,
) -> AsyncIterator[Caller]:
    """A connection that is being served; what serves it has to end when the caller has left."""
    ours, theirs = pair or trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(
                serve_connection,
                theirs,
                endpoint,
                limits=limits,
                drain=drain or Drain(),
                wall_clock=lambda: SECOND + 0.9,
            )
        )
        async with ours:
            yield Caller(ours)


async def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    return trio.SocketStream(ours), trio.SocketStream(theirs)


async def say_hello(_: Exchange) -> Answer:
    return Answer(headers={"Content-Type": "text/plain"}, body=b"hello")


async def echo(exchange: Exchange) -> Answer:
    """Answers with what it was asked."""
    body = await exchange.read_body()
    request = exchange.request
    head = f"{request.method} {request.path} {request.query} "
    return Answer(body=head.encode() + body)
