"""Who may connect to the monitoring pages, and how long: over loopback, and on the mock clock."""

from __future__ import annotations

import contextlib
import socket
from contextlib import suppress
from dataclasses import replace
from unittest import mock

import pytest
import trio
import trio.testing
import trio_asyncio
from support import http_loopback as loopback
from support import http_virtual as virtual
from support.observed import FakeWorker, fake_exposition
from trio.testing import MockClock

from trio_worker.errors import ConfigError
from trio_worker.monitoring import event_feed, http_server
from trio_worker.monitoring.http_server import LIMITS, serve_http


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(b"POST /livez HTTP/1.1\r\nHost: w\r\nContent-Length: 9\r\n\r\n", id="body"),
        pytest.param(b"GET /livez HTT", id="head"),
    ],
)
async def test_a_client_that_falls_silent_in_the_middle_of_a_request_is_cut(
    mock_clock: trio.testing.MockClock, part: bytes
) -> None:
    mock_clock.autojump_threshold = 0.02
    async with (
        loopback.serving(FakeWorker()) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as s,
    ):
        began = trio.current_time()
        await s.send_all(part)
        async for _ in s:
            pass
        assert trio.current_time() - began < http_server.LIMITS.head_s + 1


async def test_a_stream_that_is_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LIMITS", replace(LIMITS, send_s=0.02, connections=1))
    monkeypatch.setattr(event_feed, "SAMPLE_S", 0.005)
    worker = FakeWorker()
    # Events of some hundred kilobytes: few of them fill what the system keeps for a connection.
    crowd = worker.in_flight() * 20
    monkeypatch.setattr(worker, "in_flight", lambda _limit: crowd)
    async with (
        loopback.serving(worker) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stuck,
    ):
        await stuck.send_all(loopback.request("GET", "/events", "*/*"))
        assert await stuck.receive_some(1)
        assert await loopback.get_when_free(port, "/livez") == 200


async def test_a_taken_port_is_a_configuration_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"monitoring\.port: {port} is taken on 127\.0\.0\.1"
        ):
            await serve_http(
                host="127.0.0.1", port=port, observed=FakeWorker(), exposition=fake_exposition
            )


@pytest.mark.parametrize("host", ["192.0.2.1", "host name", "x" * 70])
async def test_an_address_that_is_not_ours_is_a_configuration_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"monitoring\.host"):
        await serve_http(host=host, port=0, observed=FakeWorker(), exposition=fake_exposition)


async def test_the_port_is_free_again_after_the_end() -> None:
    async with loopback.serving(FakeWorker()) as port:
        assert (await loopback.get(port, "/livez"))[0] == 200
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_a_client_that_does_not_read_cannot_hold_up_the_stop() -> None:
    """A send that is shielded, or awaited without a bound, would keep the worker for ever."""
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 20
    with trio.fail_after(3):
        async with (
            loopback.serving(worker) as port,
            await trio.open_tcp_stream("127.0.0.1", port) as stuck,
        ):
            await stuck.send_all(b"GET /stats HTTP/1.1\r\nHost: worker\r\n\r\n")
            assert await stuck.receive_some(1)
            assert (await loopback.get(port, "/livez"))[0] == 200


async def test_a_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LIMITS", replace(LIMITS, send_s=0.02, connections=1))
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 20
    async with (
        loopback.serving(worker) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stuck,
    ):
        await stuck.send_all(b"GET /stats HTTP/1.1\r\nHost: worker\r\n\r\n")
        assert await stuck.receive_some(1)
        assert await loopback.get_when_free(port, "/livez") == 200


async def test_idle_connections_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LIMITS", replace(LIMITS, connections=2, half_closed_s=0.01))
    async with (
        loopback.serving(FakeWorker()) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as idle,
        await trio.open_tcp_stream("127.0.0.1", port) as busy,
    ):
        await busy.send_all(loopback.request("GET", "/events", "*/*"))
        assert await busy.receive_some(1)
        assert (await loopback.get(port, "/livez"))[0] == 200
        with trio.fail_after(5):
            assert await idle.receive_some(1) == b"", "it has made room"


async def test_busy_connections_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LIMITS", replace(LIMITS, connections=2, half_closed_s=0.01))
    async with (
        loopback.serving(FakeWorker()) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as busy,
        await trio.open_tcp_stream("127.0.0.1", port) as leaving,
    ):
        with trio.fail_after(5):
            for stream in (busy, leaving):
                await stream.send_all(loopback.request("GET", "/events", "*/*"))
                assert await stream.receive_some(1)
            async with await trio.open_tcp_stream("127.0.0.1", port) as refused:
                assert (await refused.receive_some(1000)).startswith(b"HTTP/1.1 503")
                assert await refused.receive_some(1) == b""
        await leaving.aclose()
        assert await loopback.get_when_free(port, "/livez") == 200


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(b"GET /" + b"x" * 100_000, id="endless line"),
        pytest.param(b"\x16\x03\x01\x02\x00", id="tls"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxxxxxxxxxxx", id="http 2"),
    ],
)
async def test_what_is_not_http_disturbs_nobody(garbage: bytes) -> None:
    async with loopback.serving(FakeWorker()) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(garbage)
                await stream.send_eof()
                with trio.fail_after(5):
                    await stream.receive_some(100)
        assert (await loopback.get(port, "/livez"))[0] == 200


async def test_it_serves_inside_a_trio_asyncio_loop() -> None:
    async with trio_asyncio.open_loop(), loopback.serving(FakeWorker()) as port:
        assert (await loopback.get(port, "/livez"))[0] == 200


async def test_a_connection_that_polls_is_cut_after_its_minute(autojump_clock: MockClock) -> None:
    async with virtual.serving(FakeWorker()) as connect, await connect() as stream:
        began = trio.current_time()

        async def poll() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(virtual.request("/livez"))
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            assert await virtual.until_cut(stream) - began == 60
            nursery.cancel_scope.cancel()


async def test_a_thirty_third_connection_is_closed_at_once(autojump_clock: MockClock) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        held = [await connect() for _ in range(32)]
        asked = virtual.request("/livez")
        for stream in held:
            # None is idle, so none makes room.
            await stream.send_all(asked[:9])
        async with await connect() as one_more:
            began = trio.current_time()
            assert await virtual.until_cut(one_more) == began
        for stream in held:
            await stream.send_all(asked[9:])
            assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 200")
        await virtual.until_said(held[0])
        await held[0].aclose()
        await trio.sleep(0.51)
        assert (await virtual.get(connect, "/livez"))[0] == 200
        for stream in held:
            await stream.aclose()


async def test_a_client_that_breaks_off_leaves_its_place_at_once(
    autojump_clock: MockClock,
) -> None:
    with mock.patch.object(http_server, "LIMITS", replace(LIMITS, connections=1)):
        async with virtual.serving(FakeWorker()) as connect:
            for _ in range(3):
                async with await connect() as stream:
                    await stream.send_all(virtual.request("/livez"))
                    assert await stream.receive_some(1)
                # The rest of the answer is unread: the other side is told of a reset.
                await trio.sleep(0.01)
            assert (await virtual.get(connect, "/livez"))[0] == 200


async def test_a_client_that_does_not_read_is_cut_after_five_seconds(
    autojump_clock: MockClock,
) -> None:
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 5
    with mock.patch.object(http_server, "LIMITS", replace(LIMITS, connections=1)):
        async with virtual.serving(worker) as connect, await connect() as stuck:
            await stuck.send_all(virtual.request("/stats"))
            await trio.sleep(4.9)
            async with await connect() as one_more:
                assert await virtual.until_cut(one_more) == 4.9, "the place is taken"
            await trio.sleep(0.2)
            assert (await virtual.get(connect, "/livez"))[0] == 200


async def test_a_client_that_has_closed_its_side_gets_its_answer_and_is_gone_soon(
    autojump_clock: MockClock,
) -> None:
    async with virtual.serving(FakeWorker()) as connect, await connect() as stream:
        await stream.send_all(virtual.request("/livez"))
        await stream.send_eof()
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
        assert await virtual.until_cut(stream) <= 0.5


async def test_a_stop_waits_for_nobody(autojump_clock: MockClock) -> None:
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 5
    async with virtual.serving(worker) as connect:
        stuck, stream, idle = await connect(), await virtual.open_stream(connect), await connect()
        await stuck.send_all(virtual.request("/stats"))
        await trio.sleep(1)
        stopped_at = trio.current_time()
    for each in (stream, idle):
        assert await virtual.until_cut(each) == stopped_at
        await each.aclose()
    await stuck.aclose()
