"""The monitoring pages over HTTP: starlette answers, hypercorn speaks the protocol.

Nobody on the other end can disturb the worker: connections are few, each has a longest life,
and one that does not read what it asked for is cut. hypercorn alone would wait for ever, and
shielded from cancellation, for such a client to read; hence the streams and the accept loop of
our own around its protocol.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import resources
from typing import Any, TypeAlias, TypeVar

import msgspec
import trio
import trio_util
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
from starlette.types import Receive, Scope, Send

from trio_worker.errors import ConfigError
from trio_worker.monitoring.observed import Health, Observed
from trio_worker.monitoring.snapshot import Snapshot

CONNECTIONS_MAX = 32
"""Another one is closed at once."""
CONNECTION_S = 60.0
"""A connection lives no longer; what polls opens the next one."""
SEND_S = 5.0
"""The longest that a client may leave an answer unread."""
CLOSING_S = 0.5
"""What a client that has closed its side still gets; hypercorn alone keeps it as if it idled."""
IDLE_S = 5.0
"""The longest that a client may take over the head of its request."""

FRESH_S = 0.1
"""What was computed for one client so short a time ago is good enough for the next."""
SAMPLE_S = 1.0
"""From one event of the page's stream to the next."""
HISTORY = 180
"""Samples that a new stream begins with: three minutes."""
IN_FLIGHT_SHOWN = 50
STREAMS_MAX = 8
"""Event streams at a time; the other connections stay free for probes."""
STREAM_S = 45.0
"""A stream ends by itself before its connection is cut; the page opens the next one."""

ENDPOINTS = {
    "/": "this index, or the dashboard for a browser",
    "/livez": "200 while the loops make progress",
    "/readyz": "200 only while requests are accepted; the reason otherwise",
    "/healthz": "both as JSON",
    "/metrics": "for Prometheus; OpenMetrics if asked for",
    "/stats": "the statistics snapshot",
    "/events": "the same and the requests in flight, every second, as server-sent events",
}

Exposition: TypeAlias = Callable[[Observed, str], tuple[bytes, str]]
"""From what is observed and an Accept header to the metrics and their content type."""

_T = TypeVar("_T")

_FRESH = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
    "X-Content-Type-Options": "nosniff",
}


async def serve_http(
    *,
    host: str,
    port: int,
    observed: Observed,
    exposition: Exposition,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `host` and `port` until cancelled; 0 is any free port.

    Reports the bound port as its start. Cancelled: connections are cut where they are.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    listeners = await _listen(host, port)
    connections: set[trio.SocketStream] = set()
    feed = _Feed(observed)
    serve = partial(
        _serve_connection,
        ASGIWrapper(_application(observed, exposition, feed)),  # type: ignore[arg-type]  # starlette's own types
        _hypercorn_config(),
        WorkerContext(None),
        connections,
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run)
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
    config.keep_alive_timeout = IDLE_S
    # It would count the silence of a client that listens to an event stream.
    config.read_timeout = None
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
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            # hypercorn alone would keep a connection that was reset as if it idled, too.
            self._scope.cancel()
            raise
        if not data:
            self._scope.deadline = min(self._scope.deadline, trio.current_time() + CLOSING_S)
        return bytes(data)

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(SEND_S) as sending:
            await self._stream.send_all(data)
        if sending.cancelled_caught:
            self._scope.cancel()
            raise trio.BrokenResourceError("the client does not read its answer")


def _application(observed: Observed, exposition: Exposition, feed: _Feed) -> Starlette:
    recent = _Recent()

    async def livez(_: Request) -> Response:
        return _probe(observed.liveness())

    async def readyz(_: Request) -> Response:
        return _probe(observed.readiness(), observed.resources().line)

    async def healthz(_: Request) -> Response:
        live, ready = observed.liveness(), observed.readiness()
        resources = observed.resources()
        body = msgspec.json.encode({"live": live, "ready": ready, "resources": resources})
        return _json(body, ok=live.ok and ready.ok)

    async def stats(_: Request) -> Response:
        return _json(recent.get("", lambda: msgspec.json.encode(observed.snapshot())))

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "*/*")
        body, content_type = recent.get(accept, lambda: exposition(observed, accept))
        # As a header: starlette would add a second charset to a media type.
        return Response(body, headers={**_FRESH, "Content-Type": content_type})

    async def events(_: Request) -> Response:
        if feed.streams >= STREAMS_MAX:
            return PlainTextResponse("too many streams are open\n", status_code=503)
        return _EventStream(feed)

    endpoints = {
        "/livez": livez,
        "/readyz": readyz,
        "/healthz": healthz,
        "/metrics": metrics,
        "/stats": stats,
        "/events": events,
    }
    return Starlette(
        routes=[Route(path, endpoint) for path, endpoint in {**endpoints, **_page()}.items()],
        exception_handlers={Exception: _failed},
    )


def _page() -> Mapping[str, Callable[[Request], Awaitable[Response]]]:
    """The dashboard and its parts."""
    parts = _read_page()

    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return parts["index.html"]
        return _json(msgspec.json.encode(ENDPOINTS))

    async def part(request: Request) -> Response:
        return parts.get(request.path_params["name"]) or PlainTextResponse(
            "there is no such page\n", status_code=404
        )

    return {"/": index, "/page/{name}": part}


def _probe(health: Health, *more: str) -> Response:
    return PlainTextResponse(
        "".join(f"{line}\n" for line in (health.reason, *more)),
        status_code=200 if health.ok else 503,
        headers=_FRESH,
    )


def _json(body: bytes, *, ok: bool = True) -> Response:
    return Response(
        body,
        media_type="application/json",
        status_code=200 if ok else 503,
        headers={**_FRESH, "Vary": "Accept"},
    )


def _read_page() -> Mapping[str, Response]:
    """The dashboard's files, by name."""
    folder = resources.files("trio_worker.monitoring").joinpath("page")
    return {
        part.name: Response(
            part.read_bytes(), headers={**_PAGE_HEADERS, "Content-Type": _PAGE_TYPES[suffix]}
        )
        for part in folder.iterdir()
        if (suffix := part.name.rpartition(".")[2]) in _PAGE_TYPES
    }


async def _failed(request: Request, error: Exception) -> Response:
    logger.opt(exception=error).error("the page {} failed", request.url.path)
    return PlainTextResponse("this page failed; the worker's log says how\n", status_code=500)


class _Recent:
    """What was computed within the last `FRESH_S`: polling in a loop costs next to nothing."""

    def __init__(self) -> None:
        self._since = float("-inf")
        self._kept: dict[str, Any] = {}

    def get(self, key: str, compute: Callable[[], _T]) -> _T:
        now = trio.current_time()
        if now - self._since > FRESH_S:
            self._since = now
            self._kept.clear()
        if key not in self._kept:
            self._kept[key] = compute()
        value: _T = self._kept[key]
        return value


class _Feed:
    """What the streams carry: sampled once for all of them, and a short history."""

    def __init__(self, observed: Observed) -> None:
        self.streams = 0
        self.sampled = trio.Event()
        """Set at the next sample."""
        self._observed = observed
        self._samples: deque[Mapping[str, float | None]] = deque(maxlen=HISTORY)
        self._event = b""
        self._is_broken = False

    async def run(self) -> None:
        """Sample every `SAMPLE_S` until cancelled."""
        async for _ in trio_util.periodic(SAMPLE_S):
            try:
                self._sample()
            except Exception as error:  # noqa: BLE001 - what is shown must not stop what it shows
                if not self._is_broken:
                    logger.opt(exception=error).error("sampling for the dashboard failed")
                self._is_broken = True
            else:
                self._is_broken = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A stream is open meanwhile."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def history(self) -> bytes:
        """The event that a stream begins with."""
        samples = msgspec.json.encode({"now": trio.current_time(), "samples": [*self._samples]})
        return b"retry: 1000\nevent: history\ndata: " + samples + b"\n\n"

    def event(self) -> bytes:
        """How things are; never older than the last sample."""
        return self._event or self._state(self._observed.snapshot())

    def _sample(self) -> None:
        snapshot = self._observed.snapshot()
        self._samples.append(_sample_of(snapshot))
        self._event = self._state(snapshot) if self.streams else b""
        self.sampled.set()
        self.sampled = trio.Event()

    def _state(self, snapshot: Snapshot) -> bytes:
        state = msgspec.json.encode(
            {
                "now": trio.current_time(),
                "live": self._observed.liveness(),
                "ready": self._observed.readiness(),
                "snapshot": snapshot,
                "in_flight": self._observed.in_flight(IN_FLIGHT_SHOWN),
                "sample": _sample_of(snapshot),
            }
        )
        return b"event: state\ndata: " + state + b"\n\n"


def _sample_of(snapshot: Snapshot) -> Mapping[str, float | None]:
    """One point of each of the page's charts."""
    requests = snapshot.requests
    return {
        "at": trio.current_time(),
        "tokens_per_second": snapshot.tokens.per_second,
        "running": snapshot.batch.running,
        "depth": snapshot.queue.depth,
        "first_p50": requests.time_to_first_token_ms.p50,
        "first_p95": requests.time_to_first_token_ms.p95,
        "gap_p50": requests.inter_token_ms.p50,
        "gap_p95": requests.inter_token_ms.p95,
        "memory_mb": snapshot.resources.memory_mb,
    }


class _EventStream(Response):
    """Server-sent events until the client leaves, does not read, or `STREAM_S` have passed.

    One event at most is under way to a client: the next one is taken when it has been sent.
    """

    def __init__(self, feed: _Feed) -> None:
        super().__init__(
            media_type="text/event-stream", headers={**_FRESH, "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] == "GET":
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + STREAM_S
                nursery.start_soon(self._until_gone, receive, nursery.cancel_scope)
                await self._tell(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, send: Send) -> None:
        with self._feed.watched():
            body = self._feed.history() + self._feed.event()
            while True:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await self._feed.sampled.wait()
                body = self._feed.event()

    async def _until_gone(self, receive: Receive, stream: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.cancel(reason="the client is gone")
