"""One connection from its first byte to its last: request after request."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus

import trio
from loguru import logger

from trio_worker.http.drain import Drain
from trio_worker.http.exchange import Endpoint, Exchange
from trio_worker.http.limits import Limits
from trio_worker.http.line import Line
from trio_worker.http.messages import Answer, CallerGone, Refused, Request, refusal


async def serve_connection(
    stream: trio.abc.HalfCloseableStream,
    endpoint: Endpoint,
    *,
    limits: Limits,
    drain: Drain,
    wall_clock: Callable[[], float] = time.time,
) -> None:
    """Answer what comes on `stream` until it ends, and close it. Raises nothing.

    Cancelled: the endpoint is, too, and an answer that is under way is reset.
    """
    line = Line(stream, limits, drain, wall_clock)
    try:
        with trio.move_on_after(limits.life_s):
            await _serve_requests(line, endpoint, limits, drain)
    except CallerGone:
        pass
    except Exception as error:  # noqa: BLE001 - a fault on one connection ends that connection only
        logger.opt(exception=error).error("a connection failed")
    finally:
        line.prepare_close()
        await trio.aclose_forcefully(stream)


async def _serve_requests(line: Line, endpoint: Endpoint, limits: Limits, drain: Drain) -> None:
    is_open = True
    while is_open:
        try:
            request = await _next_request(line, limits, drain)
        except Refused as refused:
            await line.answer(refused.answer)
            await line.linger()
            return
        if request is None:
            return
        is_open = await _serve_request(line, endpoint, request, limits)


async def _next_request(line: Line, limits: Limits, drain: Drain) -> Request | None:
    """The next request; None if the connection has been idle for too long, or a drain begins."""
    if not line.has_bytes:
        with drain.idle(limits.idle_s) as idle:
            await line.receive()
        if idle.cancelled_caught:
            return None
    request = line.request_nowait()
    if request is not None:
        return request
    with trio.move_on_after(limits.head_s):
        while request is None:
            await line.receive()
            request = line.request_nowait()
        return request
    raise Refused(
        HTTPStatus.REQUEST_TIMEOUT, f"the headers did not come within {limits.head_s:g} seconds"
    )


async def _serve_request(line: Line, endpoint: Endpoint, request: Request, limits: Limits) -> bool:
    """Have one request answered; whether another may follow."""
    answer: Answer | None = None
    is_answered = False
    async with trio.open_nursery() as nursery:
        exchange = Exchange(request, line, nursery.cancel_scope)
        nursery.start_soon(_end_with_caller, line, exchange, nursery.cancel_scope, limits)
        answer = await _ask(endpoint, exchange)
        is_answered = not exchange.is_cut
        nursery.cancel_scope.cancel(reason="the request is answered")
    if exchange.refusal is not None:
        answer, is_answered = exchange.refusal, not exchange.has_begun
    if not is_answered:
        return False
    await exchange.finish(answer)
    if line.start_next_cycle():
        return True
    if line.has_unread:
        await line.linger()
    return False


async def _ask(endpoint: Endpoint, exchange: Exchange) -> Answer | None:
    """What the endpoint answers; its fault is a 500, or cuts the answer that it has begun."""
    try:
        answer = await endpoint(exchange)
        exchange.check(answer)
    except Exception as error:  # noqa: BLE001 - a fault in one answer ends that answer only
        request = exchange.request
        logger.opt(exception=error).error("answering {} {!r} failed", request.method, request.path)
        if exchange.has_begun:
            exchange.cut("the endpoint failed")
        return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says how")
    return answer


async def _end_with_caller(
    line: Line, exchange: Exchange, scope: trio.CancelScope, limits: Limits
) -> None:
    """Cancel `scope` when the caller has left."""
    await exchange.wait_received()
    try:
        await line.wait_closed()
    except CallerGone:
        exchange.cut("the caller has reset the connection")
    else:
        scope.deadline = min(scope.deadline, trio.current_time() + limits.half_closed_s)
