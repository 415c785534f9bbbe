"""What systemd is told: the datagrams, and those of a real process."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from support.commands import command, running_command, until

from trio_worker.machine.service_manager import open_service_manager
from trio_worker.ports import Notice

SIMULATED = ("--engine", "simulated")


class Socket:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.variable = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def received(self) -> list[list[str]]:
        """The lines of each datagram that has come since the last call."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            found.append(self._socket.recv(65_536).decode().splitlines())
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(name="manager", params=["path", "abstract"])
def manager_fixture(request: pytest.FixtureRequest) -> Iterator[Socket]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract names are Linux's")
    # A folder of its own: the address of a socket is at most 103 bytes long.
    with tempfile.TemporaryDirectory(prefix="notify-", dir="/tmp") as folder:
        path = f"{folder}/socket"
        end = Socket(f"@{path}" if request.param == "abstract" else path)
        yield end
        end.close()


# --- the socket -----------------------------------------------------------------------------


def test_what_is_said_arrives_in_the_words_of_sd_notify(manager: Socket) -> None:
    with open_service_manager({"NOTIFY_SOCKET": manager.variable}) as sent:
        sent.notify(Notice(ready=True, alive=True, status="ready"))
        sent.notify(Notice(stopping=True, extend_timeout_s=1.5))
        sent.notify(Notice())
    assert manager.received() == [
        ["READY=1", "WATCHDOG=1", "STATUS=ready"],
        ["STOPPING=1", "EXTEND_TIMEOUT_USEC=1500000"],
    ]


def test_a_status_is_one_line_of_bounded_length(manager: Socket) -> None:
    with open_service_manager({"NOTIFY_SOCKET": manager.variable}) as sent:
        sent.notify(Notice(status="a\nREADY=1\r\n\u2028b"))
        sent.notify(Notice(status="ü" * 10_000))
    (first,), (second,) = manager.received()
    assert first == "STATUS=a READY=1 b"
    assert len(second.encode()) < 2048
    assert set(second.removeprefix("STATUS=")) == {"ü"}


def test_the_variables_are_taken_out_of_the_environment() -> None:
    environ = {
        "NOTIFY_SOCKET": "@nobody-listens-here",
        "WATCHDOG_USEC": "5000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    with open_service_manager(environ) as sent:
        assert environ == {"HOME": "/"}
        assert sent.watchdog_s == 5.0


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
    ],
)
def test_the_watchdog_is_only_ours_if_it_names_us(
    variables: dict[str, str], watchdog_s: float | None
) -> None:
    with open_service_manager({"NOTIFY_SOCKET": "@nobody", **variables}) as sent:
        assert sent.watchdog_s == watchdog_s


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "relative"])
def test_without_a_socket_nothing_is_sent_and_nothing_is_watched(address: str | None) -> None:
    environ = {"WATCHDOG_USEC": "1000000"}
    if address is not None:
        environ["NOTIFY_SOCKET"] = address
    with open_service_manager(environ) as sent:
        sent.notify(Notice(ready=True))
        assert sent.watchdog_s is None
    assert environ == {}


def test_a_manager_that_reads_nothing_holds_nobody_up(manager: Socket) -> None:
    with open_service_manager({"NOTIFY_SOCKET": manager.variable}) as sent:
        began_at = time.monotonic()
        for _ in range(1000):
            sent.notify(Notice(alive=True, status="x" * 1000))
        assert time.monotonic() - began_at < 5
        assert 0 < len(manager.received()) < 1000
        sent.notify(Notice(ready=True))
        assert manager.received() == [["READY=1"]]


def test_a_manager_that_has_gone_is_no_error(manager: Socket) -> None:
    with open_service_manager({"NOTIFY_SOCKET": manager.variable}) as sent:
        manager.close()
        sent.notify(Notice(ready=True))


# --- a real process -------------------------------------------------------------------------


def collector(manager: Socket) -> Callable[[], list[list[str]]]:
    """Everything received so far, at each call."""
    seen: list[list[str]] = []

    def collect() -> list[list[str]]:
        seen.extend(manager.received())
        return seen

    return collect


def halt(pid: int) -> None:
    """Return once its last thread has stopped."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


@pytest.mark.nats
@pytest.mark.parametrize("manager", ["path"], indirect=True)
async def test_a_process_is_ready_lives_is_seen_to_hang_and_stops(
    tmp_path: Path, manager: Socket
) -> None:
    said = collector(manager)

    async def has(line: str, after: int = 0) -> bool:
        return any(line in datagram for datagram in said()[after:])

    env = {"NOTIFY_SOCKET": manager.variable, "WATCHDOG_USEC": "600000"}
    async with running_command(tmp_path, *SIMULATED, env=env) as worker:
        await until(lambda: has("READY=1"), within_s=40)
        # Requests are served by then.
        answer = await command("ask", "hello", "--url", worker.url, "--max-tokens", "3")
        assert answer.returncode == 0, answer.stderr
        for child in worker.children():
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & child.environ().keys()
        so_far = len(said())
        await until(lambda: has("WATCHDOG=1", so_far), within_s=10)

        halt(worker.process.pid)
        so_far = len(said())
        await trio.sleep(1.2)  # really two times WATCHDOG_USEC: what is expected is nothing
        assert not await has("WATCHDOG=1", so_far)
        worker.process.send_signal(signal.SIGCONT)
        await until(lambda: has("WATCHDOG=1", so_far), within_s=10)

        assert not await has("STOPPING=1")
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait_exit(20) == 0
    assert await has("STOPPING=1")
    assert any(line.startswith("STATUS=draining") for each in said() for line in each)


@pytest.mark.nats
async def test_the_signal_of_a_watchdog_leaves_a_traceback(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        children = worker.children()
        worker.process.send_signal(signal.SIGABRT)
        assert await worker.wait_exit(10) == -signal.SIGABRT
        for child in children:
            child.wait(10)
    log = worker.log.read_text()
    assert "Fatal Python error: Aborted" in log
    assert "trio/_core/_run.py" in log
