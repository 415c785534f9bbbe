"""HTTP on one connection: hypercorn speaks the protocol, starlette calls the route.

Of hypercorn, three things below its public names are used, here and nowhere else:

* `TCPServer` serves one stream that we give it. Its public `serve` listens and accepts by itself,
  shielded from cancellation while it sends: a client that does not read its answer would hold up
  the end of the worker (`test_a_client_that_does_not_read_cannot_hold_up_the_stop`).
* `WorkerContext` is where `TCPServer` finds the clock, the events and the tasks of its kind of
  event loop: without it nothing is answered (`test_probes_answer_with_their_reason`).
* `ASGIWrapper` is how `TCPServer` calls an application: without it the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

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

IDLE_S = 5.0
"""The longest that a client may take over the head of its request."""

Routes: TypeAlias = Mapping[str, Callable[[Request], Awaitable[Response]]]
"""By path: what answers a GET, and a HEAD."""


def speak_http(routes: Routes) -> Callable[[Any], Awaitable[None]]:
    """Serves one stream with these routes, until the client or the stream ends it.

    The stream has a `socket`, and `receive_some`, `send_all`, `send_eof` and `aclose` as Trio's
    streams have them. A route that raises is answered 500, and logged.
    """
    application = Starlette(
        routes=[Route(path, endpoint) for path, endpoint in routes.items()],
        exception_handlers={Exception: _failed},
    )
    app = ASGIWrapper(application)  # type: ignore[arg-type]  # starlette's own types
    config, context = _config(), WorkerContext(None)

    async def speak(stream: Any) -> None:
        await TCPServer(app, config, context, ConnectionState({}), stream)

    return speak


def _config() -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    config.errorlog = None
    config.keep_alive_timeout = IDLE_S
    # It would count the silence of a client that listens to an event stream.
    config.read_timeout = None
    config.include_server_header = False
    return config


async def _failed(request: Request, error: Exception) -> Response:
    logger.opt(exception=error).error("the page {} failed", request.url.path)
    return PlainTextResponse("this page failed; the worker's log says how\n", status_code=500)
