"""A whole gateway on a port of loopback, and callers on real sockets, good ones and bad ones."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import trio

from support.gateway_rig import CHAT, send
from support.http_calls import Caller, Heard
from trio_worker.config import GatewayConfig
from trio_worker.gateway.endpoints import Api
from trio_worker.gateway.serve import open_api
from trio_worker.http.drain import Drain
from trio_worker.http.limits import Limits
from trio_worker.http.listening import open_listeners
from trio_worker.http.server import serve
from trio_worker.ports import Broker


@dataclass(frozen=True, slots=True)
class Door:
    """A gateway that listens."""

    api: Api
    port: int

    async def connect(self) -> Caller:
        return Caller(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def ask(self, body: object, path: str = CHAT) -> Heard:
        """The whole answer. Raises `BrokenResourceError` if the connection is cut."""
        caller = await self.connect()
        async with caller.stream:
            await send(caller, body, path)
            return await caller.hear("POST")

    @property
    def is_at_rest(self) -> bool:
        return not self.api.counts.running and not self.api.forward._inboxes._open


@asynccontextmanager
async def open_door(
    broker: Broker, *, limits: Mapping[str, Any] | None = None, **config: Any
) -> AsyncIterator[Door]:
    """As `serve_gateway` has it, with a look inside; drained at the end."""
    settings = msgspec.structs.replace(GatewayConfig(), **config)
    listeners = await open_listeners("127.0.0.1", 0, section="gateway")
    allowed = Limits(
        connections=settings.max_connections,
        body_bytes=settings.max_body_bytes,
        drain_s=5,
    )
    drain = Drain()
    async with open_api(broker, settings) as api, trio.open_nursery() as nursery:
        await nursery.start(
            partial(serve, api, listeners, limits=replace(allowed, **(limits or {})), drain=drain)
        )
        yield Door(api, listeners[0].socket.getsockname()[1])
        drain.begin()


def leave_with_a_reset(caller: Caller) -> None:
    """As a process does that is killed with unread bytes."""
    stream = caller.stream
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


class EventTimes:
    """Reads a stream of events to its end, and notes when they came."""

    def __init__(self) -> None:
        self.read = b""
        self.times: list[float] = []

    async def take(self, door: Door, body: object) -> None:
        """Raises `BrokenResourceError` if the connection is cut."""
        caller = await door.connect()
        async with caller.stream:
            await send(caller, body, headers={"Connection": "close"})
            async for data in caller.stream:
                self.read += data
                self.times.append(trio.current_time())

    @property
    def is_whole(self) -> bool:
        return b"data: [DONE]\n\n" in self.read and self.read.endswith(b"0\r\n\r\n")

    def largest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def request(body: object, *lines: str) -> bytes:
    """The bytes of a request for a chat; `lines` are further headers."""
    data = json.dumps(body).encode()
    head = [
        f"POST {CHAT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *lines,
    ]
    return "\r\n".join([*head, "", ""]).encode() + data
