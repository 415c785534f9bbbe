"""Signs of life: which loop has not come round for longer than it may take.

A loop `beat`s each time it comes round, and `rest`s while it waits for something that may never
come. Whoever brings what a resting loop waits for calls `wake` in the same synchronous section;
from then on the loop owes a beat again. So a loop that is stuck is told from one that has nothing
to do, and a wake-up that got lost is noticed like a loop that is stuck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum, auto

MARGIN_S = 10.0
"""How much longer than it is meant to take a loop may need on a machine that is busy."""


class Awaited(Enum):
    """What a resting loop waits for."""

    WORK = auto()
    """A message, or a request in the queue."""
    ENGINE = auto()
    """The engine to be ready again: its supervisor bounds how long that may take."""


class Heartbeat:
    """Of one loop. Its state: since when it owes a beat, or what it rests for."""

    def __init__(self, loop: str, *, bound_s: float) -> None:
        self.loop = loop
        self.bound_s = bound_s
        self._owes_since: float | None = None
        self._awaits: Awaited | None = None

    def beat(self, now: float) -> None:
        """The loop has come round, and owes the next beat within its bound."""
        self._owes_since = now

    def rest(self, awaits: Awaited) -> None:
        """The loop waits, and owes nothing until what it waits for is there."""
        self._owes_since = None
        self._awaits = awaits

    def wake(self, brings: Awaited, now: float) -> None:
        """What a loop may wait for is there; nothing happens unless it rests for just that."""
        if self._owes_since is None and brings is self._awaits:
            self._owes_since = now

    def silent_s(self, now: float) -> float:
        """For how many seconds it has owed a beat; 0 while it rests."""
        return 0.0 if self._owes_since is None else now - self._owes_since


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeats:
    """Those of all loops of a worker."""

    batcher: Heartbeat
    intake: Heartbeat
    monitor: Heartbeat
    reporter: Heartbeat
    pulse: Heartbeat
    beat: Heartbeat

    def late(self, now: float) -> Iterator[Heartbeat]:
        """The loops that have owed a beat for longer than their bound."""
        for field in fields(self):
            heartbeat: Heartbeat = getattr(self, field.name)
            if heartbeat.silent_s(now) > heartbeat.bound_s:
                yield heartbeat


def heartbeats(
    now: float,
    *,
    turn_timeout_s: float,
    check_interval_s: float,
    report_interval_s: float,
    pulse_s: float,
    beat_interval_s: float,
) -> Heartbeats:
    """Bounds from what each loop waits for at most while it does its work.

    The batcher waits for a turn, or, held back by memory, for the next reading. Intake waits for
    nothing but its messages, and control messages come through it too. All but intake and the
    fleet's beat, which begin when the model is loaded, owe their first beat from `now` on.
    """
    beats = Heartbeats(
        batcher=Heartbeat("batcher", bound_s=max(turn_timeout_s, check_interval_s) + MARGIN_S),
        intake=Heartbeat("intake", bound_s=MARGIN_S),
        monitor=Heartbeat("monitor", bound_s=check_interval_s + MARGIN_S),
        reporter=Heartbeat("reporter", bound_s=report_interval_s + MARGIN_S),
        pulse=Heartbeat("pulse", bound_s=pulse_s + MARGIN_S),
        beat=Heartbeat("beat", bound_s=beat_interval_s + MARGIN_S),
    )
    for each in (beats.batcher, beats.monitor, beats.reporter, beats.pulse):
        each.beat(now)
    return beats
