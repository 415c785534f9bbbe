"""Carries the engine's readiness to the door."""

from __future__ import annotations

from trio_worker.door import Door
from trio_worker.ports import Engine


async def run_readiness(*, engine: Engine, door: Door) -> None:
    """Until cancelled: the door knows at once when the engine is lost and when it is back."""
    async for ready in engine.ready.eventual_values():
        door.set_engine_ready(ready=ready)
