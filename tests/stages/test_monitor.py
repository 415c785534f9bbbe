"""The memory monitor: when it reads, what it says, and when it replaces the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import trio
from support.log_records import logged, texts
from support.worker_rig import MB, Rig, running_worker
from trio.testing import MockClock

from trio_worker.core.memory import MemoryReading

LIMITS = (
    "worker.resource_limits.max_memory_mb=1000",
    "worker.resource_limits.critical_memory_mb=2000",
)
INTERVAL_S = 4.0
SLOWLY = f"worker.resource_limits.check_interval_ms={1000 * INTERVAL_S:.0f}"
QUICKLY = "worker.resource_limits.check_interval_ms=125"
RELIEF_S = 2.0
RELIEF = f"worker.resource_limits.relief_timeout_ms={1000 * RELIEF_S:.0f}"


@pytest.fixture
def records() -> Iterator[list[Any]]:
    with logged("WARNING", of="trio_worker.stages.monitor") as records:
        yield records


def note_readings(rig: Rig) -> list[float]:
    """The times of the readings from now on."""
    times: list[float] = []
    read = rig.probe.read

    def noting(engine_pid: int | None) -> MemoryReading:
        times.append(trio.current_time())
        return read(engine_pid)

    rig.probe.read = noting  # type: ignore[method-assign, assignment]
    return times


async def test_it_reads_at_each_interval_and_under_pressure_four_times_a_second(
    autojump_clock: MockClock, records: list[Any]
) -> None:
    async with running_worker(*LIMITS, SLOWLY) as rig:
        times = note_readings(rig)
        await trio.sleep(9.125)
        assert times == [4, 8]
        rig.probe.used = 1000 * MB
        await trio.sleep(4)
        assert times == [4, 8, 12, 12.25, 12.5, 12.75, 13]
        times.clear()
        rig.probe.used = 2000 * MB
        await trio.sleep(0.6)
        rig.probe.used = 100 * MB
        await trio.sleep(10)
        assert times == [13.25, 13.5, 13.75, 17.75, 21.75]
    assert texts(records) == [
        "Memory pressure is soft (was normal): 1000 MB in use, limits 1000 and 2000 MB",
        "Memory pressure is critical (was soft): 2000 MB in use, limits 1000 and 2000 MB",
        "Memory pressure is normal (was critical): 100 MB in use, limits 1000 and 2000 MB",
    ]


async def test_a_shorter_interval_than_that_is_kept_under_pressure(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS, QUICKLY) as rig:
        rig.probe.used = 1000 * MB
        times = note_readings(rig)
        await trio.sleep(1.0625)
        assert times == [number / 8 for number in range(1, 9)]


async def test_what_each_reading_changes_is_acted_upon_at_once(autojump_clock: MockClock) -> None:
    """Nobody else asks: those who wait for the door, and readiness, hear of it then."""
    async with running_worker(*LIMITS, SLOWLY) as rig:
        rig.probe.used = 2000 * MB
        await trio.sleep(3.9)
        assert rig.observed.readiness().ok
        await trio.sleep(0.2)
        assert rig.observed.readiness().reason == "memory: 2000 MB is over the critical limit"
        rig.probe.used = 100 * MB
        await trio.sleep(0.3)
        assert rig.observed.readiness().ok


async def test_critical_memory_costs_the_engine_after_its_time_and_not_before_again(
    autojump_clock: MockClock, records: list[Any]
) -> None:
    async with running_worker(*LIMITS, QUICKLY, RELIEF, restart_s=0.5) as rig:
        await trio.sleep(0.0625)
        rig.probe.used = 2000 * MB
        # Critical from 0.125 on.
        await trio.sleep(RELIEF_S)
        assert rig.engine.restarts == 0
        await trio.sleep(0.125)
        assert rig.engine.statistics().restarts_by_reason == {"planned": 1}
        # The next reading begins to count anew.
        await trio.sleep(RELIEF_S)
        assert rig.engine.restarts == 1
        await trio.sleep(0.125)
        assert rig.engine.restarts == 2
        rig.probe.used = 100 * MB
        await trio.sleep(60)
        assert rig.engine.restarts == 2
    assert texts(records).count("Memory stays critical: replacing the engine by a fresh one") == 2


async def test_critical_memory_that_comes_and_goes_costs_no_engine(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS, QUICKLY, RELIEF) as rig:
        await trio.sleep(0.0625)
        for _ in range(10):
            rig.probe.used = 2000 * MB
            await trio.sleep(RELIEF_S - 0.25)
            rig.probe.used = 100 * MB
            await trio.sleep(0.25)
        assert rig.engine.restarts == 0


async def test_an_engine_that_is_down_is_not_replaced(autojump_clock: MockClock) -> None:
    async with running_worker(*LIMITS, QUICKLY, RELIEF, restart_s=5.0) as rig:
        rig.probe.used = 2000 * MB
        await trio.sleep(1)
        rig.engine.crash()
        await trio.sleep(4.9)
        assert rig.engine.statistics().restarts_by_reason == {"crash": 1}
        await trio.sleep(0.25)
        # Up again, and memory had been critical for long enough.
        assert rig.engine.statistics().restarts_by_reason == {"crash": 1, "planned": 1}


async def test_what_is_in_use_without_a_model_says_nothing_about_the_room_beside_it(
    autojump_clock: MockClock,
) -> None:
    """While the engine loads, at first or again, its memory is yet to come."""
    options = (*LIMITS, QUICKLY, "worker.requests.max_tokens_limit=1000000")
    async with running_worker(
        *options, load_s=10.0, restart_s=5.0, wait_ready=False, context_length=10_000_000
    ) as rig:

        async def room_mb() -> float:
            refused = await rig.ask(prompt="x", max_tokens=500_000)
            assert refused.error is not None
            room = refused.error.details["room_mb"]
            assert isinstance(room, float)
            return room

        await trio.sleep(9.9375)
        rig.probe.used = 900 * MB
        await trio.sleep(1)
        assert await room_mb() == 1100

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=1000))
            await trio.sleep(1)
            rig.engine.crash()
            rig.probe.used = 100 * MB
            await trio.sleep(4.9)
            rig.probe.used = 800 * MB
            await trio.sleep(1)
            # Some of what is in use is that request's cache.
            assert 1200 <= await room_mb() < 1201
