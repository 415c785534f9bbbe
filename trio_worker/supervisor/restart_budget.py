"""How often something that fails may be started again before that is no help any more."""

from __future__ import annotations

from collections import deque


class RestartBudget:
    """`max_restarts` within any `window_s`. Its state: when the failures of that time were."""

    def __init__(self, *, max_restarts: int, window_s: float) -> None:
        self.max_restarts = max_restarts
        self.window_s = window_s
        self._failed_at: deque[float] = deque()

    @property
    def spent(self) -> int:
        """Failures within the window that ended with the latest one."""
        return len(self._failed_at)

    def spend(self, now: float) -> bool:
        """Book a failure at `now`, in seconds; False if it is one more than may be."""
        self._failed_at.append(now)
        while self._failed_at[0] < now - self.window_s:
            self._failed_at.popleft()
        return self.spent <= self.max_restarts

    def give_back(self, count: int) -> None:
        """Forget the latest `count` failures: their cause is gone."""
        for _ in range(min(count, self.spent)):
            self._failed_at.pop()
