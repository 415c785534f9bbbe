"""`trio-worker fleet`: who is shown, for how long, and how."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
import trio_util
from rich.console import Console
from support.commands import THIS_TREE, clean_environment, command, running_command, until
from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from support.worker_rig import make_config
from trio.testing import MockClock

from trio_worker.cli.exit_statuses import NOBODY_THERE, READER_LEFT
from trio_worker.cli.fleet import follow, show, show_live, show_once
from trio_worker.errors import BrokerUnavailable
from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.wire import subjects
from trio_worker.wire.beats import Beat, encode

CONFIG = make_config()
"""A beat a second; who is silent for three is gone."""
SHOW_THE_CURSOR = b"\x1b[?25h"


def beat_of(worker_id: str, *, model: str = "tiny", **values: object) -> Beat:
    usual = {"slots": 8, "in_flight": 5, "queued": 2, "accepting": True, "version": "0.1.0"}
    return Beat(id=worker_id, model=model, **{**usual, **values})  # type: ignore[arg-type]


@dataclass
class Stage:
    watcher: MemoryBroker
    _workers: MemoryBroker

    def say(self, beat: Beat) -> None:
        self._workers.publish(Message(subject=subjects.beat(beat.id), body=encode(beat)))


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """A connection to watch with, and one for those who are watched."""
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="watcher") as watcher,
        open_memory_broker(server, name="workers") as workers,
    ):
        yield Stage(watcher, workers)


# --- once ------------------------------------------------------------------------------------


async def test_once_prints_a_row_for_each_worker_and_what_they_come_to(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stage() as here, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _speak() -> None:
            await trio.sleep(0.9)
            here.say(beat_of("w2", in_flight=0, queued=0, accepting=False, leaving=True))
            here.say(beat_of("w1"))

        assert await show_once(here.watcher, CONFIG, as_json=False) == 0
        assert trio.current_time() == pytest.approx(1.25)
    header, first, second, summary = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["worker", "model"]
    assert first.split() == ["w1", "tiny", "8", "5", "2", "accepting", "0.1.0", "0.3", "s"]
    assert second.split()[:6] == ["w2", "tiny", "8", "0", "0", "draining"]
    assert summary.strip() == "2 workers: 3 running, 2 queued, 8 slots that take requests"


async def test_into_a_pipe_a_long_name_is_whole(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a-model-with-a-name-that-is-longer-than-what-is-left-of-a-line-of-eighty-characters"
    async with stage() as here, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _speak() -> None:
            await trio.sleep(1)
            here.say(beat_of("w1", model=name))

        assert await show_once(here.watcher, CONFIG, as_json=False) == 0
    assert f" {name} " in capsys.readouterr().out


async def test_once_as_json_is_an_object_a_line(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stage() as here, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _speak() -> None:
            await trio.sleep(0.25)
            here.say(beat_of("w1", accepting=False))

        assert await show_once(here.watcher, CONFIG, as_json=True) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "id": "w1",
        "model": "tiny",
        "slots": 8,
        "in_flight": 5,
        "queued": 2,
        "accepting": False,
        "leaving": False,
        "version": "0.1.0",
        "age_s": 1.0,
    }


async def test_where_nobody_is_heard_it_says_so_and_how_to_start_one(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stage() as here:
        assert await show_once(here.watcher, CONFIG, as_json=False) == NOBODY_THERE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("No worker was heard on nats://127.0.0.1:4222.")
    assert "`trio-worker run`" in captured.err


async def test_what_is_no_beat_is_passed_over(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stage() as here, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _speak() -> None:
            await trio.sleep(0.5)
            for body in (b"", b"[]", encode(beat_of("another"))):
                here._workers.publish(Message(subject=subjects.beat("w1"), body=body))

        assert await show_once(here.watcher, CONFIG, as_json=False) == NOBODY_THERE


@pytest.mark.nats
async def test_a_real_worker_is_seen_and_seen_to_be_gone(tmp_path: Path) -> None:
    async with running_command(tmp_path, "--engine", "simulated") as worker:
        await worker.wait_ready()
        seen = await command("fleet", "--url", worker.url)
        assert seen.returncode == 0, seen.stderr
        assert seen.stdout.decode().splitlines()[1].split()[0] == "w1"
    gone = await command("fleet", "--url", worker.url, "--set", "nats.connect_timeout_ms=500")
    assert gone.returncode == 69
    assert b"could not be reached" in gone.stderr


@pytest.mark.nats
async def test_in_a_terminal_it_is_live_until_ctrl_c_which_is_no_fault(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    async with running_command(tmp_path, "--engine", "simulated") as worker:
        await worker.wait_ready()
        process = await trio.lowlevel.open_process(
            [*THIS_TREE, "fleet", "--url", worker.url],
            stdout=theirs,
            env={**clean_environment(), "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        written = b""

        async def shows_a_worker() -> bool:
            nonlocal written
            await trio.lowlevel.wait_readable(ours)
            written += os.read(ours, 65_536)
            return b"1 worker: 0 running" in written

        await until(shows_a_worker, within_s=20)
        process.send_signal(signal.SIGINT)
        with trio.fail_after(10):
            assert await process.wait() == 0
    # Linux says the end of a terminal by an error.
    with suppress(OSError):
        while rest := os.read(ours, 65_536):
            written += rest
    os.close(ours)
    assert written.rstrip().endswith(SHOW_THE_CURSOR)


# --- live ------------------------------------------------------------------------------------


@asynccontextmanager
async def live_view(here: Stage, *, width: int = 100) -> AsyncIterator[io.StringIO]:
    """What is written to a terminal meanwhile."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, color_system="standard")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(show_live, here.watcher, CONFIG.fleet, console)
        yield written
        nursery.cancel_scope.cancel()


def last_picture(written: io.StringIO) -> str:
    text = written.getvalue()
    written.seek(0)
    written.truncate()
    return text


async def test_the_live_view_follows_who_comes_and_who_goes(autojump_clock: MockClock) -> None:
    async with stage() as here, live_view(here) as written:
        await trio.sleep(0.1)
        assert "No worker has been heard of." in last_picture(written)
        here.say(beat_of("w1"))
        await trio.sleep(0.3)
        picture = last_picture(written)
        assert "w1" in picture
        assert "1 worker: 3 running, 2 queued, 8 slots that take requests" in picture
        here.say(beat_of("w1", leaving=True))
        await trio.sleep(0.3)
        assert "draining" in last_picture(written)
        await trio.sleep(2.5)
        assert "w1" in last_picture(written)
        await trio.sleep(0.5)
        last_picture(written)
        await trio.sleep(0.3)
        picture = last_picture(written)
        assert "w1" not in picture
        assert "No worker has been heard of." in picture


async def test_the_live_view_says_when_nats_is_away(autojump_clock: MockClock) -> None:
    async with stage() as here, live_view(here) as written:
        await trio.sleep(0.1)
        here.say(beat_of("w1"))
        await trio.sleep(0.5)
        here.watcher.disconnect()
        last_picture(written)
        await trio.sleep(0.5)
        assert "NATS is away: nobody can be heard." in last_picture(written)
        here.watcher.reconnect()
        await trio.sleep(0.5)
        last_picture(written)
        await trio.sleep(0.5)
        assert "1 worker: 3 running" in last_picture(written)


@pytest.mark.parametrize("as_json", [False, True])
async def test_a_connection_that_has_ended_for_good_ends_what_is_shown(
    autojump_clock: MockClock, *, as_json: bool
) -> None:
    async with stage() as here:
        ended = pytest.RaisesExc(BrokerUnavailable, match="thrown out")
        with pytest.RaisesGroup(pytest.RaisesGroup(ended)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(show, here.watcher, CONFIG, once=False, as_json=as_json))
                await trio.sleep(1)
                here.watcher.close_for_good("thrown out")


@pytest.mark.nats
@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_when_nobody_reads_on_it_ends_quietly(
    nats_url: str, options: tuple[str, ...]
) -> None:
    async with open_nats_broker(nats_url, name="worker") as broker, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _speak() -> None:
            async for _ in trio_util.periodic(0.1):
                broker.publish(Message(subject=subjects.beat("w1"), body=encode(beat_of("w1"))))

        ours, theirs = os.pipe()
        os.close(ours)
        process = await trio.lowlevel.open_process(
            [*THIS_TREE, "fleet", "--url", nats_url, *options],
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=clean_environment(),
        )
        os.close(theirs)
        with trio.fail_after(20):
            assert await process.wait() == READER_LEFT
        assert process.stderr is not None
        assert await process.stderr.receive_some() == b""
        nursery.cancel_scope.cancel()


async def test_what_a_worker_says_of_itself_is_no_markup(autojump_clock: MockClock) -> None:
    async with stage() as here, live_view(here) as written:
        await trio.sleep(0.1)
        here.say(beat_of("w1", model="[red]x[/red]"))
        await trio.sleep(0.5)
        assert "[red]x[/red]" in last_picture(written)


# --- as lines for a program --------------------------------------------------------------------


async def test_it_follows_as_lines_each_beat_once_and_an_end(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stage() as here, trio.open_nursery() as nursery:
        nursery.start_soon(follow, here.watcher, CONFIG.fleet)
        await trio.sleep(0.1)
        here.say(beat_of("w1"))
        here.say(beat_of("w2"))
        await trio.sleep(1)
        here.say(beat_of("w1"))
        await trio.sleep(2.5)
        nursery.cancel_scope.cancel()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["id"] for each in told] == ["w1", "w2", "w1", "w2"]
    assert [each.get("gone", False) for each in told] == [False, False, False, True]
