"""What the service manager is told over a whole life, notice by notice."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import trio
from support.log_records import logged, texts
from support.observed import FakeWorker
from support.worker_rig import running_worker
from trio.testing import MockClock
from trio_util import AsyncValue

from trio_worker.flow.door import DoorState
from trio_worker.monitoring.observed import Health
from trio_worker.simulated.service_manager import MemoryServiceManager
from trio_worker.stages.notify import (
    CLOSING_S,
    EXTENSION_BEAT_S,
    EXTENSION_S,
    QUIET_LOAD_S,
    Phase,
    Standing,
    run_notify,
)


def told(manager: MemoryServiceManager) -> list[tuple[object, ...]]:
    return [
        (
            round(each.at, 3),
            "ready" if each.ready else "stopping" if each.stopping else "",
            each.alive,
            each.status,
            each.extend_timeout_s,
        )
        for each in manager.notices
    ]


async def test_a_life_from_the_load_to_the_stop(autojump_clock: MockClock) -> None:
    manager, standing, worker = MemoryServiceManager(), Standing(), FakeWorker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=40), manager, standing)
        await trio.sleep(4)
        standing.progress("downloading", 1, 4, "files")
        await trio.sleep(1)
        standing.progress("downloading", 2, 4, "files")
        await trio.sleep(1)
        standing.progress("loading", 0, 0, "")
        await trio.sleep(1)
        standing.progress("loading", 300, 0, "MB")
        await trio.sleep(43)
        standing.serving(worker)
        await trio.sleep(20)
        worker.live = Health(ok=False, reason="stuck")
        worker.ready = Health(ok=False, reason="full")
        await trio.sleep(30)
        worker.live = Health(ok=True, reason="")
        await trio.sleep(10)
        standing.stopping(25)
        await trio.sleep(79)
        nursery.cancel_scope.cancel()
    assert told(manager) == [
        (0, "", True, "starting", 60.0),
        (4, "", True, "downloading 25 % of 4 files", 60.0),
        (6, "", True, "loading", 60.0),
        (21, "", True, None, 60.0),
        (36, "", True, None, 60.0),
        (46, "", True, "loading 300 MB", 60.0),
        (50, "ready", True, "ready: 2 running, 3 queued", None),
        (65, "ready", True, None, None),
        (80, "ready", False, None, None),
        (90, "ready", False, "not ready (full): 2 running, 3 queued", None),
        (105, "ready", True, None, None),
        (110, "stopping", True, "draining: 1 requests left", 55.0),
        (125, "stopping", True, None, 40.0),
        (140, "stopping", True, None, 25.0),
        (150, "stopping", True, "draining: 1 requests left", 15.0),
        (165, "stopping", True, None, None),
        (180, "stopping", True, None, None),
    ]


async def test_a_watchdog_is_told_three_times_in_its_time_and_reports_come_once_a_second_at_most(
    autojump_clock: MockClock,
) -> None:
    manager, standing = MemoryServiceManager(watchdog_s=6), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=0.1), manager, standing)
        await trio.sleep(4.5)
        nursery.cancel_scope.cancel()
    assert [each.at for each in manager.notices] == [0, 1, 2, 3, 4]
    manager, standing = MemoryServiceManager(watchdog_s=6), Standing()
    async with trio.open_nursery() as nursery:
        began_at = trio.current_time()
        nursery.start_soon(partial(run_notify, report_interval_s=100), manager, standing)
        await trio.sleep(7)
        nursery.cancel_scope.cancel()
    assert [each.at - began_at for each in manager.notices] == [0, 2, 4, 6]


async def test_a_load_that_says_nothing_is_given_time_for_a_quarter_of_an_hour(
    autojump_clock: MockClock,
) -> None:
    """What it has said before is no news."""
    manager, standing = MemoryServiceManager(), Standing()
    standing.progress("loading", 1, 0, "MB")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=1000), manager, standing)
        await trio.sleep(450)
        standing.progress("loading", 1, 0, "MB")
        await trio.sleep(500)
        nursery.cancel_scope.cancel()
    extended = {each.at: each.extend_timeout_s for each in manager.notices}
    assert (extended[885], extended[900]) == (60.0, None)


async def test_each_time_the_watchdog_hears_nothing_the_log_says_so_once(
    autojump_clock: MockClock,
) -> None:
    manager, standing, worker = MemoryServiceManager(watchdog_s=6), Standing(), FakeWorker()
    with logged("ERROR") as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
            standing.serving(worker)
            for reason in ("first", "second"):
                await trio.sleep(20)
                assert len(lines) == (reason == "second")
                worker.live = Health(ok=False, reason=reason)
                await trio.sleep(20)
                worker.live = Health(ok=True, reason="")
            nursery.cancel_scope.cancel()
    assert texts(lines) == [
        "The watchdog hears nothing from now on: first",
        "The watchdog hears nothing from now on: second",
    ]


@pytest.mark.parametrize("comes", ["ready late", "never ready"])
async def test_a_stop_before_the_worker_was_ready_stays_a_stop(
    autojump_clock: MockClock, comes: str
) -> None:
    standing = Standing()
    standing.stopping(0)
    assert standing.status() == "stopping before the worker was ready"
    if comes == "ready late":
        standing.serving(FakeWorker())
        assert standing.status() == "draining: 1 requests left"
    assert standing.phase is Phase.STOPPING
    assert standing.extension_s() == 30.0


async def test_a_change_at_the_door_is_said_at_once(autojump_clock: MockClock) -> None:
    standing, door = Standing(), AsyncValue(DoorState.OPEN)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(standing.follow, door)
        await trio.sleep(100)
        for state in (DoorState.PAUSED, DoorState.OPEN):
            with trio.move_on_after(5) as quiet:
                await standing.wait_changed()
            assert quiet.cancelled_caught
            door.value = state
            with trio.fail_after(0.001):
                await standing.wait_changed()
        nursery.cancel_scope.cancel()


async def test_a_load_gets_more_time_as_long_as_it_goes_on(autojump_clock: MockClock) -> None:
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


async def test_the_status_shows_how_far_the_load_is(autojump_clock: MockClock) -> None:
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


async def test_ready_is_said_at_once_and_again_with_every_notice(autojump_clock: MockClock) -> None:
    manager, standing = MemoryServiceManager(), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
        await trio.sleep(1.25)
        standing.serving(FakeWorker())
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
    autojump_clock: MockClock, watchdog_s: float
) -> None:
    manager, standing = MemoryServiceManager(watchdog_s=watchdog_s), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=7), manager, standing)
        standing.serving(FakeWorker())
        await trio.sleep(20 * min(watchdog_s, 60))
        assert manager.longest_silence_s() < watchdog_s / 2
        nursery.cancel_scope.cancel()


async def test_the_watchdog_hears_nothing_while_the_loops_make_no_progress(
    autojump_clock: MockClock,
) -> None:
    manager, standing, worker = MemoryServiceManager(watchdog_s=10), Standing(), FakeWorker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=1000), manager, standing)
        standing.serving(worker)
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
    autojump_clock: MockClock,
) -> None:
    manager, standing, worker = MemoryServiceManager(), Standing(), FakeWorker()
    door = AsyncValue(DoorState.OPEN)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=3600), manager, standing)
        nursery.start_soon(standing.follow, door)
        standing.serving(worker)
        await trio.sleep(100)
        worker.ready = Health(ok=False, reason="queue: full")
        before = len(manager.notices)
        for _ in range(500):
            for state in (DoorState.PAUSED, DoorState.OPEN, DoorState.PAUSED):
                door.value = state
                await trio.sleep(0.01)
        assert manager.statuses()[-1] == "not ready (queue: full): 2 running, 3 queued"
        assert 10 <= len(manager.notices) - before <= 20
        before = len(manager.notices)
        await trio.sleep(100)
        assert len(manager.notices) - before <= 100 / EXTENSION_BEAT_S + 1
        worker.ready, door.value = Health(ok=True, reason=""), DoorState.OPEN
        await trio.sleep(1)
        assert manager.statuses()[-1] == "ready: 2 running, 3 queued"
        nursery.cancel_scope.cancel()


async def test_a_stop_gets_the_time_of_the_drain_and_no_more(autojump_clock: MockClock) -> None:
    manager, standing = MemoryServiceManager(), Standing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
        standing.serving(FakeWorker())
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


async def test_a_worker_says_everything_from_its_start_to_its_end(
    autojump_clock: MockClock,
) -> None:
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


async def test_a_stop_during_the_load_is_said_too(autojump_clock: MockClock) -> None:
    manager = MemoryServiceManager()
    async with running_worker(load_s=100, wait_ready=False, service_manager=manager) as rig:
        await trio.sleep(50)
        rig.stop()
        await rig.finished.wait()
    assert manager.notices[-1].stopping
    assert not any(each.ready for each in manager.notices)


def test_the_phases_are_the_words_of_the_documentation() -> None:
    assert [each.value for each in Phase] == ["starting", "serving", "stopping"]
