"""The monitoring pages over a real loopback connection."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio
import trio_asyncio

from trio_worker.adapters import http_server
from trio_worker.adapters.http_server import serve_http
from trio_worker.errors import ConfigError
from trio_worker.ports import Health


@dataclass(frozen=True)
class Snapshot:
    depth: int = 3
    by_priority: dict[str, int] = field(default_factory=lambda: {"high": 1})


class FakeWorker:
    def __init__(self) -> None:
        self.live = Health(ok=True, reason="every loop makes progress")
        self.ready = Health(ok=True, reason="accepting requests")
        self.stats: object = Snapshot()

    def liveness(self) -> Health:
        return self.live

    def readiness(self) -> Health:
        return self.ready

    def snapshot(self) -> object:
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats


@contextlib.asynccontextmanager
async def serving(worker: FakeWorker) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(5):
            port = await nursery.start(
                lambda task_status: serve_http(
                    host="127.0.0.1", port=0, observed=worker, task_status=task_status
                )
            )
        yield port
        nursery.cancel_scope.cancel()


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    with trio.fail_after(5):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(
                f"{method} {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join([chunk async for chunk in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


async def test_probes_answer_with_their_reason() -> None:
    worker = FakeWorker()
    async with serving(worker) as port:
        assert await get(port, "/livez") == (200, "every loop makes progress\n")
        assert await get(port, "/readyz") == (200, "accepting requests\n")
        worker.ready = Health(ok=False, reason="the model is loading")
        assert await get(port, "/readyz") == (503, "the model is loading\n")
        assert (await get(port, "/livez"))[0] == 200
        status, body = await get(port, "/healthz")
        assert status == 503
        assert json.loads(body) == {
            "live": {"ok": True, "reason": "every loop makes progress"},
            "ready": {"ok": False, "reason": "the model is loading"},
        }


async def test_the_snapshot_is_json() -> None:
    async with serving(FakeWorker()) as port:
        status, body = await get(port, "/stats")
    assert (status, json.loads(body)) == (200, {"depth": 3, "by_priority": {"high": 1}})


async def test_the_index_names_pages_that_exist() -> None:
    async with serving(FakeWorker()) as port:
        status, body = await get(port, "/")
        assert status == 200
        for path in json.loads(body):
            assert (await get(port, path))[0] == 200


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
            await serve_http(host="127.0.0.1", port=port, observed=FakeWorker())


@pytest.mark.parametrize("host", ["192.0.2.1", "host name", "x" * 70])
async def test_an_address_that_is_not_ours_is_a_configuration_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"monitoring\.host"):
        await serve_http(host=host, port=0, observed=FakeWorker())


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
