"""The listeners of a server, and how many connect to them."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus

import trio
from loguru import logger

from trio_worker.http.connection import serve_connection
from trio_worker.http.drain import Drain
from trio_worker.http.exchange import Endpoint
from trio_worker.http.limits import Limits
from trio_worker.http.messages import refusal

ACCEPT_RETRY_S = 0.1
"""Nothing tells when a process that has no file descriptor left has one again."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""Seconds of silence before the system asks whether a caller is still there (Linux's name and
macOS's), seconds between asking again, and how often."""
PLACE_S = 1.0
"""How long a new caller waits for the place of an idle one, which leaves at its next step."""
READ_BYTES = 64 * 1024


def _no_place() -> bytes:
    answer = refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are open")
    lines = [
        "HTTP/1.1 503 Service Unavailable",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
        f"Content-Length: {len(answer.body)}",
        "Retry-After: 1",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + answer.body


NO_PLACE = _no_place()


async def serve(
    endpoint: Endpoint,
    listeners: list[trio.SocketListener],
    *,
    limits: Limits,
    drain: Drain,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `listeners`; started when connections are accepted.

    Returns after `drain` has begun, when the last answer has been sent, or after `drain_s`, when
    those that are still under way are reset. Cancelled: the same at once. The listeners are closed
    in any case.
    """
    places = trio.CapacityLimiter(limits.connections)

    async def serve_stream(stream: trio.SocketStream) -> None:
        try:
            await serve_connection(stream, endpoint, limits=limits, drain=drain)
        finally:
            places.release_on_behalf_of(stream)

    try:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(
                        _accept, listener, places, drain, connections, serve_stream
                    )
                task_status.started()
                await drain.wait_begun()
                accepting.cancel_scope.cancel(reason="the server ends")
            _close(listeners)
            connections.cancel_scope.deadline = trio.current_time() + limits.drain_s
    finally:
        _close(listeners)


async def _accept(
    listener: trio.SocketListener,
    places: trio.CapacityLimiter,
    drain: Drain,
    connections: trio.Nursery,
    serve_stream: Callable[[trio.SocketStream], Awaitable[None]],
) -> None:
    """Have whoever connects served, as long as there are places."""
    is_short = False
    while True:
        try:
            stream = await listener.accept()
        except OSError as error:
            if not is_short:
                logger.error("connections cannot be accepted for now: {}", error.strerror)
            is_short = True
            await trio.sleep(ACCEPT_RETRY_S)
            continue
        is_short = False
        try:
            has_place = await _find_place(stream, places, drain)
        except trio.Cancelled:
            stream.socket.close()
            raise
        if has_place:
            _keep_alive(stream)
            connections.start_soon(serve_stream, stream)
        else:
            _turn_away(stream)


async def _find_place(
    stream: trio.SocketStream, places: trio.CapacityLimiter, drain: Drain
) -> bool:
    """Take a place for a connection, if need be that of one that has nothing to do; false: none."""
    with suppress(trio.WouldBlock):
        places.acquire_on_behalf_of_nowait(stream)
        return True
    if not drain.end_longest_idle():
        return False
    # It may have been asked something at this very moment, and then does not leave.
    with trio.move_on_after(PLACE_S):
        await places.acquire_on_behalf_of(stream)
        return True
    return False


def _turn_away(stream: trio.SocketStream) -> None:
    """Say that there is no place, as far as that needs no waiting, and close."""
    number = stream.socket.fileno()
    with suppress(OSError):
        # What has come is read, since closing on it would be a reset.
        with suppress(BlockingIOError):
            os.read(number, READ_BYTES)
        os.write(number, NO_PLACE)
    stream.socket.close()


def _keep_alive(stream: trio.SocketStream) -> None:
    """Have the system find out that a caller has vanished without a word."""
    # A Unix socket has none of these, and no system has all.
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, value=True)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _close(listeners: list[trio.SocketListener]) -> None:
    for listener in listeners:
        listener.socket.close()
