"""What the engine process writes: a part of the worker's log, and its last words."""

from __future__ import annotations

from collections import deque

from loguru import logger

LAST_LINES = 20
LINE_CHARACTERS = 400
"""A longer line is cut off."""
LEVELS = frozenset({"INFO", "WARNING", "ERROR"})


class EngineLog:
    """Its state: the last lines of the process that runs, or ran last."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def last_lines(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def begin(self) -> None:
        """A new process has been started: what the one before wrote is of no interest any more."""
        self._lines.clear()

    def take(self, line: str) -> None:
        text = line.rstrip()[:LINE_CHARACTERS]
        if text:
            self._lines.append(text)
            # What libraries say is for those who look for it; what the engine itself says is not.
            level, _, rest = text.partition(" trio_worker.")
            logger.log(level if rest and level in LEVELS else "DEBUG", "engine: {}", text)
