"""When the event loop is said to have been blocked, and where; also of a real process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio
from support.commands import clean_environment
from support.log_records import logged, texts
from support.ports import free_port
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
    await trio.sleep(0.1)  # the late pulse comes first
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
