"""Answers in pieces, and callers that leave or do not read."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Self

import pytest
import trio
import trio.testing
from support.http_calls import DATE, LIMITS, calling, socket_pair
from support.log_records import logged, texts
from trio.testing import MockClock

from trio_worker.http.exchange import Exchange
from trio_worker.http.messages import Answer
from trio_worker.http.sending import UNCHECKED_SENDS, BoundedSender

GET = "GET / HTTP/1.1\nHost: w\n\n"
EVENTS = {"Content-Type": "text/event-stream"}


class Ended:
    """Notes how what runs inside ended, and when."""

    def __init__(self) -> None:
        self.how: type[BaseException] | None = None
        self.at = trio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, how: type[BaseException] | None, *_: object) -> None:
        self.how = how
        self.at.set()


async def count(exchange: Exchange) -> None:
    exchange.begin(200, EVENTS)
    for number in range(3):
        await exchange.send(b"%d" % number)


async def test_pieces_come_in_chunks_and_the_connection_goes_on() -> None:
    async with calling(count) as caller:
        for _ in range(2):
            await caller.send(GET)
            heard = await caller.hear()
            assert heard.body == b"012"
            assert heard.headers == {
                "date": DATE,
                "content-type": "text/event-stream",
                "transfer-encoding": "chunked",
            }


async def test_each_piece_is_sent_when_it_is_there() -> None:
    go_on = trio.Event()

    async def wait(exchange: Exchange) -> None:
        exchange.begin(200, EVENTS)
        await exchange.send(b"one")
        await go_on.wait()
        await exchange.send(b"two")

    async with calling(wait) as caller:
        await caller.send(GET)
        assert (await caller.stream.receive_some(1000)).endswith(b"\r\n\r\n3\r\none\r\n")
        go_on.set()
        assert await caller.stream.receive_some(1000) == b"3\r\ntwo\r\n"


async def test_the_head_of_an_answer_in_pieces_has_none() -> None:
    async with calling(count) as caller:
        for _ in range(2):
            await caller.send("HEAD / HTTP/1.1\nHost: w\n\n")
            assert (await caller.hear("HEAD")).body == b""


async def test_an_answer_in_no_pieces_is_whole() -> None:
    async def nothing(exchange: Exchange) -> None:
        exchange.begin(202, {})

    async with calling(nothing) as caller:
        await caller.send(GET)
        heard = await caller.hear()
        assert (heard.status, heard.body) == (202, b"")


async def test_http_1_0_gets_the_pieces_as_they_are() -> None:
    async with calling(count) as caller:
        await caller.send("GET / HTTP/1.0\n\n")
        assert (await caller.read_to_end()).endswith(b"Connection: close\r\n\r\n012")


async def test_nothing_is_said_before_the_first_piece_so_it_may_still_be_refused() -> None:
    go_on = trio.Event()

    async def change_its_mind(exchange: Exchange) -> Answer:
        exchange.begin(200, EVENTS)
        await go_on.wait()
        assert not exchange.has_begun
        return Answer(status=503, body=b"full")

    async with calling(change_its_mind) as caller:
        await caller.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        heard = await caller.hear()
        assert (heard.status, heard.body) == (503, b"full")


@pytest.mark.parametrize("is_begun", [False, True])
async def test_an_endpoint_is_cancelled_when_its_caller_leaves(*, is_begun: bool) -> None:
    ended = Ended()

    async def wait(exchange: Exchange) -> None:
        with ended:
            if is_begun:
                exchange.begin(200, EVENTS)
                await exchange.send(b"one")
            await trio.sleep_forever()

    async with calling(wait) as caller:
        await caller.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        # What comes ahead is no farewell.
        await caller.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        assert ended.how is None
        await caller.stream.send_eof()
        await ended.at.wait()
        assert ended.how is trio.Cancelled


async def test_a_caller_that_leaves_after_its_body_is_noticed() -> None:
    ended = Ended()

    async def wait(exchange: Exchange) -> None:
        with ended:
            assert await exchange.read_body() == b"ab"
            await trio.sleep_forever()

    async with calling(wait) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 2\n\nab")
        await trio.testing.wait_all_tasks_blocked()
        await caller.stream.aclose()
        await ended.at.wait()


async def test_a_caller_that_leaves_is_noticed_though_nobody_has_read_its_body() -> None:
    ended = Ended()

    async def tell(exchange: Exchange) -> None:
        with ended:
            exchange.begin(200, EVENTS)
            await exchange.send(b"one")
            await trio.sleep_forever()

    async with calling(tell) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 9\n\nab")
        await trio.testing.wait_all_tasks_blocked()
        await caller.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert ended.how is trio.Cancelled


async def test_a_caller_that_breaks_off_is_noticed() -> None:
    ended = Ended()

    async def wait(exchange: Exchange) -> None:
        with ended:
            await trio.sleep_forever()

    ours, theirs = await tcp_pair()
    with logged("WARNING") as errors:
        async with calling(wait, pair=(ours, theirs)) as caller:
            await caller.send(GET)
            await trio.testing.wait_all_tasks_blocked(0.01)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await ours.aclose()
            with trio.fail_after(5):
                await ended.at.wait()
    assert texts(errors) == []


async def test_a_caller_that_has_closed_its_side_may_be_given_a_moment(
    autojump_clock: MockClock,
) -> None:
    async def take(exchange: Exchange) -> Answer:
        await trio.sleep(float(exchange.request.query))
        return Answer(body=b"done")

    for taken_s, is_heard in ((0.4, True), (0.6, False)):
        async with calling(take, replace(LIMITS, half_closed_s=0.5)) as caller:
            await caller.send(f"GET /?{taken_s} HTTP/1.1\nHost: w\n\n")
            await caller.stream.send_eof()
            assert (await caller.read_to_end()).endswith(b"done") is is_heard


async def test_an_answer_that_is_there_is_sent_even_to_who_has_closed_its_side() -> None:
    async def at_once(_: Exchange) -> Answer:
        return Answer(body=b"done")

    async with calling(at_once) as caller:
        await caller.send(GET)
        await caller.stream.send_eof()
        assert (await caller.read_to_end()).endswith(b"done")


@pytest.mark.parametrize("how", ["fails", "cuts", "returns"])
async def test_an_answer_that_is_not_whole_does_not_look_whole(how: str) -> None:
    async def break_off(exchange: Exchange) -> None:
        exchange.begin(200, EVENTS)
        await exchange.send(b"one")
        if how == "fails":
            raise ValueError
        if how == "cuts":
            exchange.cut("for a reason")

    # HTTP/1.0 has no last chunk: only a reset tells.
    for version in ("1.0", "1.1"):
        with logged("WARNING") as errors:
            async with calling(break_off, pair=await tcp_pair()) as caller:
                await caller.send(f"GET / HTTP/{version}\nHost: w\nConnection: close\n\n")
                if how == "returns":
                    assert (await caller.read_to_end()).endswith((b"0\r\n\r\n", b"one"))
                else:
                    with pytest.raises(trio.BrokenResourceError):
                        await caller.read_to_end()
        assert len(texts(errors)) == (how == "fails")


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return ours, await listener.accept()


Send = Callable[[Exchange], Awaitable[Answer | None]]


async def send_whole(_: Exchange) -> Answer:
    return Answer(body=b"x" * 10**7)


async def send_pieces(exchange: Exchange) -> None:
    exchange.begin(200, EVENTS)
    while True:
        await exchange.send(b"x" * 10**5)


@pytest.mark.parametrize("send", [send_whole, send_pieces])
async def test_a_caller_that_does_not_read_is_cut_in_time(
    autojump_clock: MockClock, send: Send
) -> None:
    ended = Ended()

    async def note(exchange: Exchange) -> Answer | None:
        with ended:
            return await send(exchange)

    pair = _, theirs = await socket_pair()
    async with calling(note, pair=pair) as caller:
        await caller.send(GET)
        await ended.at.wait()
        await trio.testing.wait_all_tasks_blocked()
        while theirs.socket.fileno() != -1:  # noqa: ASYNC110 - on the mock clock
            await trio.sleep(0.1)
        assert trio.current_time() == pytest.approx(10, abs=0.2)
        assert ended.how is (trio.Cancelled if send is send_pieces else None)


@pytest.mark.parametrize("is_read", [False, True])
async def test_an_endpoint_that_gives_up_in_the_middle_of_a_piece_has_cut_its_answer(
    autojump_clock: MockClock, *, is_read: bool
) -> None:
    async def give_up(exchange: Exchange) -> None:
        exchange.begin(200, EVENTS)
        with trio.move_on_after(1):
            await exchange.send(b"x" * (10 if is_read else 10**7))
            await trio.sleep_forever()

    with logged("WARNING") as errors:
        async with calling(give_up, pair=await tcp_pair()) as caller:
            await caller.send("GET / HTTP/1.1\nHost: w\nConnection: close\n\n")
            await trio.sleep(2)
            if is_read:
                assert (await caller.read_to_end()).endswith(b"0\r\n\r\n")
            else:
                with pytest.raises(trio.BrokenResourceError):
                    await caller.read_to_end()
    assert texts(errors) == []


async def test_pieces_without_end_reach_a_cancellation() -> None:
    async def go_on(exchange: Exchange) -> None:
        exchange.begin(200, EVENTS)
        with trio.move_on_after(0):
            while True:
                await exchange.send(b"x")

    for method in ("GET", "HEAD"):
        async with calling(go_on, pair=await socket_pair()) as caller:
            await caller.send(f"{method} / HTTP/1.1\nHost: w\n\n")
            assert set((await caller.hear(method)).body) <= {ord("x")}


async def test_what_the_system_does_not_take_at_once_arrives_once_and_in_order() -> None:
    pieces = [b"%07d" % number * 20_000 for number in range(30)]

    async def send(exchange: Exchange) -> None:
        exchange.begin(200, EVENTS)
        for piece in pieces:
            await exchange.send(piece)

    async with calling(send, pair=await socket_pair()) as caller:
        await caller.send(GET)
        with trio.fail_after(10):
            assert (await caller.hear()).body == b"".join(pieces)


async def test_a_piece_of_which_the_system_takes_nothing_at_once_arrives() -> None:
    ours, theirs = await socket_pair()
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(theirs.socket.fileno(), b"x" * 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(BoundedSender(theirs, 5).send, b"piece")
        await trio.testing.wait_all_tasks_blocked()
        received = b""
        while not received.endswith(b"piece"):
            received += await ours.receive_some()
    assert len(received) == filled + len(b"piece")
    await ours.aclose()
    await theirs.aclose()


async def test_a_caller_that_reads_slowly_gets_all(autojump_clock: MockClock) -> None:
    async def send(_: Exchange) -> Answer:
        return Answer(body=b"x" * 500_000)

    ours, theirs = trio.testing.lockstep_stream_pair()
    async with calling(send, pair=(ours, theirs)) as caller:
        await caller.send("GET / HTTP/1.1\nHost: w\nConnection: close\n\n")
        answer = b""
        while piece := await ours.receive_some(50_000):
            answer += piece
            await trio.sleep(3)
        assert answer.partition(b"\r\n\r\n")[2] == b"x" * 500_000
        assert trio.current_time() > 2 * LIMITS.send_s


async def test_sends_that_succeed_let_others_have_their_turn() -> None:
    pieces = 0
    shown: list[int] = []

    async def send(exchange: Exchange) -> None:
        nonlocal pieces
        exchange.begin(200, EVENTS)
        for _ in range(100):
            await exchange.send(b"x")
            pieces += 1

    async def watch() -> None:
        while True:
            shown.append(pieces)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        async with calling(send, pair=await socket_pair()) as caller:
            nursery.start_soon(watch)
            await caller.send(GET)
            assert (await caller.hear()).body == b"x" * 100
        nursery.cancel_scope.cancel()
    steps = [later - earlier for earlier, later in pairwise(shown)]
    # Trio shuffles who comes next, so one task may have its turn twice.
    assert 1 < max(steps) <= 2 * UNCHECKED_SENDS


async def test_what_is_sent_after_the_end_from_within_a_shield_goes_nowhere() -> None:
    async def insist(exchange: Exchange) -> None:
        exchange.begin(200, EVENTS)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for _ in range(3):
                    await exchange.send(b"more")

    with logged("WARNING") as errors:
        async with calling(insist, pair=await tcp_pair()) as caller:
            await caller.send(GET)
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert texts(errors) == []
