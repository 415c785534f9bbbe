"""A service manager in the event loop: it keeps what it was told, on any clock."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass

import trio

from trio_worker.ports import Notice

NOTICES_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HeardNotice(Notice):
    """A notice, and when it came."""

    at: float
    """On the clock of the loop."""


class MemoryServiceManager:
    """Implements `ports.ServiceManager`."""

    def __init__(self, *, watchdog_s: float | None = None) -> None:
        self._watchdog_s = watchdog_s
        self.notices: deque[HeardNotice] = deque(maxlen=NOTICES_MAX)

    @property
    def watchdog_s(self) -> float | None:
        return self._watchdog_s

    def notify(self, notice: Notice) -> None:
        self.notices.append(HeardNotice(at=trio.current_time(), **asdict(notice)))

    def statuses(self) -> list[str]:
        """The different lines for people, in their order."""
        found: list[str] = []
        for notice in self.notices:
            if notice.status is not None and found[-1:] != [notice.status]:
                found.append(notice.status)
        return found

    def longest_silence_s(self) -> float:
        """The longest that the watchdog had to wait, up to now."""
        times = [notice.at for notice in self.notices if notice.alive]
        return max(
            (
                after - before
                for before, after in zip(times, [*times[1:], trio.current_time()], strict=True)
            ),
            default=float("inf"),
        )
