"""Feels the event loop's pulse: how late timers fire, and whether something blocks it."""

from __future__ import annotations

import trio
from loguru import logger

from trio_worker.core.metrics import Metrics

PULSE_S = 0.5
BLOCKED_S = 1.0
"""So late a timer is not noise: some task held the loop for so long."""


async def run_pulse(metrics: Metrics) -> None:
    """Measure until cancelled."""
    while True:
        due = trio.current_time() + PULSE_S
        await trio.sleep_until(due)
        lag_s = trio.current_time() - due
        metrics.loop_lag.observe(lag_s)
        if lag_s > BLOCKED_S:
            logger.warning("The event loop was blocked for {:.1f} s", lag_s)
