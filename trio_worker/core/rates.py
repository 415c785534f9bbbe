"""What was measured of the past, and what it says about the near future."""

from __future__ import annotations

from collections import deque

RETRY_MS_MIN = 50
RETRY_MS_MAX = 60_000
RETRY_MS_UNKNOWN = 1000
COMPLETIONS_NEEDED = 8
"""Before this many requests have completed, nothing is said about the service rate."""


class ServiceRate:
    """How long a slot serves one request, from the last 64 completions."""

    def __init__(self) -> None:
        self._service_s: deque[float] = deque(maxlen=64)
        self.completed = 0

    def record(self, service_s: float) -> None:
        """A request completed `service_s` after it had entered the batch."""
        self.completed += 1
        self._service_s.append(service_s)

    @property
    def mean_service_s(self) -> float | None:
        """None before `COMPLETIONS_NEEDED` completions."""
        if self.completed < COMPLETIONS_NEEDED:
            return None
        return sum(self._service_s) / len(self._service_s)

    @property
    def quickest_service_s(self) -> float | None:
        """The shortest of the last 64; None as `mean_service_s`."""
        return None if self.completed < COMPLETIONS_NEEDED else min(self._service_s)

    def retry_after_ms(self, *, waiting: int, slots: int) -> int:
        """When a place may be free: the time one of `slots` takes to come around.

        With n waiting and k slots of mean service time S, the queue moves every S / k seconds
        (Little's law); a caller is asked to wait until a quarter of those before it are served.
        """
        service_s = self.mean_service_s
        if service_s is None:
            return RETRY_MS_UNKNOWN
        estimate_ms = 1000 * service_s / slots * max(1.0, waiting / 4)
        return int(min(max(estimate_ms, RETRY_MS_MIN), RETRY_MS_MAX))


class ArrivalRate:
    """The mean gap between arrivals, exponentially weighted (weight 1/8, as TCP's RTT)."""

    def __init__(self) -> None:
        self._last_at: float | None = None
        self.mean_gap_s: float | None = None

    def record(self, now: float) -> None:
        if self._last_at is not None:
            gap_s = now - self._last_at
            mean = self.mean_gap_s
            self.mean_gap_s = gap_s if mean is None else mean + (gap_s - mean) / 8
        self._last_at = now
