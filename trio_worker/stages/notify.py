"""Keeps the service manager informed: loading, ready, alive, stopping.

Rules:

1. Every notice says all that is so, so that a lost one costs nothing but time.
2. `alive` has the truth of `/livez`: it is said while the loops make progress, and not said when
   they do not, whatever the reason.
3. More time is asked for in small portions: who hangs gets no more of it.
"""

from __future__ import annotations

from enum import StrEnum

import trio
from loguru import logger
from trio_util import AsyncValue, RepeatedEvent

from trio_worker.flow.door import DoorState
from trio_worker.monitoring.observed import Observed
from trio_worker.ports import Notice, ServiceManager

EXTENSION_S = 60.0
"""How much longer a start or a stop may last after each notice."""
EXTENSION_BEAT_S = 15.0
QUIET_LOAD_S = 900.0
"""More time is asked for while the load has said something within this time, which is longer
than the engine's supervisor lets a load be silent."""
CLOSING_S = 30.0
"""What a stop may take beside the drain: the last publications, the ends of child processes."""
STATUS_GAP_S = 1.0
"""Between two lines about the state, at least."""


class Phase(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


class Standing:
    """How far the worker is in its life, and what is to be said about that.

    Set by the worker, read by `run_notify`.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self._changed = RepeatedEvent()
        self._observed: Observed | None = None
        self._step = "starting"
        self._measure = ""
        self._progressed_at = trio.current_time()
        self._stops_until = 0.0

    def progress(self, step: str, done: int, total: int, unit: str) -> None:
        """How far the load has come: `done` of `total`, which is 0 where nobody knows it."""
        measure = _measure(done, total, unit)
        if (step, measure) == (self._step, self._measure):
            return
        is_news = step != self._step
        self._step, self._measure = step, measure
        self._progressed_at = trio.current_time()
        if is_news:
            self._changed.set()

    def serving(self, observed: Observed) -> None:
        """Requests reach the worker."""
        self._observed = observed
        if self.phase is Phase.STARTING:
            self.phase = Phase.SERVING
        self._changed.set()

    def stopping(self, drain_timeout_s: float) -> None:
        """The drain begins, or the run ends before there was anything to drain."""
        self.phase = Phase.STOPPING
        self._stops_until = trio.current_time() + drain_timeout_s + CLOSING_S
        self._changed.set()

    async def wait_changed(self) -> None:
        """Return when something is to be said at once; what came before the call is over."""
        await self._changed.wait()

    async def follow(self, door: AsyncValue[DoorState]) -> None:
        """Until cancelled: have it said when the worker begins or ceases to take requests."""
        said = door.value
        while True:
            said = await door.wait_value(lambda state, said=said: state is not said)
            self._changed.set()
            await trio.sleep(STATUS_GAP_S)

    def notice(self, *, with_status: bool) -> Notice:
        """All that is so now."""
        return Notice(
            ready=self.phase is Phase.SERVING,
            stopping=self.phase is Phase.STOPPING,
            alive=self.dead() is None,
            status=self.status() if with_status else None,
            extend_timeout_s=self.extension_s(),
        )

    def status(self) -> str:
        """One line for people."""
        if self.phase is Phase.STARTING:
            return f"{self._step}{self._measure}"
        if self._observed is None:
            return "stopping before the worker was ready"
        now = self._observed.snapshot()
        if self.phase is Phase.STOPPING:
            return f"draining: {now.requests.in_flight} requests left"
        health = self._observed.readiness()
        state = "ready" if health.ok else f"not ready ({health.reason})"
        return f"{state}: {now.batch.running} running, {now.queue.depth} queued"

    def dead(self) -> str | None:
        """Why the watchdog should hear nothing."""
        if self._observed is None:
            return None
        health = self._observed.liveness()
        return None if health.ok else health.reason

    def extension_s(self) -> float | None:
        """How much longer the start or the stop may last from now; None: no more is asked for."""
        now = trio.current_time()
        if self.phase is Phase.STARTING and now - self._progressed_at < QUIET_LOAD_S:
            return EXTENSION_S
        if self.phase is Phase.STOPPING and now < self._stops_until:
            return min(EXTENSION_S, self._stops_until - now)
        return None


async def run_notify(
    manager: ServiceManager, standing: Standing, *, report_interval_s: float
) -> None:
    """Keep `manager` informed until cancelled: at changes, and regularly.

    A line about the state comes with each change, and every `report_interval_s` or, if that is
    longer, every `STATUS_GAP_S`.
    """
    beat_s = EXTENSION_BEAT_S
    if manager.watchdog_s is not None:
        # Two may be late or lost.
        beat_s = min(beat_s, manager.watchdog_s / 3)
    report_s = max(report_interval_s, STATUS_GAP_S)
    was_alive = True
    report_at = trio.current_time()
    while True:
        is_due = trio.current_time() >= report_at
        notice = standing.notice(with_status=is_due)
        if was_alive and not notice.alive:
            logger.error("The watchdog hears nothing from now on: {}", standing.dead())
        was_alive = notice.alive
        manager.notify(notice)
        if is_due:
            report_at = trio.current_time() + report_s
        with trio.move_on_at(min(trio.current_time() + beat_s, report_at)):
            # No change comes between the look above and here: nothing is awaited.
            await standing.wait_changed()
            report_at = trio.current_time()


def _measure(done: int, total: int, unit: str) -> str:
    if total:
        return f" {100 * done // total} % of {total} {unit}"
    return f" {done} {unit}" if done else ""
