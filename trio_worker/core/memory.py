"""Memory: what was read, and how much pressure that is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MB = 2**20

RESUME_SHARE = 0.95
"""A level is left when usage has fallen below this share of what entered it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """Bytes in use by the worker and the engine process, and what the machine has."""

    used: int
    available: int
    total: int


class Pressure(StrEnum):
    """How near the limits memory is."""

    NORMAL = "normal"
    SOFT = "soft"
    """Over `max_memory_mb`."""
    CRITICAL = "critical"
    """Over `critical_memory_mb`: no new request is taken."""


class PressureGauge:
    """Turns readings into a level, with hysteresis: it does not flap around a limit."""

    def __init__(self, *, soft_bytes: int, critical_bytes: int) -> None:
        self.soft_bytes = soft_bytes
        self.critical_bytes = critical_bytes
        self.level = Pressure.NORMAL
        self.used = 0
        self.available = 0

    def read(self, *, used: int, available: int) -> Pressure:
        """Take in a reading; returns the level that now holds."""
        self.used = used
        self.available = available
        if used >= self.critical_bytes:
            self.level = Pressure.CRITICAL
        elif used >= self.soft_bytes:
            critical_holds = (
                self.level is Pressure.CRITICAL and used >= self.critical_bytes * RESUME_SHARE
            )
            self.level = Pressure.CRITICAL if critical_holds else Pressure.SOFT
        elif self.level is not Pressure.NORMAL and used >= self.soft_bytes * RESUME_SHARE:
            self.level = Pressure.SOFT
        else:
            self.level = Pressure.NORMAL
        return self.level
