"""Suspects on trial: which of several requests it is that brings the engine down.

Who was aboard of two crashes in a row is a suspect. Suspects return alone, the newest first, each
until it is `PROOF_TOKENS` past where it was, so that only the one that brings the engine down by
itself fails, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterable

from trio_worker.core.sequence import Sequence

SUSPECT_CRASHES = 2
PROOF_TOKENS = 16


class Trial:
    """Its state: the suspects still to be tried, the one being tried last, and its proof."""

    def __init__(self) -> None:
        self._suspects: list[Sequence] = []
        self._proof_at = 0
        """The number of produced tokens at which the one being tried is acquitted."""

    @property
    def is_on(self) -> bool:
        return bool(self._suspects)

    @property
    def tried(self) -> Sequence | None:
        """The one that may be in the engine now, alone; None while nobody is suspected."""
        return self._suspects[-1] if self._suspects else None

    def has_proof(self, sequence: Sequence) -> bool:
        """Whether a suspect has come so far that it cannot be what ended the engine."""
        return sequence in self._suspects and len(sequence.produced) >= self._proof_at

    def crashed(self, aboard: Iterable[Sequence]) -> Sequence | None:
        """The engine has ended with these aboard; returns the one that is guilty, once it is clear.

        The guilty's `crashes` are then those that it caused; everybody else's are forgotten.
        """
        aboard = list(aboard)
        if self._suspects:
            guilty = self._suspects[-1]
            if guilty not in aboard:
                return None
            crashes = guilty.crashes + 1
            self.dismiss()
            guilty.crashes = crashes
            return guilty
        for each in aboard:
            each.crashes += 1
        self._suspects = [each for each in aboard if each.crashes >= SUSPECT_CRASHES]
        self._try_next()
        return None

    def acquit(self, sequence: Sequence) -> bool:
        """It is no suspect any more, if it was one; True if another one is tried in its place."""
        if sequence not in self._suspects:
            return False
        sequence.crashes = 0
        was_tried = sequence is self._suspects[-1]
        self._suspects.remove(sequence)
        if not (was_tried and self._suspects):
            return False
        self._try_next()
        return True

    def dismiss(self) -> None:
        """Suspect nobody any more."""
        for each in self._suspects:
            each.crashes = 0
        self._suspects.clear()

    def _try_next(self) -> None:
        if self._suspects:
            self._proof_at = len(self._suspects[-1].produced) + PROOF_TOKENS
