"""Which workers there are, from what they say of themselves: a value, by any clock.

One that has been silent for `forget_after_s` counts as gone, and so does one that the server says
nobody listens for, until it is heard of again. One that says goodbye stays known, and is asked no
more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trio_worker.core.hand_on import Place
from trio_worker.wire.beats import Beat

WORKERS_MAX = 1000
"""How many others are remembered; one more, and the one heard of longest ago is forgotten."""


@dataclass(slots=True)
class _Known:
    beat: Beat
    at: float
    sent: int = 0
    """Sequences that went there since its last beat, which does not count them."""


class LiveSet:
    """What one worker knows of the others."""

    def __init__(self, *, own_id: str, model: str, forget_after_s: float) -> None:
        self._own_id = own_id
        self._model = model
        self._forget_after_s = forget_after_s
        self._known: dict[str, _Known] = {}
        """By id, the one heard of longest ago first."""

    def heard(self, beat: Beat, now: float) -> bool:
        """Take note of a beat; whether its worker knows nobody yet. Our own is passed over.

        That is one which was not known before, or has come back after its goodbye.
        """
        if beat.id == self._own_id:
            return False
        self._forget(now)
        known = self._known.pop(beat.id, None)
        self._known[beat.id] = _Known(beat, now)
        if len(self._known) > WORKERS_MAX:
            del self._known[next(iter(self._known))]
        return known is None or (known.beat.leaving and not beat.leaving)

    def gone(self, worker_id: str) -> None:
        """Nobody listens for this worker."""
        self._known.pop(worker_id, None)

    def sent(self, worker_id: str, sequences: int) -> None:
        """They are on their way there: they count until its next beat."""
        if (known := self._known.get(worker_id)) is not None:
            known.sent += sequences

    def has_others(self, now: float) -> bool:
        """Whether anybody else is known; a quick no for a worker that is alone."""
        self._forget(now)
        return bool(self._known)

    def places(self, now: float) -> list[Place]:
        """Where requests may be passed to: the others of the same model that stay."""
        self._forget(now)
        return [
            Place(
                id=beat.id,
                slots=beat.slots,
                in_flight=beat.in_flight + known.sent,
                accepting=beat.accepting,
            )
            for known in self._known.values()
            if (beat := known.beat).model == self._model and not beat.leaving
        ]

    def others(self, now: float) -> Iterator[tuple[Beat, float]]:
        """The last beat of every other worker, and its age in seconds."""
        self._forget(now)
        return ((known.beat, now - known.at) for known in self._known.values())

    def _forget(self, now: float) -> None:
        while self._known:
            oldest = next(iter(self._known))
            if now - self._known[oldest].at <= self._forget_after_s:
                break
            del self._known[oldest]
