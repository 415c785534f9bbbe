"""Callers that do what they should not, over real sockets: each is answered or cut."""

from __future__ import annotations

import gc
import os
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from support.commands import until
from support.gateway_loopback import Door, EventTimes, leave_with_a_reset, open_door, request
from support.gateway_rig import CHAT, say, send
from support.http_calls import Caller
from support.worker_rig import Rig, running_worker

from trio_worker.simulated.broker import open_memory_broker

SEND_S = 2.0
LIMITS = {"head_s": 1.0, "body_s": 1.0, "send_s": SEND_S}
"""Shorter than those of a gateway, so that one need not wait for them."""
BODY_BYTES = 100_000
ENGINE = ("worker.continuous_batching.max_batch_size=64", "worker.simulated.turn_ms=40")


@asynccontextmanager
async def open_fleet(*overrides: str, **config: object) -> AsyncIterator[tuple[Rig, Door]]:
    """A worker and a gateway before it, which must be at rest when the callers have left."""
    async with (
        running_worker(*ENGINE, *overrides) as rig,
        open_memory_broker(rig.server, name="gateway") as broker,
        open_door(broker, limits=LIMITS, max_body_bytes=BODY_BYTES, **config) as door,
    ):
        await trio.sleep(0.05)
        yield rig, door
        await at_rest(rig, door)


async def at_rest(rig: Rig, door: Door) -> None:
    async def is_at_rest() -> bool:
        return door.is_at_rest and not rig.snapshot().requests.in_flight

    await until(is_at_rest, within_s=10)


# --- those that do not read -------------------------------------------------------------------


async def test_who_does_not_read_is_cut_and_nobody_beside_it_stutters() -> None:
    """Log-probabilities make events large, so that they soon fill what the system keeps."""
    good = [EventTimes() for _ in range(16)]
    alone = [EventTimes() for _ in range(16)]
    long = say("long", max_tokens=80, stream=True)
    wide = say("wide", max_tokens=2000, stream=True, logprobs=True, top_logprobs=20)
    async with open_fleet() as (rig, door), trio.open_nursery() as nursery:
        with trio.fail_after(60):
            async with trio.open_nursery() as beside:
                for each in alone:
                    beside.start_soon(each.take, door, long)
            for _ in range(16):
                nursery.start_soon(do_not_read, door, wide)
            await trio.sleep(0.5)
            assert rig.snapshot().requests.in_flight == 16
            async with trio.open_nursery() as beside:
                for each in good:
                    beside.start_soon(each.take, door, long)
    assert all(each.is_whole for each in good)
    quiet_s, loud_s = (max(each.largest_gap_s() for each in some) for some in (alone, good))
    assert loud_s < 1.0, f"without bad callers the largest gap was {quiet_s:.3f} s"


async def do_not_read(door: Door, body: object) -> None:
    """Ask, and look only whether the connection still stands."""
    caller = trio.socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with caller:
        await caller.connect(("127.0.0.1", door.port))
        began_at = trio.current_time()
        await caller.send(request(body))
        while not caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.05)
        assert trio.current_time() - began_at < 10 + SEND_S


# --- those that send nonsense, or too much, or too little -------------------------------------


async def answer_of(caller: Caller) -> bytes:
    """What comes until the other side closes."""
    read = b""
    with suppress(trio.BrokenResourceError):
        async for data in caller.stream:
            read += data
    return read


async def keep_sending(caller: Caller, piece: bytes, *, every_s: float = 0.0) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await caller.stream.send_all(piece)
            await trio.sleep(every_s)


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
CHUNK = b"1000\r\n" + b" " * 4096 + b"\r\n"


@pytest.mark.parametrize(
    ("beginning", "piece", "every_s", "status"),
    [
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK, 0, 413, id="chunks"),
        pytest.param(HEAD + b"Content-Length: 99999999\r\n\r\n", b" " * 4096, 0, 413, id="length"),
        pytest.param(HEAD + b"Content-Length: 90000\r\n\r\n", b" ", 0.1, 408, id="slow body"),
        pytest.param(HEAD, b"x-a: " + b"b" * 4000 + b"\r\n", 0, 431, id="headers"),
        pytest.param(HEAD, b"x-a: b\r\n", 0, 431, id="short headers"),
        pytest.param(HEAD, b"x-a: b\r\n", 0.1, 408, id="slow headers"),
        pytest.param(b"GET /", b"x" * 4096, 0, 431, id="a path"),
        pytest.param(b"", b"G", 0.1, 408, id="slow request line"),
        pytest.param(b"\x16\x03\x01" + b"\0" * 50, b"", 0.1, 400, id="TLS"),
        pytest.param(b"", os.urandom(64) + b"\r\n\r\n", 0.1, 400, id="garbage"),
    ],
)
async def test_what_does_not_end_is_answered_and_cut(
    beginning: bytes, piece: bytes, every_s: float, status: int
) -> None:
    async with open_fleet() as (_, door), trio.open_nursery() as nursery:
        caller = await door.connect()
        async with caller.stream:
            with trio.fail_after(5):
                await caller.stream.send_all(beginning)
                nursery.start_soon(partial(keep_sending, caller, piece, every_s=every_s))
                assert (await answer_of(caller)).startswith(f"HTTP/1.1 {status} ".encode())


async def test_requests_that_are_sent_at_once_are_answered_one_after_the_other() -> None:
    async with open_fleet() as (_, door):
        caller = await door.connect()
        async with caller.stream:
            with trio.fail_after(10):
                for number in range(3):
                    body = say(f"number {number}", max_tokens=2, stream=number == 1)
                    await caller.stream.send_all(request(body))
                for number in range(3):
                    heard = await caller.hear("POST")
                    assert heard.status == 200
                    assert (b"[DONE]" in heard.body) is (number == 1)


async def test_who_sends_request_after_request_and_reads_nothing_is_cut() -> None:
    async with open_fleet() as (_, door):
        caller = await door.connect()
        async with caller.stream:
            with trio.fail_after(20):
                many = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200
                await keep_sending(caller, many)


@pytest.mark.parametrize("stream", [True, False])
async def test_http_1_0_is_answered_to_the_end_of_the_connection(*, stream: bool) -> None:
    async with open_fleet() as (_, door):
        caller = await door.connect()
        asked = request(say("hi", max_tokens=3, stream=stream)).replace(b"HTTP/1.1", b"HTTP/1.0")
        async with caller.stream:
            with trio.fail_after(5):
                await caller.stream.send_all(asked)
                read = await caller.read_to_end()
    head, _, body = read.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"chunked" not in head
    assert body.endswith(b"data: [DONE]\n\n" if stream else b"}")


# --- those that come and go -------------------------------------------------------------------


async def test_a_thousand_connections_that_ask_nothing_keep_nobody_out() -> None:
    async with open_fleet() as (_, door):
        with trio.fail_after(60):
            idle = [await door.connect() for _ in range(1000)]
            assert (await door.ask(say("hi", max_tokens=1))).status == 200
            for caller in idle:
                await caller.stream.aclose()


async def leave_after_the_request_line(door: Door, _number: int) -> None:
    caller = await door.connect()
    await caller.stream.send_all(f"POST {CHAT} HTTP/1.1\r\n".encode())
    await caller.stream.aclose()


async def leave_in_mid_stream(door: Door, number: int) -> None:
    caller = await door.connect()
    await send(caller, say(f"number {number}", max_tokens=1000, stream=True))
    await caller.stream.receive_some(1)
    leave_with_a_reset(caller)


async def leave_before_a_whole_answer(door: Door, number: int) -> None:
    caller = await door.connect()
    await send(caller, say(f"number {number}", max_tokens=1000))
    if number % 2:
        leave_with_a_reset(caller)
    else:
        await caller.stream.aclose()


async def leave_at_once(door: Door, _number: int) -> None:
    leave_with_a_reset(await door.connect())


@pytest.mark.thorough
@pytest.mark.parametrize(
    "leave",
    [
        leave_after_the_request_line,
        leave_at_once,
        leave_before_a_whole_answer,
        leave_in_mid_stream,
    ],
)
async def test_many_who_come_and_leave_early_leave_nothing_behind(
    leave: Callable[[Door, int], Awaitable[None]],
) -> None:
    async with open_fleet("worker.request_queue.max_depth=1000") as (rig, door):

        async def come_and_go(first: int, count: int) -> None:
            for number in range(first, first + count):
                await leave(door, number)

        async def crowd() -> int:
            """What is held when they have all left."""
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for part in range(16):
                        nursery.start_soon(come_and_go, part * 1000, 6)
                await at_rest(rig, door)
                await trio.sleep(0.1)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        await crowd()
        tracemalloc.start()
        try:
            held = [await crowd() for _ in range(3)]
        finally:
            tracemalloc.stop()
        assert min(held[1:]) - held[0] < 300_000, "each of 192 callers has left something"
        assert (await door.ask(say("hi", max_tokens=1))).status == 200
