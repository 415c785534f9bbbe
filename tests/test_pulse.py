"""When the event loop is said to have been blocked, and where."""

from __future__ import annotations

import pytest
import trio
from loguru import logger
from trio.testing import MockClock

from trio_worker.core.heartbeat import Heartbeat
from trio_worker.core.metrics import Metrics
from trio_worker.stages.pulse import _where, run_pulse


@pytest.mark.parametrize(("late_s", "lines"), [(0.9, 0), (1.1, 1)])
async def test_a_timer_more_than_a_second_late_is_a_line(
    mock_clock: MockClock, late_s: float, lines: int
) -> None:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    metrics = Metrics()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_pulse, metrics, Heartbeat("pulse", bound_s=1.0))
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(0.5 + late_s)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    finally:
        logger.remove(sink)
    assert said == [f"The event loop was blocked for {late_s:.1f} s"] * lines
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
