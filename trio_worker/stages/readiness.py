"""Carries the engine's readiness to the door."""

from __future__ import annotations

import trio

from trio_worker.flow.door import Door
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat
from trio_worker.ports import Engine


async def run_readiness(*, engine: Engine, door: Door, batcher: Heartbeat) -> None:
    """Until cancelled, tell the door at once when the engine is lost, and when it is back.

    From then on a batcher that has waited for the engine owes a sign of life. Cancelled: the door
    keeps what it was told last.
    """
    async for ready in engine.ready.eventual_values():
        door.set_engine_ready(ready=ready)
        if ready:
            batcher.wake(Awaited.ENGINE, trio.current_time())
