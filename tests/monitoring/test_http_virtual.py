"""What the monitoring pages do in time, on the mock clock: every figure here is exact.

The server runs unchanged on a Unix socket, which the kernel serves at once, so that the clock may
jump whenever every task waits.
"""

from __future__ import annotations

import json
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import pytest
import trio
from loguru import logger
from support.observed import SNAPSHOT, FakeWorker, fake_exposition
from trio.testing import MockClock

from trio_worker.monitoring import http_server
from trio_worker.monitoring.http_server import serve_http
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.snapshot import InFlightReading

Connect: TypeAlias = Callable[[], Awaitable[trio.SocketStream]]


@asynccontextmanager
async def serving(observed: Any, exposition: Any = fake_exposition) -> AsyncIterator[Connect]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "s")
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await listening.bind(path)
        listening.listen(100)

        async def listen(_host: str, _port: int) -> list[trio.SocketListener]:
            return [trio.SocketListener(listening)]

        with mock.patch.object(http_server, "_listen", listen):
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    partial(
                        serve_http, host="here", port=0, observed=observed, exposition=exposition
                    )
                )
                yield partial(trio.open_unix_socket, path)
                nursery.cancel_scope.cancel()


def request(path: str, method: str = "GET", *, close: bool = False, accept: str = "*/*") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: worker\r\nAccept: {accept}\r\n"
    return f"{head}Connection: {'close' if close else 'keep-alive'}\r\n\r\n".encode()


async def get(connect: Connect, path: str, method: str = "GET", accept: str = "*/*") -> Any:
    """Status, headers and body of an answer on a connection of its own."""
    async with await connect() as stream:
        await stream.send_all(request(path, method, close=True, accept=accept))
        answer = b"".join([chunk async for chunk in stream])
    head, _, body = answer.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


async def until_cut(stream: trio.SocketStream) -> float:
    """The time at which the other side closes."""
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(2**20):
            pass
    return trio.current_time()


async def open_stream(connect: Connect) -> trio.SocketStream:
    stream = await connect()
    await stream.send_all(request("/events"))
    return stream


async def read_events(stream: trio.SocketStream) -> list[tuple[str, Any]]:
    """Names and contents of what has come by now."""
    text = ""
    while True:
        with trio.move_on_after(1e-6) as scope:
            text += (await stream.receive_some(2**20)).decode()
        if scope.cancelled_caught:
            break
    text = re.sub(r"\r\n[0-9a-f]+\r\n", "", text.replace("\r\n\r\n", "\r\n\r\n\r\n"))
    return [
        (name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    ]


async def until_said(stream: trio.SocketStream) -> None:
    """Read what has come by now."""
    with trio.move_on_after(1e-6):
        while True:
            await stream.receive_some(2**20)


@pytest.fixture
def errors() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(
        lambda line: lines.append(str(line).splitlines()[0]), level="WARNING", format="{message}"
    )
    yield lines
    logger.remove(number)


# --- what is computed -----------------------------------------------------------------------


async def test_however_many_ask_a_page_is_computed_ten_times_a_second_at_most(
    autojump_clock: MockClock,
) -> None:
    computed: list[str] = []

    def exposition(_observed: Observed, accept: str) -> tuple[bytes, str]:
        computed.append(accept)
        return b"up 1\n", "text/plain"

    worker = FakeWorker()
    async with serving(worker, exposition) as connect:
        await trio.sleep(0.5)
        before = worker.snapshots
        for _ in range(40):
            assert (await get(connect, "/stats"))[0] == 200
            for accept in ("text/plain", "application/openmetrics-text"):
                assert (await get(connect, "/metrics", accept=accept))[0] == 200
            await trio.sleep(0.01)
        assert worker.snapshots - before == 4
        assert sorted(computed) == ["application/openmetrics-text"] * 4 + ["text/plain"] * 4


async def test_a_page_that_failed_is_computed_again(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    worker = FakeWorker()
    async with serving(worker) as connect:
        worker.stats = ValueError("broken")
        status, _, body = await get(connect, "/stats")
        assert (status, body) == (500, "this page failed; the worker's log says how\n")
        worker.stats = SNAPSHOT
        assert (await get(connect, "/stats"))[0] == 200
    assert errors == ["the page /stats failed"]


async def test_what_streams_carry_is_computed_once_a_second_for_all_and_for_nobody_not_at_all(
    autojump_clock: MockClock,
) -> None:
    worker = FakeWorker()
    asked: list[float] = []

    def in_flight(_limit: int | None = None) -> list[InFlightReading]:
        asked.append(trio.current_time())
        return []

    worker.in_flight = in_flight  # type: ignore[method-assign, assignment]
    async with serving(worker) as connect:
        await trio.sleep(3.5)
        assert (worker.snapshots, asked) == (4, []), "the history only"
        streams = [await open_stream(connect) for _ in range(3)]
        await trio.sleep(2)
        # The first stream of all begins with how things are now; until then nobody had asked.
        assert asked == [3.5] * 3 + [4, 5]
        assert worker.snapshots == 4 + 3 + 2
        for stream in streams:
            await stream.aclose()
        await trio.sleep(1)
        asked.clear()
        await trio.sleep(3)
        assert asked == []


async def test_a_stream_tells_the_history_at_once_and_how_things_are_each_second(
    autojump_clock: MockClock,
) -> None:
    async with serving(FakeWorker()) as connect:
        await trio.sleep(200.5)
        stream = await open_stream(connect)
        (first, history), (second, state) = await read_events(stream)
        assert (first, second) == ("history", "state")
        assert history["now"] == 200.5
        assert [each["at"] for each in history["samples"]] == list(range(21, 201))
        sample = {
            "tokens_per_second": 12.5,
            "running": 2,
            "depth": 3,
            "first_p50": None,
            "first_p95": None,
            "gap_p50": None,
            "gap_p95": None,
            "memory_mb": SNAPSHOT.resources.memory_mb,
        }
        assert history["samples"][-1] == sample | {"at": 200}
        assert state["sample"] == sample | {"at": 200.5}
        for second_ in range(201, 206):
            await trio.sleep(1)
            assert [(name, each["now"]) for name, each in await read_events(stream)] == [
                ("state", second_)
            ]
        await stream.aclose()


async def test_sampling_that_fails_is_said_once_each_time_it_begins_to(
    autojump_clock: MockClock, errors: list[str]
) -> None:
    worker = FakeWorker()
    async with serving(worker) as connect:
        await trio.sleep(0.5)
        for _ in range(2):
            worker.stats = ValueError("broken")
            await trio.sleep(5)
            worker.stats = SNAPSHOT
            await trio.sleep(5)
        stream = await open_stream(connect)
        (_, history), _ = await read_events(stream)
        assert [each["at"] for each in history["samples"]] == [0, *range(6, 11), *range(16, 21)]
        await stream.aclose()
    assert errors == ["sampling for the dashboard failed"] * 2


# --- bounds ---------------------------------------------------------------------------------


async def test_a_connection_that_polls_is_cut_after_its_minute(autojump_clock: MockClock) -> None:
    async with serving(FakeWorker()) as connect, await connect() as stream:
        began = trio.current_time()

        async def poll() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(request("/livez"))
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            assert await until_cut(stream) - began == 60
            nursery.cancel_scope.cancel()


async def test_a_thirty_third_connection_is_closed_at_once(autojump_clock: MockClock) -> None:
    async with serving(FakeWorker()) as connect:
        held = [await connect() for _ in range(32)]
        async with await connect() as one_more:
            began = trio.current_time()
            assert await until_cut(one_more) == began
        for stream in held:
            await stream.send_all(request("/livez"))
            assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 200")
        await until_said(held[0])
        await held[0].aclose()
        await trio.sleep(0.51)
        assert (await get(connect, "/livez"))[0] == 200
        for stream in held:
            await stream.aclose()


async def test_a_client_that_breaks_off_leaves_its_place_at_once(
    autojump_clock: MockClock,
) -> None:
    with mock.patch.object(http_server, "CONNECTIONS_MAX", 1):
        async with serving(FakeWorker()) as connect:
            for _ in range(3):
                async with await connect() as stream:
                    await stream.send_all(request("/livez"))
                    assert await stream.receive_some(1)
                # The rest of the answer is unread: the other side is told of a reset.
                await trio.sleep(0.01)
            assert (await get(connect, "/livez"))[0] == 200


async def test_a_ninth_stream_is_refused_and_the_pages_stay(autojump_clock: MockClock) -> None:
    async with serving(FakeWorker()) as connect:
        streams = [await open_stream(connect) for _ in range(8)]
        await trio.sleep(0.1)
        status, _, body = await get(connect, "/events")
        assert (status, body) == (503, "too many streams are open\n")
        assert (await get(connect, "/livez"))[0] == 200
        await streams.pop().aclose()
        await trio.sleep(1)
        streams.append(await open_stream(connect))
        assert (await streams[-1].receive_some(100)).startswith(b"HTTP/1.1 200")
        for stream in streams:
            await stream.aclose()


async def test_asking_for_the_head_of_a_stream_opens_none(autojump_clock: MockClock) -> None:
    async with serving(FakeWorker()) as connect:
        for _ in range(20):
            status, headers, body = await get(connect, "/events", "HEAD")
            assert (status, body) == (200, "")
            assert headers["content-type"].startswith("text/event-stream")
            assert headers["x-accel-buffering"] == "no"
            assert headers["cache-control"] == "no-store"
            assert "content-length" not in headers
        assert trio.current_time() == 0


async def test_a_client_that_does_not_read_is_cut_after_five_seconds(
    autojump_clock: MockClock,
) -> None:
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 5
    with mock.patch.object(http_server, "CONNECTIONS_MAX", 1):
        async with serving(worker) as connect, await connect() as stuck:
            await stuck.send_all(request("/stats"))
            await trio.sleep(4.9)
            async with await connect() as one_more:
                assert await until_cut(one_more) == 4.9, "the place is taken"
            await trio.sleep(0.2)
            assert (await get(connect, "/livez"))[0] == 200


async def test_a_client_that_has_closed_its_side_gets_its_answer_and_is_gone_soon(
    autojump_clock: MockClock,
) -> None:
    async with serving(FakeWorker()) as connect, await connect() as stream:
        await stream.send_all(request("/livez"))
        await stream.send_eof()
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
        assert await until_cut(stream) <= 0.5


async def test_a_stop_waits_for_nobody(autojump_clock: MockClock) -> None:
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 5
    async with serving(worker) as connect:
        stuck, stream, idle = await connect(), await open_stream(connect), await connect()
        await stuck.send_all(request("/stats"))
        await trio.sleep(1)
        stopped_at = trio.current_time()
    for each in (stream, idle):
        assert await until_cut(each) == stopped_at
        await each.aclose()
    await stuck.aclose()


# --- what is answered -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/stats", "/metrics", "/"])
async def test_nothing_that_changes_is_kept_or_guessed_at(
    autojump_clock: MockClock, path: str
) -> None:
    async with serving(FakeWorker()) as connect:
        status, headers, _ = await get(connect, path)
    assert status == 200
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    json_pages = {"/healthz", "/stats", "/"}
    assert (headers["content-type"] == "application/json") == (path in json_pages)
    assert (headers.get("vary") == "accept") == (path in json_pages)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dashboard.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("index.html", "text/html; charset=utf-8"),
    ],
)
async def test_the_pages_parts_have_their_type_and_may_do_nothing_elsewhere(
    autojump_clock: MockClock, name: str, kind: str
) -> None:
    async with serving(FakeWorker()) as connect:
        status, headers, body = await get(connect, f"/page/{name}")
    assert (status, headers["content-type"]) == (200, kind)
    assert body
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["vary"] == "accept"
    policy = headers["content-security-policy"].split("; ")
    assert policy == [
        "default-src 'none'",
        *(f"{each}-src 'self'" for each in ("script", "style", "img", "connect")),
        *(f"{each} 'none'" for each in ("base-uri", "form-action", "frame-ancestors")),
    ]


async def test_what_is_no_page_is_said_to_be_none(autojump_clock: MockClock) -> None:
    async with serving(FakeWorker()) as connect:
        status, _, body = await get(connect, "/page/other.js")
        assert (status, body) == (404, "there is no such page\n")
