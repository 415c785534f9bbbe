"""Warnings that may come in floods."""

from __future__ import annotations

import trio
from loguru import logger

QUIET_S = 5.0
"""At most one log line of a kind in this time."""


class QuietLog:
    """Logs the first warning of a kind, and with the next one how many it held back."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._since: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def warn(self, kind: str, text: str) -> None:
        now = trio.current_time()
        if now - self._since.get(kind, -QUIET_S) < QUIET_S:
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return
        self._since[kind] = now
        more = self._held_back.pop(kind, 0)
        tail = f" (and {more} like it before)" if more else ""
        logger.warning("NATS at {}: {}{}", self._where, text, tail)
