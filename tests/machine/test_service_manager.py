"""What systemd is told: the datagrams, the stage that decides about them, and a real process."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from support.commands import clean_environment, command, running_command, until
from support.nats_fixtures import free_port
from support.worker_rig import running_worker
from trio_util import AsyncValue

from trio_worker.flow.door import DoorState
from trio_worker.machine.service_manager import open_service_manager
from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.monitoring.metrics import Metrics
from trio_worker.monitoring.observed import Health, Observed
from trio_worker.monitoring.stack_sampler import open_stack_sampler
from trio_worker.ports import Notice
from trio_worker.simulated.service_manager import MemoryServiceManager
from trio_worker.stages.notify import (
    CLOSING_S,
    EXTENSION_BEAT_S,
    EXTENSION_S,
    QUIET_LOAD_S,
    Standing,
    run_notify,
)
from trio_worker.stages.pulse import run_pulse

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


# --- the stage ------------------------------------------------------------------------------


class FakeWorker:
    """As much of `Observed` as is asked for here."""

    def __init__(self) -> None:
        self.live = Health(ok=True, reason="")
        self.ready = Health(ok=True, reason="")

    def liveness(self) -> Health:
        return self.live

    def readiness(self) -> Health:
        return self.ready

    def snapshot(self) -> object:
        return self

    def __getattr__(self, _name: str) -> object:
        return self

    def __format__(self, _spec: str) -> str:
        return "0"


def observed(worker: FakeWorker) -> Observed:
    return worker  # type: ignore[return-value]


async def test_a_load_gets_more_time_as_long_as_it_goes_on(autojump_clock: object) -> None:
    manager, standing = MemoryServiceManager(), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
        await trio.sleep(QUIET_LOAD_S - 100)
        standing.progress("downloading", 1, 10, "MB")
        progressed_at = trio.current_time()
        await trio.sleep(2 * QUIET_LOAD_S)
        nursery.cancel_scope.cancel()
    extensions = [each for each in manager.notices if each.extend_timeout_s is not None]
    assert {each.extend_timeout_s for each in extensions} == {EXTENSION_S}
    gaps = [after.at - before.at for before, after in itertools.pairwise(extensions)]
    assert max(gaps) <= EXTENSION_BEAT_S < EXTENSION_S
    assert extensions[0].at == 0
    assert QUIET_LOAD_S - EXTENSION_BEAT_S <= extensions[-1].at - progressed_at <= QUIET_LOAD_S
    assert not any(each.ready or each.stopping for each in manager.notices)


async def test_the_status_shows_how_far_the_load_is(autojump_clock: object) -> None:
    manager, standing = MemoryServiceManager(), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
        await trio.testing.wait_all_tasks_blocked()
        for done in range(5):
            standing.progress("downloading", done, 4, "files")
            await trio.sleep(7)
        standing.progress("loading weights", 0, 0, "")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert manager.statuses() == [
        "starting",
        "downloading 0 % of 4 files",
        "downloading 25 % of 4 files",
        "downloading 50 % of 4 files",
        "downloading 100 % of 4 files",
        "loading weights",
    ]


async def test_ready_is_said_at_once_and_again_with_every_notice(autojump_clock: object) -> None:
    manager, standing = MemoryServiceManager(), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
        await trio.sleep(1.25)
        standing.serving(observed(FakeWorker()))
        await trio.sleep(50)
        nursery.cancel_scope.cancel()
    ready = [each for each in manager.notices if each.ready]
    assert ready[0].at == 1.25
    assert len(ready) >= 4
    assert all(each.ready for each in manager.notices if each.at >= 1.25)
    assert not any(each.extend_timeout_s for each in ready)
    assert [each.at for each in ready if each.status] == [1.25, 11.25, 21.25, 31.25, 41.25, 51.25][
        : len([each for each in ready if each.status])
    ]


@pytest.mark.parametrize("watchdog_s", [0.3, 2.0, 30.0, 3600.0])
async def test_the_watchdog_hears_from_us_in_less_than_half_of_its_time(
    autojump_clock: object, watchdog_s: float
) -> None:
    manager, standing = MemoryServiceManager(watchdog_s=watchdog_s), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=7), manager, standing)
        standing.serving(observed(FakeWorker()))
        await trio.sleep(20 * min(watchdog_s, 60))
        assert manager.longest_silence_s() < watchdog_s / 2
        nursery.cancel_scope.cancel()


async def test_the_watchdog_hears_nothing_while_the_loops_make_no_progress(
    autojump_clock: object,
) -> None:
    manager, standing, worker = MemoryServiceManager(watchdog_s=10), Standing(), FakeWorker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=1000), manager, standing)
        standing.serving(observed(worker))
        await trio.sleep(100)
        worker.live = Health(ok=False, reason="a turn has been under way for 71 s")
        await trio.sleep(100)
        silent = [each for each in manager.notices if each.at > 100]
        assert silent
        assert not any(each.alive for each in silent)
        worker.live = Health(ok=True, reason="")
        await trio.sleep(10)
        assert manager.notices[-1].alive
        nursery.cancel_scope.cancel()


async def test_a_change_at_the_door_is_said_soon_and_not_more_than_once_a_second(
    autojump_clock: object,
) -> None:
    manager, standing, worker = MemoryServiceManager(), Standing(), FakeWorker()
    door = AsyncValue(DoorState.OPEN)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=3600), manager, standing)
        nursery.start_soon(standing.follow, door)
        standing.serving(observed(worker))
        await trio.sleep(100)
        worker.ready = Health(ok=False, reason="queue: full")
        before = len(manager.notices)
        for _ in range(500):
            for state in (DoorState.PAUSED, DoorState.OPEN, DoorState.PAUSED):
                door.value = state
                await trio.sleep(0.01)
        assert manager.statuses()[-1] == "not ready (queue: full): 0 running, 0 queued"
        assert 10 <= len(manager.notices) - before <= 20
        before = len(manager.notices)
        await trio.sleep(100)
        assert len(manager.notices) - before <= 100 / EXTENSION_BEAT_S + 1
        worker.ready, door.value = Health(ok=True, reason=""), DoorState.OPEN
        await trio.sleep(1)
        assert manager.statuses()[-1] == "ready: 0 running, 0 queued"
        nursery.cancel_scope.cancel()


async def test_a_stop_gets_the_time_of_the_drain_and_no_more(autojump_clock: object) -> None:
    manager, standing = MemoryServiceManager(), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
        standing.serving(observed(FakeWorker()))
        await trio.sleep(100)
        standing.stopping(drain_timeout_s=300)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    stopping = [each for each in manager.notices if each.stopping]
    assert stopping[0].at == 100
    assert not any(each.ready for each in stopping)
    until_s = [
        each.at + each.extend_timeout_s for each in stopping if each.extend_timeout_s is not None
    ]
    assert max(until_s) == pytest.approx(100 + 300 + CLOSING_S)
    for notice in stopping:
        if notice.at < 400:
            assert notice.at + (notice.extend_timeout_s or 0) > notice.at + 2 * EXTENSION_BEAT_S


async def test_a_worker_says_everything_from_its_start_to_its_end(autojump_clock: object) -> None:
    manager = MemoryServiceManager(watchdog_s=30)
    async with running_worker(load_s=100, service_manager=manager) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=200))
            await trio.sleep(2)
            rig.stop()
            await rig.finished.wait()
            ended_at = trio.current_time()
    notices = list(manager.notices)
    ready = [each.at for each in notices if each.ready]
    stopping = [each.at for each in notices if each.stopping]
    assert ready[0] == pytest.approx(100, abs=1)
    assert stopping[0] == pytest.approx(ready[0] + 2, abs=0.1)
    assert max(ready) < stopping[0]
    assert all(each.extend_timeout_s for each in notices if each.at < 99)
    assert manager.longest_silence_s() < 15
    assert ended_at > stopping[0]
    assert "draining: 1 requests left" in manager.statuses()


async def test_a_stop_during_the_load_is_said_too(autojump_clock: object) -> None:
    manager = MemoryServiceManager()
    async with running_worker(load_s=100, wait_ready=False, service_manager=manager) as rig:
        await trio.sleep(50)
        rig.stop()
        await rig.finished.wait()
    assert manager.notices[-1].stopping
    assert not any(each.ready for each in manager.notices)


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


# --- what blocks the loop -------------------------------------------------------------------

BLOCKED = """
import sys, time
import trio
from trio_worker.config import load_config
from trio_worker.launch import launch
from trio_worker.logs import set_up_logging

def grind_without_a_checkpoint():
    time.sleep(1.6)

async def greet(_broker):
    await trio.sleep(0.7)  # between two pulses
    grind_without_a_checkpoint()
    await trio.sleep(0.7)
    await stops_send.send(None)

set_up_logging(log_format="human", level="info")
stops_send, stops = trio.open_memory_channel(1)
config = load_config(None, environ={}, hostname="host", overrides=sys.argv[1:])
trio.run(lambda: launch(config, engine="simulated", stops=stops, greet=greet))
"""


@pytest.mark.nats
async def test_the_log_names_what_blocked_the_event_loop(tmp_path: Path) -> None:
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKED)
    overrides = [f"nats.url=nats://127.0.0.1:{free_port()}", "worker.monitoring.port=0"]
    with trio.fail_after(60):
        done = await trio.run_process(
            [sys.executable, str(script), *overrides],
            capture_stderr=True,
            check=False,
            env=clean_environment(),
        )
    log = done.stderr.decode()
    assert done.returncode == 0, log
    (line,) = [each for each in log.splitlines() if "The event loop was blocked for" in each]
    assert "grind_without_a_checkpoint" in line, log
    assert "blocked.py" in line
    following = log.splitlines()[log.splitlines().index(line) + 1]
    assert following.startswith("  from ")
    assert "in greet" in following


async def test_without_a_sampler_a_late_pulse_is_said_without_a_place(
    autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_pulse, metrics, Heartbeat("pulse", bound_s=1.0))
        await trio.testing.wait_all_tasks_blocked()
        autojump_clock.jump(3)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert "The event loop was blocked for 2.5 s\n" in capfd.readouterr().err


def test_a_sampler_that_is_disarmed_in_time_has_nothing_to_say() -> None:
    with open_stack_sampler() as sampler:
        assert sampler is not None
        sampler.arm(60)
        assert sampler.disarm() is None
        sampler.arm(0.05)
        time.sleep(0.5)
        stack = sampler.disarm()
        assert stack is not None
        assert "test_a_sampler_that_is_disarmed" in stack.splitlines()[0]
        assert sampler.disarm() is None
