"""The monitoring pages over a real loopback connection."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
import trio_asyncio
from support.observed import SNAPSHOT, FakeWorker, fake_exposition

from trio_worker.errors import ConfigError
from trio_worker.monitoring import http_server
from trio_worker.monitoring.http_server import serve_http
from trio_worker.monitoring.observed import Health

MEMORY_LINE = (
    "memory pressure soft: 9100 MB in use, limits 8192 and 10240 MB; "
    "steps in force: trim_caches, hold_low"
)


@contextlib.asynccontextmanager
async def serving(worker: FakeWorker) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(5):
            port = await nursery.start(
                lambda task_status: serve_http(
                    host="127.0.0.1",
                    port=0,
                    observed=worker,
                    exposition=fake_exposition,
                    task_status=task_status,
                )
            )
        yield port
        nursery.cancel_scope.cancel()


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    head, body = await ask(port, path, method)
    return int(head.split()[1]), body


async def ask(port: int, path: str, method: str = "GET", accept: str = "*/*") -> tuple[str, str]:
    """The head and the body of an answer."""
    with trio.fail_after(5):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(_request(method, path, accept))
            answer = b"".join([chunk async for chunk in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode().lower(), body.decode()


def _request(method: str, path: str, accept: str) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: worker\r\nAccept: {accept}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode()


async def test_probes_answer_with_their_reason() -> None:
    worker = FakeWorker()
    async with serving(worker) as port:
        assert await get(port, "/livez") == (200, "every loop makes progress\n")
        assert await get(port, "/readyz") == (200, f"accepting requests\n{MEMORY_LINE}\n")
        worker.ready = Health(ok=False, reason="the model is loading")
        assert await get(port, "/readyz") == (503, f"the model is loading\n{MEMORY_LINE}\n")
        assert (await get(port, "/livez"))[0] == 200
        status, body = await get(port, "/healthz")
        assert status == 503
        assert json.loads(body) == {
            "live": {"ok": True, "reason": "every loop makes progress"},
            "ready": {"ok": False, "reason": "the model is loading"},
            "resources": json.loads(msgspec.json.encode(SNAPSHOT.resources)),
        }


async def test_the_snapshot_is_json() -> None:
    async with serving(FakeWorker()) as port:
        status, body = await get(port, "/stats")
    assert status == 200
    assert json.loads(body)["queue"]["by_priority"] == {"high": 3, "low": 0}


async def test_the_index_names_pages_that_exist() -> None:
    async with serving(FakeWorker()) as port:
        status, body = await get(port, "/")
        assert status == 200
        for path in json.loads(body):
            assert (await get(port, path, "HEAD"))[0] == 200


async def test_a_browser_gets_the_dashboard_which_may_ask_nobody_else_for_anything() -> None:
    async with serving(FakeWorker()) as port:
        head, body = await ask(port, "/", accept="text/html,application/xhtml+xml,*/*;q=0.8")
        assert "content-type: text/html" in head
        assert "content-security-policy: default-src 'none'; script-src 'self'" in head
        assert "http://" not in body
        assert "https://" not in body
        parts = re.findall(r'(?:src|href)="(page/[^"]+)"', body)
        assert len(parts) == 5
        for part in parts:
            assert (await get(port, f"/{part}"))[0] == 200
        assert (await get(port, "/page/uplot-LICENSE"))[0] == 404
        assert (await get(port, "/page/..%2fhttp_server.py"))[0] == 404


async def test_metrics_are_given_as_asked_for() -> None:
    async with serving(FakeWorker()) as port:
        head, body = await ask(port, "/metrics")
        assert "content-type: text/plain\r\n" in head
        assert body == "up 1\n"
        head, _ = await ask(port, "/metrics", accept="application/openmetrics-text")
        assert "content-type: application/openmetrics-text\r\n" in head


async def test_asking_in_a_loop_does_not_compute_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "FRESH_S", 60)
    monkeypatch.setattr(http_server, "SAMPLE_S", 60)
    worker = FakeWorker()
    async with serving(worker) as port:
        before = worker.snapshots
        for _ in range(5):
            assert (await get(port, "/stats"))[0] == 200
    assert worker.snapshots == before + 1


async def read_events(stream: trio.SocketStream, count: int) -> list[tuple[str, Any]]:
    """Names and contents of the next events of a response that is being streamed."""
    text = ""
    with trio.fail_after(5):
        while text.count("\n\n") < count:
            text += (await stream.receive_some(65536)).decode().replace("\r\n", "")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    return [(name, json.loads(data)) for name, data in events]


async def test_a_stream_begins_with_the_history_and_tells_how_things_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "SAMPLE_S", 0.02)
    worker = FakeWorker()
    async with serving(worker) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(_request("GET", "/events", "text/event-stream"))
        (first, history), (second, state) = (await read_events(stream, 2))[:2]
        worker.ready = Health(ok=False, reason="queue: full")
        while state["ready"]["ok"]:
            _, state = (await read_events(stream, 1))[-1]
    assert (first, second) == ("history", "state")
    assert history["samples"][-1]["tokens_per_second"] == 12.5
    assert state["ready"] == {"ok": False, "reason": "queue: full"}
    assert state["snapshot"]["requests"]["completed"] == 7
    assert len(state["in_flight"]) == http_server.IN_FLIGHT_SHOWN
    assert state["in_flight"][0]["request_id"] == "r1"


async def status_of_a_stream(port: int) -> int:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(_request("GET", "/events", "*/*"))
        return int((await stream.receive_some(100)).split()[1])


async def test_streams_are_few_and_their_places_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SAMPLE_S", 0.02)
    monkeypatch.setattr(http_server, "STREAMS_MAX", 1)
    async with serving(FakeWorker()) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(_request("GET", "/events", "*/*"))
            await read_events(stream, 1)
            assert (await get(port, "/events"))[0] == 503
            assert (await get(port, "/livez"))[0] == 200
        with trio.fail_after(5):
            while await status_of_a_stream(port) == 503:  # noqa: ASYNC110 - in another task's time
                await trio.sleep(0.01)


async def test_a_stream_ends_by_itself_and_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "STREAM_S", 0.05)
    async with serving(FakeWorker()) as port:
        status, body = await get(port, "/events")
        assert status == 200
        assert body.endswith("0\r\n\r\n")
        monkeypatch.setattr(http_server, "STREAM_S", 60)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(_request("GET", "/events", "*/*"))
        await read_events(stream, 1)
    with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(65536):
            pass
    await stream.aclose()


async def test_a_stream_lives_as_long_as_it_means_to_though_its_client_says_nothing(
    mock_clock: trio.testing.MockClock,
) -> None:
    # Sockets are none of the clock's business: give what is under way a moment to arrive.
    mock_clock.autojump_threshold = 0.02
    async with serving(FakeWorker()) as port, await trio.open_tcp_stream("127.0.0.1", port) as s:
        began = trio.current_time()
        await s.send_all(_request("GET", "/events", "*/*"))
        answer = b"".join([chunk async for chunk in s])
        lived_s = trio.current_time() - began
    assert lived_s == pytest.approx(http_server.STREAM_S, abs=1)
    assert answer.endswith(b"0\r\n\r\n"), "it was cut, and did not end"
    assert answer.count(b"event: state") >= http_server.STREAM_S / http_server.SAMPLE_S - 1


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
    async with serving(FakeWorker()) as port, await trio.open_tcp_stream("127.0.0.1", port) as s:
        began = trio.current_time()
        await s.send_all(part)
        async for _ in s:
            pass
        assert trio.current_time() - began < http_server.IDLE_S + 1


async def test_a_stream_that_is_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SEND_S", 0.02)
    monkeypatch.setattr(http_server, "SAMPLE_S", 0.005)
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 1)
    worker = FakeWorker()
    async with serving(worker) as port, await trio.open_tcp_stream("127.0.0.1", port) as stuck:
        await stuck.send_all(_request("GET", "/events", "*/*"))
        assert await stuck.receive_some(1)
        assert await get_when_free(port, "/livez") == 200


async def test_sampling_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SAMPLE_S", 0.01)
    worker = FakeWorker()
    worker.stats = ValueError("broken")
    async with serving(worker) as port:
        while worker.snapshots < 3:
            assert (await get(port, "/livez"))[0] == 200
        worker.stats = SNAPSHOT
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(_request("GET", "/events", "*/*"))
            assert (await read_events(stream, 1))[0][0] == "history"


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/nothing", "GET", 404), ("/stats", "POST", 405)]
)
async def test_what_does_not_exist_is_refused(path: str, method: str, status: int) -> None:
    async with serving(FakeWorker()) as port:
        assert (await get(port, path, method))[0] == status


async def test_a_failing_page_answers_500_and_the_others_go_on() -> None:
    """A fault in what is shown must not stop what it shows."""
    worker = FakeWorker()
    worker.stats = ValueError("broken")
    async with serving(worker) as port:
        assert (await get(port, "/stats"))[0] == 500
        assert (await get(port, "/livez"))[0] == 200


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
    async with serving(FakeWorker()) as port:
        assert (await get(port, "/livez"))[0] == 200
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_a_client_that_does_not_read_cannot_hold_up_the_stop() -> None:
    """hypercorn shields its sends; without our bound the worker would never end."""
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 20
    with trio.fail_after(3):
        async with serving(worker) as port, await trio.open_tcp_stream("127.0.0.1", port) as stuck:
            await stuck.send_all(b"GET /stats HTTP/1.1\r\nHost: worker\r\n\r\n")
            assert await stuck.receive_some(1)
            assert (await get(port, "/livez"))[0] == 200


async def test_a_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SEND_S", 0.02)
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 1)
    worker = FakeWorker()
    worker.stats = ["x" * 1_000_000] * 20
    async with serving(worker) as port, await trio.open_tcp_stream("127.0.0.1", port) as stuck:
        await stuck.send_all(b"GET /stats HTTP/1.1\r\nHost: worker\r\n\r\n")
        assert await stuck.receive_some(1)
        assert await get_when_free(port, "/livez") == 200


async def test_idle_connections_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(http_server, "CLOSING_S", 0.01)
    async with (
        serving(FakeWorker()) as port,
        await trio.open_tcp_stream("127.0.0.1", port),
        await trio.open_tcp_stream("127.0.0.1", port) as idle,
        await trio.open_tcp_stream("127.0.0.1", port) as refused,
    ):
        with trio.fail_after(5):
            assert await refused.receive_some(1) == b""
        await idle.aclose()
        assert await get_when_free(port, "/livez") == 200


async def get_when_free(port: int, path: str) -> int:
    """Ask until a connection is not refused any more."""
    with trio.fail_after(5):
        while True:
            with contextlib.suppress(IndexError, trio.BrokenResourceError):
                return (await get(port, path))[0]


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
    async with serving(FakeWorker()) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(garbage)
                await stream.send_eof()
                with trio.fail_after(5):
                    await stream.receive_some(100)
        assert (await get(port, "/livez"))[0] == 200


async def test_it_serves_inside_a_trio_asyncio_loop() -> None:
    async with trio_asyncio.open_loop(), serving(FakeWorker()) as port:
        assert (await get(port, "/livez"))[0] == 200
