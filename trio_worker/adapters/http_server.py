"""The monitoring pages over HTTP: starlette answers, hypercorn speaks the protocol.

Nobody on the other end can disturb the worker: connections are few, each has a longest life,
and one that does not read what it asked for is cut. hypercorn alone would wait for ever, and
shielded from cancellation, for such a client to read; hence the streams and the accept loop of
our own around its protocol.
"""

from __future__ import annotations

import errno
import socket
from functools import partial
from typing import Any

import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from loguru import logger
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from trio_worker.errors import ConfigError
from trio_worker.ports import Health, Observed

CONNECTIONS_MAX = 32
"""Another one is closed at once."""
CONNECTION_S = 60.0
"""A connection lives no longer; what polls opens the next one."""
SEND_S = 5.0
"""The longest that a client may leave an answer unread."""
CLOSING_S = 0.5
"""What a client that has closed its side still gets; hypercorn alone keeps it as if it idled."""
READ_S = 10
"""The longest that a client may be silent in the middle of a request."""

ENDPOINTS = {
    "/livez": "200 while the loops make progress",
    "/readyz": "200 only while requests are accepted; the reason otherwise",
    "/healthz": "both as JSON",
    "/stats": "the statistics snapshot",
}


async def serve_http(
    *,
    host: str,
    port: int,
    observed: Observed,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `host` and `port` until cancelled; 0 is any free port.

    Reports the bound port as its start. Cancelled: connections are cut where they are.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    listeners = await _listen(host, port)
    connections: set[trio.SocketStream] = set()
    serve = partial(
        _serve_connection,
        ASGIWrapper(_application(observed)),  # type: ignore[arg-type]  # starlette's own types
        _hypercorn_config(),
        WorkerContext(None),
        connections,
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, listeners)
            bound: int = listeners[0].socket.getsockname()[1]
            logger.info(
                "monitoring pages on http://{}:{}", f"[{host}]" if ":" in host else host, bound
            )
            task_status.started(bound)
            try:
                await trio.sleep_forever()
            finally:
                # Wakes the sends that hypercorn shields.
                for stream in connections:
                    stream.socket.close()
    finally:
        for listener in listeners:
            listener.socket.close()


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
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


def _hypercorn_config() -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    config.errorlog = None
    config.read_timeout = READ_S
    config.include_server_header = False
    return config


async def _serve_connection(
    app: ASGIWrapper,
    config: HypercornConfig,
    context: WorkerContext,
    connections: set[trio.SocketStream],
    stream: trio.SocketStream,
) -> None:
    if len(connections) >= CONNECTIONS_MAX:
        await stream.aclose()
        return
    connections.add(stream)
    try:
        with trio.move_on_after(CONNECTION_S) as scope:
            bounded: Any = _BoundedStream(stream, scope)
            await TCPServer(app, config, context, ConnectionState({}), bounded)
    except Exception as error:  # noqa: BLE001 - whatever a client provokes ends its connection only
        logger.opt(exception=error).warning("a monitoring connection failed")
    finally:
        connections.discard(stream)
        stream.socket.close()


class _BoundedStream:
    """A socket stream as hypercorn uses it, whose sends end, and with which its task ends."""

    def __init__(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        self.socket = stream.socket
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose
        self._stream = stream
        self._scope = scope

    async def receive_some(self, max_bytes: int) -> bytes:
        data = await self._stream.receive_some(max_bytes)
        if not data:
            self._scope.deadline = min(self._scope.deadline, trio.current_time() + CLOSING_S)
        return bytes(data)

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(SEND_S) as sending:
            await self._stream.send_all(data)
        if sending.cancelled_caught:
            self._scope.cancel()
            raise trio.BrokenResourceError("the client does not read its answer")


def _application(observed: Observed) -> Starlette:
    async def livez(_: Request) -> Response:
        return _probe(observed.liveness())

    async def readyz(_: Request) -> Response:
        return _probe(observed.readiness())

    async def healthz(_: Request) -> Response:
        live, ready = observed.liveness(), observed.readiness()
        return _json({"live": live, "ready": ready}, ok=live.ok and ready.ok)

    async def stats(_: Request) -> Response:
        return _json(observed.snapshot())

    async def index(_: Request) -> Response:
        return _json(ENDPOINTS)

    endpoints = {
        "/": index,
        "/livez": livez,
        "/readyz": readyz,
        "/healthz": healthz,
        "/stats": stats,
    }
    return Starlette(
        routes=[Route(path, endpoint) for path, endpoint in endpoints.items()],
        exception_handlers={Exception: _failed},
    )


def _probe(health: Health) -> Response:
    return PlainTextResponse(f"{health.reason}\n", status_code=200 if health.ok else 503)


def _json(value: Any, *, ok: bool = True) -> Response:
    return Response(
        msgspec.json.encode(value),
        media_type="application/json",
        status_code=200 if ok else 503,
        headers={"Cache-Control": "no-store"},
    )


async def _failed(request: Request, error: Exception) -> Response:
    logger.opt(exception=error).error("the page {} failed", request.url.path)
    return PlainTextResponse("this page failed; the worker's log says how\n", status_code=500)
