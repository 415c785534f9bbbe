"""Feels the event loop's pulse: how late timers fire, and what it is that blocks it."""

from __future__ import annotations

import trio
from loguru import logger

from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.monitoring.metrics import Metrics
from trio_worker.ports import StackSampler

PULSE_S = 0.5
BLOCKED_S = 1.0
"""A timer that is later than this is no noise: some task has held the loop."""


async def run_pulse(
    metrics: Metrics, heartbeat: Heartbeat, sampler: StackSampler | None = None
) -> None:
    """Measure until cancelled; with a sampler, the log says where the loop was blocked.

    The sampler looks at the real clock: it has no use where the loop runs on another one.
    Cancelled: the sampler is disarmed.
    """
    try:
        while True:
            now = trio.current_time()
            heartbeat.beat(now)
            due = now + PULSE_S
            if sampler is not None:
                # Taken while the loop is still blocked; each pulse in time puts it off.
                sampler.arm(PULSE_S + BLOCKED_S)
            await trio.sleep_until(due)
            lag_s = trio.current_time() - due
            metrics.loop_lag.observe(lag_s)
            stack = sampler.disarm() if sampler is not None else None
            if lag_s > BLOCKED_S:
                logger.warning("The event loop was blocked for {:.1f} s{}", lag_s, _where(stack))
    finally:
        if sampler is not None:
            sampler.disarm()


def _where(stack: str | None) -> str:
    """What the log line ends with; nothing if there is no sample."""
    if stack is None:
        return ""
    innermost, *outer = stack.splitlines()
    if "_io_epoll.py" in innermost or "_io_kqueue.py" in innermost:
        return ", waiting for events: the process itself was stopped, or had no CPU"
    return "".join([f" at {innermost}", *(f"\n  from {frame}" for frame in outer)])
