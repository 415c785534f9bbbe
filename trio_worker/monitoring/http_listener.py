"""The listener of the monitoring pages, and the bounds on who connects.

Nobody on the other end can disturb the worker: connections are few, each has a longest life,
and one that does not read what it asked for is cut. hypercorn alone would wait for ever, and
shielded from cancellation, for such a client to read; hence the streams and the accept loop of
our own around its protocol.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import trio
from loguru import logger

from trio_worker.errors import ConfigError
from trio_worker.monitoring.hypercorn_internals import Routes, speak_http

CONNECTIONS_MAX = 32
"""Another one is closed at once."""
CONNECTION_S = 60.0
"""A connection lives no longer; what polls opens the next one."""
SEND_S = 5.0
"""The longest that a client may leave an answer unread."""
CLOSING_S = 0.5
"""What a client that has closed its side still gets; hypercorn alone keeps it as if it idled."""


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address of `host`; on one alone if `port` is 0, which is any free port.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"cluster.worker.monitoring.host: {host!r} is not the name of an address"
        ) from error
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"{port} is taken on {host}",
            errno.EACCES: f"{port} needs rights that this process does not have",
        }
        # Trio wraps the errors of several addresses into one without a number.
        number = error.errno or getattr(error.__cause__, "errno", None)
        if number in reasons:
            raise ConfigError(
                f"cluster.worker.monitoring.port: {reasons[number]}; "
                "choose another one, 0 for any free one, or null for none"
            ) from error
        raise ConfigError(
            f"cluster.worker.monitoring.host: cannot listen on {host!r}: {error.strerror or error}"
        ) from error
    # A name with two addresses would get two different ports.
    if port == 0:
        for listener in listeners[1:]:
            listener.socket.close()
        del listeners[1:]
    return listeners


async def serve_routes(
    routes: Routes,
    listeners: list[trio.SocketListener],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `listeners` until cancelled. Started when connections are accepted.

    Cancelled: connections are cut where they are, and the listeners are closed.
    """
    connections: set[trio.SocketStream] = set()
    serve = partial(_serve_connection, speak_http(routes), connections)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, listeners)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Wakes the sends that hypercorn shields.
                for stream in connections:
                    stream.socket.close()
    finally:
        for listener in listeners:
            listener.socket.close()


class BoundedStream:
    """A socket stream whose sends end, and with which the task of its connection ends."""

    def __init__(self, stream: trio.SocketStream, connection: trio.CancelScope) -> None:
        self.socket = stream.socket
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose
        self._stream = stream
        self._connection = connection

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            # hypercorn alone would keep a connection that was reset as if it idled, too.
            self._connection.cancel(reason="the client has reset the connection")
            raise
        if not data:
            closed_at = trio.current_time() + CLOSING_S
            self._connection.deadline = min(self._connection.deadline, closed_at)
        return bytes(data)

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(SEND_S) as sending:
            await self._stream.send_all(data)
        if sending.cancelled_caught:
            self._connection.cancel(reason="the client does not read its answer")
            raise trio.BrokenResourceError("the client does not read its answer")


_Speak: TypeAlias = Callable[[BoundedStream], Awaitable[None]]


async def _serve_connection(
    speak: _Speak, connections: set[trio.SocketStream], stream: trio.SocketStream
) -> None:
    if len(connections) >= CONNECTIONS_MAX:
        await stream.aclose()
        return
    connections.add(stream)
    try:
        with trio.move_on_after(CONNECTION_S) as connection:
            await speak(BoundedStream(stream, connection))
    except Exception as error:  # noqa: BLE001 - whatever a client provokes ends its connection only
        logger.opt(exception=error).warning("a monitoring connection failed")
    finally:
        connections.discard(stream)
        stream.socket.close()
