"""What stands in the way of something that goes on being tried: said once, and shown until over."""

from __future__ import annotations

import trio
from loguru import logger

SAY_AGAIN_S = 60.0
"""How often the log repeats what has not changed."""


class Troubles:
    """Its state: by place, what is wrong there, since when, and when the log was told."""

    def __init__(self, about: str) -> None:
        self._about = about
        self._texts: dict[str, str] = {}
        """Bound: the places that the program names."""
        self._said_at: dict[str, float] = {}

    @property
    def line(self) -> str | None:
        """For people, all of it; None while there is none."""
        return "; ".join(self._texts.values()) or None

    def note(self, place: str, text: str) -> None:
        """It is so now; the log is told if that is news, or was so a while ago."""
        now = trio.current_time()
        is_old = self._texts.get(place) == text
        self._texts[place] = text
        if is_old and now - self._said_at[place] < SAY_AGAIN_S:
            return
        self._said_at[place] = now
        logger.warning("{}: {}", self._about, text)

    def clear(self, place: str) -> None:
        """All is well there."""
        if self._texts.pop(place, None) is not None:
            logger.info("{}: {} works again", self._about, place)
