"""What the service manager is told over a whole life, notice by notice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
from support.log_records import logged, texts
from trio.testing import MockClock
from trio_util import AsyncValue

from trio_worker.flow.door import DoorState
from trio_worker.monitoring.observed import Health
from trio_worker.simulated.service_manager import MemoryServiceManager
from trio_worker.stages.notify import Phase, Standing, run_notify


class Seen:
    """As much of `Observed` as is asked for here."""

    def __init__(self) -> None:
        self.live = self.ready = Health(ok=True, reason="")

    def liveness(self) -> Health:
        return self.live

    def readiness(self) -> Health:
        return self.ready

    def snapshot(self) -> Any:
        return self

    def __getattr__(self, _name: str) -> Any:
        return self

    def __format__(self, _spec: str) -> str:
        return "7"


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
    manager, standing, seen = MemoryServiceManager(), Standing(), Seen()
    observed: Any = seen
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
        standing.serving(observed)
        await trio.sleep(20)
        seen.live = Health(ok=False, reason="stuck")
        seen.ready = Health(ok=False, reason="full")
        await trio.sleep(30)
        seen.live = Health(ok=True, reason="")
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
        (50, "ready", True, "ready: 7 running, 7 queued", None),
        (65, "ready", True, None, None),
        (80, "ready", False, None, None),
        (90, "ready", False, "not ready (full): 7 running, 7 queued", None),
        (105, "ready", True, None, None),
        (110, "stopping", True, "draining: 7 requests left", 55.0),
        (125, "stopping", True, None, 40.0),
        (140, "stopping", True, None, 25.0),
        (150, "stopping", True, "draining: 7 requests left", 15.0),
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
    manager, standing, seen = MemoryServiceManager(watchdog_s=6), Standing(), Seen()
    observed: Any = seen
    with logged("ERROR") as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(run_notify, report_interval_s=10), manager, standing)
            standing.serving(observed)
            for reason in ("first", "second"):
                await trio.sleep(20)
                assert len(lines) == (reason == "second")
                seen.live = Health(ok=False, reason=reason)
                await trio.sleep(20)
                seen.live = Health(ok=True, reason="")
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
    observed: Any = Seen()
    standing.stopping(0)
    assert standing.status() == "stopping before the worker was ready"
    if comes == "ready late":
        standing.serving(observed)
        assert standing.status() == "draining: 7 requests left"
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


def test_the_phases_are_the_words_of_the_documentation() -> None:
    assert [each.value for each in Phase] == ["starting", "serving", "stopping"]
