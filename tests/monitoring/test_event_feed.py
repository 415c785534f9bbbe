"""The dashboard's stream of events: over loopback, and on the mock clock."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from support import http_loopback as loopback
from support import http_virtual as virtual
from support.log_records import logged, texts
from support.observed import SNAPSHOT, FakeWorker
from trio.testing import MockClock

from trio_worker.monitoring import event_feed
from trio_worker.monitoring.observed import Health
from trio_worker.monitoring.snapshot import InFlightReading


async def test_a_stream_begins_with_the_history_and_tells_how_things_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_feed, "SAMPLE_S", 0.02)
    worker = FakeWorker()
    async with (
        loopback.serving(worker) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        await stream.send_all(loopback.request("GET", "/events", "text/event-stream"))
        (first, history), (second, state) = (await loopback.read_events(stream, 2))[:2]
        worker.ready = Health(ok=False, reason="queue: full")
        while state["ready"]["ok"]:
            _, state = (await loopback.read_events(stream, 1))[-1]
    assert (first, second) == ("history", "state")
    assert history["samples"][-1]["tokens_per_second"] == 12.5
    assert state["ready"] == {"ok": False, "reason": "queue: full"}
    assert state["snapshot"]["requests"]["completed"] == 7
    assert len(state["in_flight"]) == event_feed.IN_FLIGHT_SHOWN
    assert state["in_flight"][0]["request_id"] == "r1"


async def test_streams_are_few_and_their_places_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "SAMPLE_S", 0.02)
    monkeypatch.setattr(event_feed, "STREAMS_MAX", 1)
    async with loopback.serving(FakeWorker()) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(loopback.request("GET", "/events", "*/*"))
            await loopback.read_events(stream, 1)
            assert (await loopback.get(port, "/events"))[0] == 503
            assert (await loopback.get(port, "/livez"))[0] == 200
        with trio.fail_after(5):
            while await loopback.status_of_a_stream(port) == 503:  # noqa: ASYNC110 - in another task's time
                await trio.sleep(0.01)


async def test_a_stream_ends_by_itself_and_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "STREAM_S", 0.05)
    async with loopback.serving(FakeWorker()) as port:
        status, body = await loopback.get(port, "/events")
        assert status == 200
        assert body.endswith("0\r\n\r\n")
        monkeypatch.setattr(event_feed, "STREAM_S", 60)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(loopback.request("GET", "/events", "*/*"))
        await loopback.read_events(stream, 1)
    with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(65536):
            pass
    await stream.aclose()


async def test_a_stream_lives_as_long_as_it_means_to_though_its_client_says_nothing(
    mock_clock: trio.testing.MockClock,
) -> None:
    # Sockets are none of the clock's business: give what is under way a moment to arrive.
    mock_clock.autojump_threshold = 0.02
    async with (
        loopback.serving(FakeWorker()) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as s,
    ):
        began = trio.current_time()
        await s.send_all(loopback.request("GET", "/events", "*/*"))
        answer = b"".join([chunk async for chunk in s])
        lived_s = trio.current_time() - began
    assert lived_s == pytest.approx(event_feed.STREAM_S, abs=1)
    assert answer.endswith(b"0\r\n\r\n"), "it was cut, and did not end"
    assert answer.count(b"event: state") >= event_feed.STREAM_S / event_feed.SAMPLE_S - 1


async def test_sampling_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "SAMPLE_S", 0.01)
    worker = FakeWorker()
    worker.stats = ValueError("broken")
    async with loopback.serving(worker) as port:
        while worker.snapshots < 3:
            assert (await loopback.get(port, "/livez"))[0] == 200
        worker.stats = SNAPSHOT
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(loopback.request("GET", "/events", "*/*"))
            assert (await loopback.read_events(stream, 1))[0][0] == "history"


async def test_what_streams_carry_is_computed_once_a_second_for_all_and_for_nobody_not_at_all(
    autojump_clock: MockClock,
) -> None:
    worker = FakeWorker()
    asked: list[float] = []

    def in_flight(_limit: int | None = None) -> list[InFlightReading]:
        asked.append(trio.current_time())
        return []

    worker.in_flight = in_flight  # type: ignore[method-assign, assignment]
    async with virtual.serving(worker) as connect:
        await trio.sleep(3.5)
        assert (worker.snapshots, asked) == (4, []), "the history only"
        streams = [await virtual.open_stream(connect) for _ in range(3)]
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
    async with virtual.serving(FakeWorker()) as connect:
        await trio.sleep(200.5)
        stream = await virtual.open_stream(connect)
        (first, history), (second, state) = await virtual.read_events(stream)
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
            assert [(name, each["now"]) for name, each in await virtual.read_events(stream)] == [
                ("state", second_)
            ]
        await stream.aclose()


async def test_sampling_that_fails_is_said_once_each_time_it_begins_to(
    autojump_clock: MockClock,
) -> None:
    worker = FakeWorker()
    with logged("WARNING") as errors:
        async with virtual.serving(worker) as connect:
            await trio.sleep(0.5)
            for _ in range(2):
                worker.stats = ValueError("broken")
                await trio.sleep(5)
                worker.stats = SNAPSHOT
                await trio.sleep(5)
            stream = await virtual.open_stream(connect)
            (_, history), _ = await virtual.read_events(stream)
            assert [each["at"] for each in history["samples"]] == [0, *range(6, 11), *range(16, 21)]
            await stream.aclose()
    assert texts(errors) == ["sampling for the dashboard failed"] * 2


async def test_a_ninth_stream_is_refused_and_the_pages_stay(autojump_clock: MockClock) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        streams = [await virtual.open_stream(connect) for _ in range(8)]
        await trio.sleep(0.1)
        status, _, body = await virtual.get(connect, "/events")
        assert (status, body) == (503, "too many streams are open\n")
        assert (await virtual.get(connect, "/livez"))[0] == 200
        await streams.pop().aclose()
        await trio.sleep(1)
        streams.append(await virtual.open_stream(connect))
        assert (await streams[-1].receive_some(100)).startswith(b"HTTP/1.1 200")
        for stream in streams:
            await stream.aclose()


async def test_asking_for_the_head_of_a_stream_opens_none(autojump_clock: MockClock) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        for _ in range(20):
            status, headers, body = await virtual.get(connect, "/events", "HEAD")
            assert (status, body) == (200, "")
            assert headers["content-type"].startswith("text/event-stream")
            assert headers["x-accel-buffering"] == "no"
            assert headers["cache-control"] == "no-store"
            assert "content-length" not in headers
        assert trio.current_time() == 0
