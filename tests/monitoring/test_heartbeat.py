"""`/livez` knows which loop is stuck, and takes none for stuck that only waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import trio
from support.worker_rig import Rig, running_worker
from trio.testing import MockClock

from trio_worker.flow import request_channel as priority_channel
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat, heartbeats
from trio_worker.simulated.engine import Faults, SimulatedEngine
from trio_worker.simulated.service_manager import MemoryServiceManager
from trio_worker.stages import intake
from trio_worker.worker import tasks, tree

MARGIN_S = 10.0


# --- the rule -------------------------------------------------------------------------------


def test_a_loop_owes_a_beat_from_the_one_before() -> None:
    loop = Heartbeat("some", bound_s=5.0)
    assert loop.silent_s(1e9) == 0
    loop.beat(10.0)
    assert loop.silent_s(17.0) == 7.0
    loop.beat(18.0)
    assert loop.silent_s(18.5) == 0.5


def test_a_resting_loop_owes_nothing_until_it_is_given_what_it_waits_for() -> None:
    loop = Heartbeat("some", bound_s=5.0)
    loop.beat(0.0)
    loop.rest(Awaited.WORK)
    assert loop.silent_s(100.0) == 0
    loop.wake(Awaited.ENGINE, 100.0)
    assert loop.silent_s(200.0) == 0
    loop.wake(Awaited.WORK, 200.0)
    loop.wake(Awaited.WORK, 203.0)
    assert loop.silent_s(204.0) == 4.0
    loop.beat(205.0)
    loop.wake(Awaited.WORK, 206.0)
    assert loop.silent_s(207.0) == 2.0


def test_each_loop_has_the_bound_of_what_it_does() -> None:
    beats = heartbeats(
        100.0,
        turn_timeout_s=60,
        check_interval_s=5,
        report_interval_s=20,
        pulse_s=0.5,
        beat_interval_s=1,
    )
    beats.beat.beat(100.0)
    assert {
        each.loop: (each.bound_s, each.silent_s(101.0))
        for each in (
            *(beats.batcher, beats.intake, beats.monitor),
            *(beats.reporter, beats.pulse, beats.beat),
        )
    } == {
        "batcher": (70.0, 1.0),
        "intake": (10.0, 0.0),
        "monitor": (15.0, 1.0),
        "reporter": (30.0, 1.0),
        "pulse": (10.5, 1.0),
        "beat": (11.0, 1.0),
    }
    assert [each.loop for each in beats.late(110.5)] == []
    assert [each.loop for each in beats.late(110.6)] == ["pulse"]
    assert [each.loop for each in beats.late(131.0)] == [
        *("monitor", "reporter", "pulse", "beat"),
    ]


def test_a_batcher_held_back_by_memory_waits_for_the_next_reading() -> None:
    beats = heartbeats(
        0.0,
        turn_timeout_s=1,
        check_interval_s=100,
        report_interval_s=1,
        pulse_s=0.5,
        beat_interval_s=1,
    )
    assert beats.batcher.bound_s == 110


# --- a whole worker -------------------------------------------------------------------------


async def becomes_late(rig: Rig, loop: str, *, bound_s: float) -> None:
    """From now on, `loop` alone gives no sign of life; noticed at its bound, and not before."""
    began_at = trio.current_time()
    while rig.observed.liveness().ok:
        await trio.sleep(0.25)
        assert trio.current_time() - began_at < bound_s + 1, "nothing is noticed"
    health = rig.observed.liveness()
    assert trio.current_time() - began_at >= bound_s - 1
    assert health.reason.startswith(f"stuck: {loop} has not come round for ")
    assert health.reason.endswith(f" s (bound: {bound_s:g} s)")


async def stuck(*_: Any, **__: Any) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("stage", "loop", "bound_s"),
    [
        ("run_monitor", "monitor", 5 + MARGIN_S),
        ("run_reporter", "reporter", 10 + MARGIN_S),
        ("run_pulse", "pulse", 0.5 + MARGIN_S),
        ("run_batcher", "batcher", 60 + MARGIN_S),
    ],
)
async def test_a_loop_that_never_comes_round_is_named(
    autojump_clock: MockClock, stage: str, loop: str, bound_s: float
) -> None:
    with mock.patch.object(tasks, stage, stuck):
        async with running_worker() as rig:
            await becomes_late(rig, loop, bound_s=bound_s)


async def test_a_turn_that_does_not_end_is_noticed(autojump_clock: MockClock) -> None:
    """Its supervisor should have ended it long ago."""
    async with running_worker(
        "worker.continuous_batching.turn_timeout_ms=20000",
        engine_options={"turn_timeout_s": 1e6},
    ) as rig:
        async with trio.open_nursery() as nursery:
            rig.engine.hang()
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=5))
            await becomes_late(rig, "batcher", bound_s=20 + MARGIN_S)
            nursery.cancel_scope.cancel()


async def test_a_batcher_that_goes_on_waiting_for_an_engine_that_is_ready_is_noticed(
    autojump_clock: MockClock,
) -> None:
    real = SimulatedEngine.wait_ready
    lost = False

    async def deaf(self: SimulatedEngine) -> Any:
        if lost:
            await trio.sleep_forever()
        return await real(self)

    with mock.patch.object(SimulatedEngine, "wait_ready", deaf):
        async with running_worker(restart_s=30.0) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=4000))
            await trio.sleep(1)
            lost = True
            rig.engine.crash()
            await trio.sleep(29)
            assert rig.observed.liveness().ok
            await trio.sleep(1.5)
            assert rig.engine.ready.value
            await becomes_late(rig, "batcher", bound_s=60 + MARGIN_S)
            nursery.cancel_scope.cancel()


async def test_a_wake_up_of_the_batcher_that_gets_lost_is_noticed(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig, trio.open_nursery() as nursery:
        await trio.sleep(300)
        with mock.patch.object(priority_channel._State, "wake", return_value=None):
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=5, timeout_ms=600_000))
            await becomes_late(rig, "batcher", bound_s=60 + MARGIN_S)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("subject", ["inference.w1", "inference.w1.ctl.nobody"])
async def test_an_intake_that_does_not_read_what_arrives_is_noticed(
    autojump_clock: MockClock, subject: str
) -> None:
    """Control messages come the same way: nobody could cancel anything either."""

    class Deaf:
        def __init__(self, receive: Any) -> None:
            self._receive = receive

        def __getattr__(self, name: str) -> Any:
            return getattr(self._receive, name)

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None:
            self._receive.close()

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> Any:
            await trio.sleep_forever()

    def open_deaf_buffer() -> Any:
        send, receive = intake.open_intake_buffer()
        return send, Deaf(receive)

    with mock.patch.object(tree, "open_intake_buffer", open_deaf_buffer):
        async with running_worker() as rig, trio.open_nursery() as nursery:
            await trio.sleep(300)
            assert rig.observed.liveness().ok
            nursery.start_soon(lambda: rig.raw(b"cancel", subject=subject))
            await becomes_late(rig, "intake", bound_s=MARGIN_S)
            nursery.cancel_scope.cancel()
            # The worker cannot end by itself: its intake never closes.
            rig.stop()
            rig.stop()


async def alive_throughout(rig: Rig, seconds: float) -> None:
    for _ in range(int(seconds)):
        assert rig.observed.liveness().ok
        await trio.sleep(1)


def _nothing(_rig: Rig) -> None:
    """All is quiet."""


def _no_memory(rig: Rig) -> None:
    rig.probe.used = 20_000 * 2**20


@pytest.mark.parametrize("happens", [_nothing, _no_memory, lambda rig: rig.engine.crash()])
async def test_a_worker_that_only_waits_is_alive(
    autojump_clock: MockClock, happens: Callable[[Rig], None]
) -> None:
    """For work, for memory, or for its engine, however long that takes."""
    async with running_worker(restart_s=3000.0) as rig, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=500, timeout_ms=600_000))
        await trio.sleep(0.1)
        happens(rig)
        await alive_throughout(rig, 1000)


async def test_a_worker_under_load_and_faults_is_alive(autojump_clock: MockClock) -> None:
    async with running_worker(
        "worker.continuous_batching.turn_timeout_ms=5000",
        "worker.simulated.turn_ms=100",
        faults=Faults(slow_turn=0.1, slow_turn_s=4.0, crash=0.05),
    ) as rig:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                while True:
                    await rig.ask(prompt="x", max_tokens=20, timeout_ms=600_000)

            for _ in range(12):
                nursery.start_soon(ask)
            await alive_throughout(rig, 300)
            nursery.cancel_scope.cancel()


async def test_the_watchdog_hears_nothing_of_a_worker_with_a_stuck_loop(
    autojump_clock: MockClock,
) -> None:
    manager = MemoryServiceManager(watchdog_s=30)
    with mock.patch.object(tasks, "run_monitor", stuck):
        async with running_worker(service_manager=manager) as rig:
            await trio.sleep(10)
            assert manager.notices[-1].alive
            await trio.sleep(30)
            assert not rig.observed.liveness().ok
            assert not manager.notices[-1].alive
