"""What was computed a moment ago, for the next who asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

FRESH_S = 0.1
"""What was computed for one who asked this short a time ago is good enough for the next."""

_T = TypeVar("_T")


class Recent(Generic[_T]):
    """What was computed within the last `FRESH_S`: asking in a loop costs next to nothing."""

    def __init__(self) -> None:
        self._since = float("-inf")
        self._kept: dict[str, _T] = {}

    def get(self, compute: Callable[[], _T], *, of: str = "") -> _T:
        """What `compute` returns, or returned for the same `of` while that is fresh.

        What it raises passes through, and is computed again the next time.
        """
        now = trio.current_time()
        if now - self._since > FRESH_S:
            self._since = now
            self._kept.clear()
        if of not in self._kept:
            self._kept[of] = compute()
        return self._kept[of]
