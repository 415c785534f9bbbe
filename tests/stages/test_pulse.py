"""When the event loop is said to have been blocked, and where."""

from __future__ import annotations

import pytest
import trio
from support.log_records import logged, texts
from trio.testing import MockClock

from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.monitoring.metrics import Metrics
from trio_worker.stages.pulse import _where, run_pulse


@pytest.mark.parametrize(("late_s", "lines"), [(0.9, 0), (1.0, 0), (1.1, 1)])
async def test_a_timer_more_than_a_second_late_is_a_line(
    mock_clock: MockClock, late_s: float, lines: int
) -> None:
    metrics = Metrics()
    with logged("WARNING") as said:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_pulse, metrics, Heartbeat("pulse", bound_s=1.0))
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(0.5 + late_s)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert texts(said) == [f"The event loop was blocked for {late_s:.1f} s"] * lines
    assert metrics.loop_lag.sums[()] == pytest.approx(late_s)


def test_the_place_is_the_innermost_frame_with_those_that_called_it() -> None:
    assert _where(None) == ""
    assert _where("File a, line 1 in f\nFile b, line 2 in g") == (
        " at File a, line 1 in f\n  from File b, line 2 in g"
    )
    for waits in ("_io_epoll.py", "_io_kqueue.py"):
        assert _where(f"File trio/{waits}, line 1\nFile b") == (
            ", waiting for events: the process itself was stopped, or had no CPU"
        )


class Sampler:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def arm(self, after_s: float) -> None:
        self.asked.append(after_s)

    def disarm(self) -> str | None:
        self.asked.append("disarm")
        return "File a, line 1 in f"


async def test_each_pulse_in_time_puts_the_sample_off_and_the_last_one_calls_it_off(
    mock_clock: MockClock,
) -> None:
    sampler, heartbeat = Sampler(), Heartbeat("pulse", bound_s=1.0)
    with logged("WARNING") as said:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_pulse, Metrics(), heartbeat, sampler)
            for jump in (0.5, 2.5):
                await trio.testing.wait_all_tasks_blocked()
                assert heartbeat.silent_s(trio.current_time()) == 0
                mock_clock.jump(jump)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert sampler.asked == [1.5, "disarm", 1.5, "disarm", 1.5, "disarm"]
    assert texts(said) == ["The event loop was blocked for 2.0 s at File a, line 1 in f"]
