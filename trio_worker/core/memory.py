"""Memory: what was read, how much pressure that is, and what is promised to running requests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from trio_worker.protocol.turn import RequestId

MB = 2**20

HYSTERESIS = 0.05
"""A step or level is left this share of the band between the limits below where it begins."""
GRANULE_TOKENS = 256
"""mlx-lm's caches grow by this many tokens at a time."""
SCARCE_SHARE = 0.02
"""Less of the machine's memory than this available is critical, whatever we use ourselves."""


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
    """Over `max_memory_mb`: the worker does less."""
    CRITICAL = "critical"
    """Over `critical_memory_mb`: nothing new is taken, and what runs is thinned out."""


class DegradationStep(StrEnum):
    """What the worker does less of under pressure, in the order in which it begins."""

    TRIM_CACHES = "trim_caches"
    """What is kept for reuse only is given back."""
    HOLD_LOW = "hold_low"
    """Requests of the least urgent level wait."""
    SHRINK_BATCH = "shrink_batch"
    """Half the slots, half the prefill."""
    CAP_TOKENS = "cap_tokens"
    """Requests that enter the batch get at most `degraded_max_tokens`."""


class PressureGauge:
    """Turns readings into a level and steps, with hysteresis: they do not flap around a limit.

    The steps begin at the soft limit and follow at equal distances up to the hard one, where the
    level becomes critical. Critical is left only below the soft limit.
    """

    def __init__(self, *, soft_bytes: int, critical_bytes: int) -> None:
        self.soft_bytes = soft_bytes
        self.critical_bytes = critical_bytes
        self.level = Pressure.NORMAL
        self.steps: frozenset[DegradationStep] = frozenset()
        self.available = 0
        self.readings = 0
        """Counts what may be acted upon: a look at the processes, or an engine over the limit."""
        self._processes = 0
        self._engine = 0
        self._is_scarce = False
        band = critical_bytes - soft_bytes
        self._slack = HYSTERESIS * band
        self._begins_at = {
            step: soft_bytes + band * index / len(DegradationStep)
            for index, step in enumerate(DegradationStep)
        }

    @property
    def used(self) -> int:
        """What the processes hold or the engine's allocator counts, whichever is larger.

        Neither sees all of the other: memory of the GPU, or everything beside the model.
        """
        return max(self._processes, self._engine)

    def read(self, reading: MemoryReading) -> None:
        """Take in a reading of the processes and of the machine."""
        self._processes = reading.used
        self.available = reading.available
        scarce = reading.total * SCARCE_SHARE
        self._is_scarce = reading.available < (2 * scarce if self._is_scarce else scarce)
        self.readings += 1
        self._assess()

    def read_engine(self, counted: int) -> bool:
        """Take in what the engine's allocator counts, as of its last turn.

        Returns whether the level or the steps have changed.
        """
        self._engine = counted
        if counted >= self.critical_bytes:
            self.readings += 1
        before = (self.level, self.steps)
        self._assess()
        return before != (self.level, self.steps)

    def _assess(self) -> None:
        used, slack = self.used, self._slack
        if used < self.soft_bytes - slack and not self._is_scarce:
            # Nothing begins here, and everything ends.
            self.level, self.steps = Pressure.NORMAL, frozenset()
            return
        if used >= self.critical_bytes or self._is_scarce:
            self.level = Pressure.CRITICAL
        elif used >= self.soft_bytes:
            if self.level is not Pressure.CRITICAL:
                self.level = Pressure.SOFT
        elif self.level is Pressure.CRITICAL:
            self.level = Pressure.NORMAL
        self.steps = frozenset(
            step
            for step, begins_at in self._begins_at.items()
            if self._is_scarce
            or used >= (begins_at - slack if step in self.steps else max(begins_at, 1))
        )


class ReservationLedger:
    """Bytes promised to the caches of running requests, and whether more can be promised.

    A promise is the longest the cache may become: (prompt + max_tokens) × bytes per token, in
    whole granules. In a batch all rows are as long as the longest, so what is reserved for n
    requests is n times the largest promise. What the worker uses beside these caches (the model,
    the interpreter, kept prefixes) is reconciled with every reading as what the readings show
    beyond the caches' present size; promises are made out of what that leaves below the hard
    limit.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes_per_token = 0
        """0 until the model is loaded: then nothing can be said, and everything fits."""
        self._promised: dict[RequestId, int] = {}
        self._beside = 0
        self._least_beside: int | None = None

    @property
    def reserved_bytes(self) -> int:
        return _padded(self._promised.values())

    def need(self, *, prompt: int, max_tokens: int) -> int:
        """Bytes of the longest cache of such a request."""
        granules = -(-(prompt + max_tokens) // GRANULE_TOKENS)
        return granules * GRANULE_TOKENS * self.bytes_per_token

    def fits(self, need: int, *, instead_of: RequestId | None = None) -> bool:
        """Whether this much more can be promised now, or once this request has left."""
        promised = [each for request_id, each in self._promised.items() if request_id != instead_of]
        return self._beside + _padded((*promised, need)) <= self.limit_bytes

    def room_ever(self) -> int:
        """The largest need that could be met if nothing else ran."""
        return self.limit_bytes - (self._least_beside or 0)

    def fits_ever(self, need: int) -> bool:
        """Whether this much could be promised if nothing else ran."""
        return need <= self.room_ever()

    def reserve(self, request_id: RequestId, need: int) -> None:
        assert request_id not in self._promised, f"{request_id} holds a reservation already"
        self._promised[request_id] = need

    def release(self, request_id: RequestId) -> None:
        """Give back what the request holds, if anything."""
        self._promised.pop(request_id, None)

    def release_all(self) -> None:
        """Nobody runs any more."""
        self._promised.clear()

    def reconcile(self, *, used: int, cached_tokens: int) -> None:
        """`used` bytes were read while the running sequences' caches held `cached_tokens`."""
        self._beside = max(0, used - cached_tokens * self.bytes_per_token)
        if self._least_beside is None or self._beside < self._least_beside:
            self._least_beside = self._beside

    def engine_restarted(self) -> None:
        """What the old engine used beside its caches says little about the new one."""
        self._least_beside = None


def _padded(promises: Collection[int]) -> int:
    return len(promises) * max(promises, default=0)
