"""Watches memory: owns the writing side of the pressure gauge."""

from __future__ import annotations

import trio_util
from loguru import logger

from trio_worker.core.counters import BatchCounters
from trio_worker.core.memory import MB, PressureGauge
from trio_worker.door import Door
from trio_worker.ports import Engine, MemoryProbe


async def run_monitor(
    *,
    probe: MemoryProbe,
    engine: Engine,
    gauge: PressureGauge,
    door: Door,
    batches: BatchCounters,
    check_interval_s: float,
) -> None:
    """Read now and then every `check_interval_s` until cancelled.

    Usage is what the processes hold or what the engine's allocator counts, whichever is larger:
    neither sees all of the other.
    """
    logger.debug("Resource monitoring started")
    async for _ in trio_util.periodic(check_interval_s):
        reading = probe.read(engine.statistics().pid)
        counted = batches.engine_memory.active + batches.engine_memory.cache
        before = gauge.level
        level = gauge.read(used=max(reading.used, counted), available=reading.available)
        door.pressure_changed()
        if level is not before:
            logger.warning(
                "Memory pressure is {} (was {}): {} MB in use, limits {} and {} MB",
                level,
                before,
                round(gauge.used / MB),
                round(gauge.soft_bytes / MB),
                round(gauge.critical_bytes / MB),
            )
