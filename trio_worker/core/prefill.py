"""How many prompt tokens a turn may compute, so that running answers keep flowing."""

from __future__ import annotations

CHUNK_FIRST = 32
"""Nothing is known about the engine's speed when it has just started."""
CHUNK_MIN = 16
"""Below this the overhead of a turn outweighs what it computes."""
WEIGHT = 0.25
"""Of a new measurement in the running means."""


class PrefillBudget:
    """Adapts the chunk to the gap between tokens that running requests should see.

    Two running means are kept: the seconds of a turn without prefill, and the seconds that one
    prefilled token adds to a turn. The chunk is what fits between the first and the target.
    """

    def __init__(self, *, chunk_max: int, gap_target_s: float) -> None:
        self.chunk_max = max(chunk_max, CHUNK_MIN)
        self.gap_target_s = gap_target_s
        self.restarted()

    def restarted(self) -> None:
        """Forget what was measured: the engine has just started."""
        self._decode_s: float | None = None
        self._token_s: float | None = None
        self.chunk = min(CHUNK_FIRST, self.chunk_max)

    def record(self, *, seconds: float, prefilled: int, decoded: int) -> None:
        """One turn took `seconds`, prefilled and decoded so many tokens."""
        if not prefilled:
            if decoded:
                self._decode_s = _mean(self._decode_s, seconds)
            return
        base_s = (self._decode_s or 0.0) if decoded else 0.0
        self._token_s = _mean(self._token_s, max(seconds - base_s, 1e-6) / prefilled)
        room_s = self.gap_target_s - (self._decode_s or 0.0)
        fitting = int(room_s / self._token_s) if room_s > 0 else CHUNK_MIN
        # At most doubling: a small chunk says little about a large one.
        self.chunk = max(CHUNK_MIN, min(fitting, 2 * self.chunk, self.chunk_max))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
