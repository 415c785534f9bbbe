"""How long a loading engine may stay silent before it is taken for hung."""

from __future__ import annotations

FIRST_SILENCE_S = 600.0
"""The first load may be a download, and takes what it takes; but it says each step, and each
megabyte that has come or been read, and is hung if it says nothing for this long."""
RELOAD_TIMES = 5
RELOAD_LEAST_S = 20.0
"""A model that has been loaded is here: loading it again may be silent for this many times as
long as the whole load took, and for this many seconds at least."""
PREWARM_TURNS = 10
"""Prewarming may take as long as this many turns: it compiles what later turns only run."""


class LoadPatience:
    """Learns from each load what the next may take. All times are of one clock, in seconds."""

    def __init__(self, *, turn_timeout_s: float) -> None:
        self._prewarm_s = PREWARM_TURNS * turn_timeout_s
        self._longest_s = 0.0
        self.begun(0.0)

    def begun(self, now: float) -> None:
        """An engine has been told to load its model."""
        self._began_at = now
        self._first_step_at: float | None = None
        self._preparation_s = 0.0
        self.step = "load"
        self.patience_s = FIRST_SILENCE_S
        """From now to the next that is heard of it, and from there to the next."""
        if self._longest_s:
            self.patience_s = max(RELOAD_LEAST_S, RELOAD_TIMES * self._longest_s)

    def stepped(self, now: float) -> None:
        """It has begun a step: to download, to convert, and last of these to load."""
        if self._first_step_at is None:
            self._first_step_at = now
        self._preparation_s = now - self._first_step_at

    def prewarming(self) -> None:
        """It has loaded the model, and computes with it for the first time."""
        self.step, self.patience_s = "prewarm", self._prewarm_s

    def loaded(self, now: float) -> None:
        """It is ready. What came before the loading itself will not come again."""
        self._longest_s = max(self._longest_s, now - self._began_at - self._preparation_s)
