"""The listeners: over loopback, and with listeners that fail."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing
from support.http_calls import LIMITS, Caller, calling, say_hello
from support.log_records import logged, texts
from trio.testing import MockClock

from trio_worker.errors import ConfigError
from trio_worker.http.drain import Drain
from trio_worker.http.exchange import Endpoint, Exchange
from trio_worker.http.limits import Limits
from trio_worker.http.listening import open_listeners
from trio_worker.http.messages import Answer
from trio_worker.http.server import PLACE_S, serve

GET = "GET / HTTP/1.1\nHost: w\n\n"


@asynccontextmanager
async def serving(
    endpoint: Endpoint, limits: Limits = LIMITS, drain: Drain | None = None
) -> AsyncIterator[int]:
    """The port; it has to be left with every connection closed, or after a drain."""
    drain = drain or Drain()
    listeners = await open_listeners("127.0.0.1", 0, section="section")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, endpoint, listeners, limits=limits, drain=drain))
        yield listeners[0].socket.getsockname()[1]
        drain.begin()


async def call(port: int) -> Caller:
    return Caller(await trio.open_tcp_stream("127.0.0.1", port))


async def test_a_thousand_callers_at_a_time_are_answered_and_one_more_is_told_so() -> None:
    callers: list[Caller] = []
    released = trio.Event()

    async def answer_slowly(exchange: Exchange) -> None:
        exchange.begin(200, {})
        await exchange.send(b"one")
        await released.wait()

    async with serving(answer_slowly) as port:

        async def ask() -> None:
            caller = await call(port)
            callers.append(caller)
            await caller.send(GET)
            assert (await caller.stream.receive_some(12)) == b"HTTP/1.1 200"

        with trio.fail_after(30):
            for _ in range(10):
                async with trio.open_nursery() as nursery:
                    for _ in range(100):
                        nursery.start_soon(ask)
            one_more = await call(port)
            await one_more.send(GET)
            heard = await one_more.hear()
            assert (heard.status, heard.headers["connection"]) == (503, "close")
            assert heard.headers["retry-after"] == "1"
            assert await one_more.is_closed()
            await one_more.stream.aclose()
            await callers.pop().stream.aclose()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await ask()
        released.set()
        for caller in callers:
            await caller.stream.aclose()


async def test_a_thousand_idle_connections_keep_nobody_out() -> None:
    """The one that has been idle for longest makes room."""
    async with serving(say_hello) as port:
        with trio.fail_after(30):
            idle = [await call(port) for _ in range(1000)]
            await idle[0].send(GET)
            assert (await idle[0].hear()).status == 200
            more = [await call(port) for _ in range(3)]
            for caller in more:
                await caller.send(GET)
                assert (await caller.hear()).status == 200
            for caller in idle[1:4]:
                assert await caller.is_closed()
            for caller in (idle[0], idle[4], idle[-1]):
                await caller.send(GET)
                assert (await caller.hear()).status == 200
        for caller in (*idle, *more):
            await caller.stream.aclose()


async def test_who_waits_for_the_place_of_one_that_is_asked_after_all_is_turned_away(
    autojump_clock: MockClock,
) -> None:
    """And is closed when a drain begins meanwhile."""
    pairs = [trio.socket.socketpair() for _ in range(3)]
    ours = [trio.SocketStream(pair[0]) for pair in pairs]
    listener: Any = Accepting(*(trio.SocketStream(pair[1]) for pair in pairs))
    drain = Drain()

    async def answer_slowly(exchange: Exchange) -> None:
        await trio.sleep_forever()

    limits = replace(LIMITS, connections=1)
    with mock.patch.object(drain, "end_longest_idle", return_value=True):
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(serve, answer_slowly, [listener], limits=limits, drain=drain)
            )
            await Caller(ours[0]).send(GET)
            heard = await Caller(ours[1]).hear()
            assert heard.status == 503
            assert trio.current_time() == pytest.approx(PLACE_S, abs=0.1)
            await trio.sleep(PLACE_S / 2)
            await ours[0].aclose()
            drain.begin()
    for stream in ours:
        await stream.aclose()


async def test_a_drain_ends_listening_at_once_and_answers_in_their_time() -> None:
    drain, released = Drain(), trio.Event()

    async def wait(_: Exchange) -> Answer:
        await released.wait()
        return Answer(body=b"late")

    with trio.fail_after(5):
        async with serving(wait, drain=drain) as port:
            busy, idle = await call(port), await call(port)
            await busy.send(GET)
            await trio.testing.wait_all_tasks_blocked(0.01)
            drain.begin()
            assert await idle.is_closed()
            with pytest.raises(OSError, match="all attempts to connect"):
                await call(port)
            released.set()
            assert (await busy.hear()).headers["connection"] == "close"
            assert await busy.is_closed()
    for caller in (busy, idle):
        await caller.stream.aclose()


async def test_answers_that_do_not_end_are_broken_off_after_the_drains_time() -> None:
    drain = Drain()

    async def go_on(exchange: Exchange) -> None:
        exchange.begin(200, {})
        await exchange.send(b"one")
        await trio.sleep_forever()

    with trio.fail_after(5):
        async with serving(go_on, replace(LIMITS, drain_s=0.01), drain) as port:
            caller = await call(port)
            await caller.send(GET)
            assert await caller.stream.receive_some(1)
            drain.begin()
            with pytest.raises(trio.BrokenResourceError):
                await caller.read_to_end()
    await caller.stream.aclose()


async def test_the_system_asks_after_callers_that_are_silent() -> None:
    accepted: list[Any] = []

    async def take(exchange: Exchange) -> Answer:
        stream = exchange._line._stream
        accepted.append(
            [
                stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),  # type: ignore[attr-defined]
                stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),  # type: ignore[attr-defined]
                stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),  # type: ignore[attr-defined]
            ]
        )
        return Answer()

    async with serving(take) as port:
        caller = await call(port)
        await caller.send(GET)
        await caller.hear()
        await caller.stream.aclose()
    ((keeps_alive, has_no_delay, interval),) = accepted
    assert keeps_alive
    assert has_no_delay
    assert interval == 15 or sys.platform != "linux"


class Accepting:
    """A listener whose next connections are given, or fail."""

    def __init__(self, *outcomes: trio.SocketStream | OSError) -> None:
        self.outcomes = list(outcomes)
        self.asked_at: list[float] = []
        self.socket = socket.socket()

    async def accept(self) -> trio.SocketStream:
        self.asked_at.append(trio.current_time())
        if not self.outcomes:
            await trio.sleep_forever()
        outcome = self.outcomes.pop(0)
        await trio.lowlevel.checkpoint()
        if isinstance(outcome, OSError):
            raise outcome
        return outcome


async def test_a_process_without_descriptors_left_tries_again_in_peace(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = (trio.SocketStream(each) for each in trio.socket.socketpair())
    full = OSError(errno.EMFILE, "Too many open files")
    listener: Any = Accepting(full, full, theirs, full)
    drain = Drain()
    with logged("WARNING") as errors:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, say_hello, [listener], limits=LIMITS, drain=drain))
            caller = Caller(ours)
            await trio.sleep(1)
            await caller.send(GET)
            assert (await caller.hear()).status == 200
            drain.begin()
    await ours.aclose()
    assert listener.asked_at == pytest.approx([0, 0.1, 0.2, 0.2, 0.3])
    assert texts(errors) == ["connections cannot be accepted for now: Too many open files"] * 2


async def test_a_taken_port_is_told_with_the_key_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^some\.section\.port: {port} is taken"):
            await open_listeners("127.0.0.1", port, section="some.section")


async def test_a_name_with_two_addresses_gets_one_free_port() -> None:
    listeners = await open_listeners("localhost", 0, section="section")
    assert len(listeners) == 1
    await listeners[0].aclose()


async def test_a_cancelled_server_leaves_nothing_open() -> None:
    ended: list[str] = []

    async def wait(_: Exchange) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("endpoint")

    async with trio.open_nursery() as nursery:
        async with serving(wait) as port:
            caller = await call(port)
            await caller.send(GET)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    assert ended == ["endpoint"]
    with trio.fail_after(5), pytest.raises(OSError, match="all attempts to connect"):
        await call(port)
    await caller.stream.aclose()


async def test_one_endpoint_that_fails_disturbs_no_other_connection() -> None:
    async def fail_sometimes(exchange: Exchange) -> Answer:
        if exchange.request.path == "/fail":
            raise ValueError
        return Answer(body=b"fine")

    with logged("ERROR"):
        async with calling(fail_sometimes) as good, calling(fail_sometimes) as bad:
            await bad.send("GET /fail HTTP/1.1\nHost: w\n\n")
            assert (await bad.hear()).status == 500
            await good.send(GET)
            assert (await good.hear()).body == b"fine"
