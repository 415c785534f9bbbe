"""How long an idle engine waits for company before it starts a batch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PATIENCE = 2.0
"""With `adaptive_timeout`, this many mean gaps without an arrival mean that nobody is coming."""


class Trigger(StrEnum):
    """Why a batch was formed."""

    SIZE = "size"
    """`min_batch_size` requests were there."""
    TIMEOUT = "timeout"
    """`batch_timeout_ms` had passed."""
    SINGLE = "single"
    """Arrivals were too rare for waiting to be worth while."""
    RUNNING = "running"
    """Requests joined a batch that was already running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Wait for one more arrival until `until`, and start for the reason `trigger` if none came."""

    until: float
    trigger: Trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation:
    """The rule, from the configuration."""

    min_batch_size: int
    timeout_s: float
    adaptive: bool

    def decide(
        self, *, now: float, waiting: int, first_at: float, mean_gap_s: float | None
    ) -> Trigger | Wait:
        """Start now, or wait for one more.

        `waiting` requests are there, the first since `first_at`.
        """
        if waiting >= self.min_batch_size:
            return Trigger.SIZE
        deadline = first_at + self.timeout_s
        if now >= deadline:
            return Trigger.TIMEOUT
        if self.adaptive and mean_gap_s is not None:
            patience_s = PATIENCE * mean_gap_s
            if mean_gap_s > self.timeout_s:
                return Trigger.SINGLE
            if now + patience_s < deadline:
                return Wait(until=now + patience_s, trigger=Trigger.SINGLE)
        return Wait(until=deadline, trigger=Trigger.TIMEOUT)


class RoomSince:
    """Since when there has been room in the batch for the head of the queue, as far as is known.

    Its state: when the engine became ready, and when a look at the queue last left somebody there.
    """

    def __init__(self) -> None:
        self._ready_at = float("-inf")
        self._blocked_at: float | None = None

    def engine_ready(self, now: float) -> None:
        """The engine has been waited for, and can take a turn."""
        self._ready_at = now

    def looked(self, now: float, *, somebody_is_left: bool) -> None:
        """The head of the queue got what room there was; whoever is left found none."""
        self._blocked_at = now if somebody_is_left else None

    def at(self, now: float, *, freed_at: float) -> float:
        """If the last look found no room, since a request was withdrawn after it (at `freed_at`).

        Or else only since now: a turn has just ended, or there is memory again.
        """
        if self._blocked_at is None:
            return self._ready_at
        return max(self._ready_at, freed_at if freed_at > self._blocked_at else now)
