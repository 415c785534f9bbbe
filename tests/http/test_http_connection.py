"""One connection, on the mock clock: what comes over it, and what goes back."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http_calls import (
    DATE,
    LIMITS,
    Caller,
    Heard,
    calling,
    echo,
    say_hello,
)
from support.log_records import logged, texts
from trio.testing import MockClock

from trio_worker.http.connection import serve_connection
from trio_worker.http.drain import Drain
from trio_worker.http.exchange import Exchange
from trio_worker.http.line import AHEAD_BYTES, LINGER_S
from trio_worker.http.messages import Answer

GET = "GET / HTTP/1.1\nHost: w\n\n"
GET_AND_CLOSE = "GET / HTTP/1.1\nHost: w\nConnection: close\n\n"


def error_of(heard: Heard) -> tuple[int, str]:
    assert heard.headers["content-type"] == "application/json"
    assert heard.headers["connection"] == "close"
    error = json.loads(heard.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return heard.status, error["message"]


async def test_a_whole_answer_has_its_length_and_its_date_and_no_name_of_a_server() -> None:
    async with calling(say_hello) as caller:
        await caller.send(GET)
        heard = await caller.hear()
    assert (heard.status, heard.body) == (200, b"hello")
    assert heard.headers == {"content-type": "text/plain", "content-length": "5", "date": DATE}


async def test_requests_follow_each_other_on_one_connection() -> None:
    drain = Drain()
    async with calling(echo, drain=drain) as caller:
        for number in range(3):
            await caller.send(f"POST /{number} HTTP/1.1\nHost: w\nContent-Length: 2\n\nab")
            assert (await caller.hear()).body == f"POST /{number}  ab".encode()
    assert not drain._idle, "what is over would be remembered"


async def test_an_endpoint_is_told_what_was_asked() -> None:
    requests = []

    async def note(exchange: Exchange) -> Answer:
        requests.append(exchange.request)
        return Answer()

    async with calling(note) as caller:
        await caller.send("GET http://w/a%2Fb%20c?q=%20 HTTP/1.1\nhOst: w\nX-A: 1\nx-a: 2\n\n")
        await caller.hear()
        await caller.send("OPTIONS HTTP://w HTTP/1.1\nHost: w\n\n")
        await caller.hear()
    first, second = requests
    assert (first.method, first.path, first.query) == ("GET", "/a/b c", "q=%20")
    assert first.headers == {"host": "w", "x-a": "1, 2"}
    assert (second.path, second.query) == ("/", "")


async def test_the_last_answer_that_a_caller_asks_for_is_the_last() -> None:
    async with calling(say_hello) as caller:
        await caller.send(GET_AND_CLOSE, GET)
        assert (await caller.hear()).headers["connection"] == "close"
        assert await caller.is_closed()


async def test_http_1_0_gets_its_answer_and_no_other(autojump_clock: MockClock) -> None:
    async with calling(say_hello) as caller:
        await caller.send("GET / HTTP/1.0\n\n")
        assert (await caller.read_to_end()).endswith(b"Connection: close\r\n\r\nhello")
    assert trio.current_time() == 0


async def test_the_head_of_an_answer_is_that_of_the_answer() -> None:
    async with calling(say_hello) as caller:
        await caller.send("HEAD / HTTP/1.1\nHost: w\n\n", GET)
        head = await caller.hear("HEAD")
        assert (await caller.hear()).headers == head.headers
        assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize("status", [204, 304])
async def test_what_has_no_body_by_its_status_has_no_length(status: int) -> None:
    async def nothing(_: Exchange) -> Answer:
        return Answer(status=status)

    async with calling(nothing) as caller:
        for _ in range(2):
            await caller.send(GET)
            heard = await caller.hear()
            assert (heard.status, heard.headers) == (status, {"date": DATE})


async def test_a_status_of_our_own_needs_no_phrase() -> None:
    async def cancelled(_: Exchange) -> Answer:
        return Answer(status=499)

    async with calling(cancelled) as caller:
        await caller.send(GET)
        assert (await caller.hear()).status == 499


async def test_a_wish_for_another_protocol_is_passed_over() -> None:
    """As curl and Java's client have it, which would like to speak HTTP/2 if they may."""
    async with calling(say_hello) as caller:
        for _ in range(2):
            await caller.send("GET / HTTP/1.1\nHost: w\nConnection: Upgrade\nUpgrade: h2c\n\n")
            assert (await caller.hear()).status == 200


async def test_requests_that_come_ahead_are_answered_in_turn() -> None:
    async def take_a_while(exchange: Exchange) -> Answer:
        await trio.testing.wait_all_tasks_blocked()
        return Answer(body=exchange.request.path.encode())

    async with calling(take_a_while) as caller:
        await caller.send(*(f"GET /{number} HTTP/1.1\nHost: w\n\n" for number in range(3)))
        assert [(await caller.hear()).body for _ in range(3)] == [b"/0", b"/1", b"/2"]


async def test_what_comes_ahead_is_bounded() -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    taken = 0

    async def flood(stream: trio.abc.SendStream) -> None:
        nonlocal taken
        while True:
            await stream.send_all(b"x" * 1024)
            taken += 1024

    async def wait(_: Exchange) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_connection, theirs, wait, limits=LIMITS, drain=Drain()))
        await ours.send_all(GET.replace("\n", "\r\n").encode())
        nursery.start_soon(flood, ours)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == AHEAD_BYTES
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("\0\0\0\n\n", 400, "this is not HTTP/1.1: illegal request line"),
        ("\x16\x03\x01\x02", 400, "this is not HTTP/1.1: illegal request line"),
        ("GET / HTTP/1.1\n\n", 400, "this is not HTTP/1.1: Missing mandatory Host"),
        ("GET / HTTP/1.1\nHost: w\nsecret word\n\n", 400, "HTTP/1.1: illegal header line"),
        ("GET / HTTP/1.1\nHost: w\nContent-Length: x\n\n", 400, "bad Content-Length"),
        ("PRI * HTTP/2.0\n\nSM\n\n", 505, "only HTTP/1.1 is spoken here"),
        (
            "POST / HTTP/1.1\nHost: w\nContent-Length: 1\nTransfer-Encoding: chunked\n\n",
            400,
            "Content-Length and Transfer-Encoding exclude each other",
        ),
        ("POST / HTTP/1.1\nHost: w\nTransfer-Encoding: gzip\n\n", 501, "only `chunked`"),
        ("GET /" + "x" * 60_000, 431, "larger than the 32768 bytes"),
        ("GET / HTTP/1.1\nHost: w\nX: " + "x" * 60_000 + "\n", 431, "larger than the 32768"),
    ],
)
async def test_what_is_no_request_is_told_why(
    autojump_clock: MockClock, request_: str, status: int, message: str
) -> None:
    async with calling(echo) as caller:
        await caller.send(GET, request_)
        assert (await caller.hear()).status == 200
        heard_status, heard = error_of(await caller.hear())
        assert heard_status == status
        assert message in heard
        assert "secret" not in heard
        assert await caller.is_closed()
        # What it still sends is thrown away for a moment, lest it is told of a reset instead.
        await trio.sleep(LINGER_S / 2)
        await caller.send("more")


async def test_a_head_that_stops_coming_is_timed_from_its_first_byte(
    autojump_clock: MockClock,
) -> None:
    async with calling(say_hello) as caller:
        await trio.sleep(7)
        for _ in range(5):
            await caller.send("G")
            await trio.sleep(1)
        assert error_of(await caller.hear()) == (408, "the headers did not come within 10 seconds")
        assert trio.current_time() == 17


async def test_a_connection_may_idle_for_its_time_and_then_is_closed(
    autojump_clock: MockClock,
) -> None:
    async with calling(say_hello) as caller:
        for _ in range(2):
            await trio.sleep(74)
            await caller.send(GET)
            assert (await caller.hear()).status == 200
        assert await caller.is_closed()
        assert trio.current_time() == 2 * 74 + 75


async def test_a_connection_lives_no_longer_than_it_may(autojump_clock: MockClock) -> None:
    async with calling(say_hello, replace(LIMITS, life_s=10)) as caller:
        assert await caller.is_closed()
        assert trio.current_time() == 10


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("Content-Length: 5\n\n12345", id="of a length"),
        pytest.param("Transfer-Encoding: chunked\n\n2\n12\n3\n345\n0\n\n", id="in chunks"),
    ],
)
async def test_a_body_is_read_to_its_limit(body: str) -> None:
    async with calling(echo, replace(LIMITS, body_bytes=5)) as caller:
        for _ in range(2):
            await caller.send("POST / HTTP/1.1\nHost: w\n", body)
            assert (await caller.hear()).body == b"POST /  12345"
    async with calling(echo, replace(LIMITS, body_bytes=4)) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\n", body)
        heard = await caller.hear()
        assert error_of(heard) == (413, "the body is larger than the 4 bytes that are taken here")
        assert json.loads(heard.body)["error"]["code"] == "payload_too_large"


async def test_a_body_that_will_be_too_long_is_refused_before_it_is_sent(
    autojump_clock: MockClock,
) -> None:
    async with calling(echo, replace(LIMITS, body_bytes=4)) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 5\nExpect: 100-continue\n\n")
        assert (await caller.read_to_end()).startswith(b"HTTP/1.1 413 ")
        # Whoever sends it all the same is not listened to for long.
        await trio.sleep(LINGER_S / 2)
        await caller.send("xxxxx")
        await trio.sleep(LINGER_S / 2 + 0.01)
        with pytest.raises(trio.BrokenResourceError):
            await caller.send("xxxxx")


async def test_a_caller_that_waits_to_be_asked_for_its_body_is_asked_once() -> None:
    async with calling(echo) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 2\nExpect: 100-continue\n\n")
        assert await caller.stream.receive_some(100) == b"HTTP/1.1 100 \r\n\r\n"
        await caller.send("ab")
        assert (await caller.hear()).body == b"POST /  ab"


async def test_a_caller_whose_body_nobody_wants_is_not_asked_for_it() -> None:
    async with calling(say_hello) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 2\nExpect: 100-continue\n\n")
        heard = await caller.hear()
        assert (heard.status, heard.headers["connection"]) == (200, "close")


async def test_an_answer_arrives_though_its_caller_still_sends() -> None:
    """A close on unread bytes would be a reset, and the answer lost with it."""
    async with calling(say_hello) as caller:
        await caller.send(f"POST / HTTP/1.1\nHost: w\nContent-Length: {10**7}\n\n")
        assert (await caller.hear()).status == 200
        for _ in range(4):
            await caller.send(b"x" * 16_384)
            await trio.testing.wait_all_tasks_blocked()


async def test_a_body_that_stops_coming_is_told_so(autojump_clock: MockClock) -> None:
    async with calling(echo) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 5\n\n")
        for _ in range(4):
            await caller.send("x")
            await trio.sleep(5)
        assert error_of(await caller.hear()) == (408, "the body did not come within 30 seconds")
        assert trio.current_time() == 30


async def test_a_body_that_ends_early_is_told_so() -> None:
    async with calling(echo) as caller:
        await caller.send("POST / HTTP/1.1\nHost: w\nContent-Length: 5\n\nxx")
        await caller.stream.send_eof()
        status, _ = error_of(await caller.hear())
        assert status == 400


async def test_a_fault_is_logged_once_and_answered_and_ends_nothing() -> None:
    async def fail(exchange: Exchange) -> Answer:
        raise ValueError("broken")

    with logged("WARNING") as errors:
        async with calling(fail) as caller:
            for _ in range(2):
                await caller.send("GET /x%0A?secret HTTP/1.1\nHost: w\nsecret: secret\n\n")
                heard = await caller.hear()
                assert heard.status == 500
                assert "broken" not in heard.body.decode()
    assert texts(errors) == [r"answering GET '/x\n' failed"] * 2


@pytest.mark.parametrize("headers", [{"X": "a\r\nb"}, {"X Y": "a"}])
async def test_a_header_that_cannot_be_sent_ends_its_connection_alone(
    headers: dict[str, str],
) -> None:
    async def mistaken(exchange: Exchange) -> Answer:
        return Answer(headers=headers)

    with logged("WARNING") as errors:
        async with calling(mistaken) as caller:
            await caller.send(GET)
            assert await caller.is_closed()
    assert texts(errors) == ["a connection failed"]


async def test_an_endpoint_that_answers_nothing_is_at_fault() -> None:
    async def forget(exchange: Exchange) -> None:
        return None

    with logged("WARNING") as errors:
        async with calling(forget) as caller:
            await caller.send(GET)
            assert (await caller.hear()).status == 500
    assert len(errors) == 1


async def test_a_drain_closes_what_idles_and_lets_the_rest_end() -> None:
    drain, released = Drain(), trio.Event()

    async def wait(_: Exchange) -> Answer:
        await released.wait()
        return Answer(body=b"late")

    async with calling(wait, drain=drain) as idle, calling(wait, drain=drain) as busy:
        await busy.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        drain.begin()
        assert await idle.is_closed()
        released.set()
        heard = await busy.hear()
        assert (heard.body, heard.headers["connection"]) == (b"late", "close")
        assert await busy.is_closed()
        async with calling(wait, drain=drain) as late:
            assert await late.is_closed()


async def test_a_request_whose_head_is_under_way_when_a_drain_begins_is_answered() -> None:
    drain = Drain()
    async with calling(say_hello, drain=drain) as caller:
        await caller.send(GET[:9])
        await trio.testing.wait_all_tasks_blocked()
        drain.begin()
        await caller.send(GET[9:])
        assert (await caller.hear()).headers["connection"] == "close"


@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.sampled_from(
                [
                    b"GET / HTTP/1.1\r\nHost: w\r\n\r\n",
                    b"POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 3\r\n\r\n",
                    b"POST / HTTP/1.1\r\nHost: w\r\nTransfer-Encoding: chunked\r\n\r\n",
                    b"3\r\nabc\r\n",
                    b"0\r\n\r\n",
                    b"Expect: 100-continue\r\n",
                    b"\r\n",
                ]
            ),
        ),
        max_size=8,
    ),
    is_ended=st.booleans(),
)
@settings(max_examples=100)
def test_whatever_comes_the_connection_ends_in_time_and_nothing_is_logged(
    pieces: list[bytes], *, is_ended: bool
) -> None:
    async def throw(caller: Caller) -> None:
        with trio.fail_after(200):
            for piece in pieces:
                await caller.stream.send_all(piece)
            if is_ended:
                await caller.stream.send_eof()
            answered = await caller.read_to_end()
            assert answered == b"" or answered.startswith(b"HTTP/1.1 ")

    async def main() -> None:
        async with calling(echo) as caller:
            with suppress(trio.BrokenResourceError):
                await throw(caller)

    with logged("WARNING") as errors:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert texts(errors) == []


def test_the_defaults_let_a_stream_last() -> None:
    assert LIMITS.life_s == math.inf
