"""What has been passed on of late, in case it comes back: a ring, by any clock.

The server says at once where nobody listens. A request that it says nothing about for `KEPT_S`
has been taken, and is forgotten; so are the oldest where there are too many, or too large ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from trio_worker.ports import Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire.handed_on import Hop

KEPT_S = 1.0
PASSED_ON_MAX = 1024
PASSED_ON_BYTES_MAX = 32 * 2**20
PROBE = 0
"""The number of what no request has."""


@dataclass(slots=True, kw_only=True)
class Passed:
    """One request that has been passed on."""

    message: Message
    """As it came in here."""
    hop: Hop
    """What was known of it, other than by the message."""
    target: str
    request_id: RequestId | None
    at: float
    cancelled: bool = False
    """Its caller has cancelled it since."""


class PassedOn:
    """The ring. Its state: what is in it by number, and how many bytes these are."""

    def __init__(self) -> None:
        self._kept: dict[int, Passed] = {}
        """The oldest first. Bounds: above."""
        self._bytes = 0
        self._numbers = itertools.count(PROBE + 1)
        self.latest = PROBE
        """The number that was given last."""

    def __len__(self) -> int:
        return len(self._kept)

    def next_number(self) -> int:
        """For the next request; the server names it where nobody listens."""
        self.latest = next(self._numbers)
        return self.latest

    def keep(self, number: int, passed: Passed) -> None:
        """Remember a request that has been passed on, at the price of the oldest."""
        self._kept[number] = passed
        self._bytes += len(passed.message.body)
        while len(self._kept) > PASSED_ON_MAX or self._bytes > PASSED_ON_BYTES_MAX:
            self.take(next(iter(self._kept)))

    def take(self, number: int) -> Passed | None:
        """What was passed on under this number, to be remembered no more; None if it is not."""
        passed = self._kept.pop(number, None)
        if passed is not None:
            self._bytes -= len(passed.message.body)
        return passed

    def cancel(self, request_id: RequestId) -> bool:
        """Its caller has cancelled it; False if it is not here, or was cancelled before."""
        for passed in reversed(self._kept.values()):
            if passed.request_id == request_id:
                was_cancelled, passed.cancelled = passed.cancelled, True
                return not was_cancelled
        return False

    def forget(self, now: float) -> None:
        """Forget what has been taken by now."""
        while self._kept:
            oldest = next(iter(self._kept))
            if now - self._kept[oldest].at < KEPT_S:
                break
            self.take(oldest)

    def keep_all(self, now: float) -> None:
        """There is no connection: nothing that is here may have reached the server yet."""
        for passed in self._kept.values():
            passed.at = now
