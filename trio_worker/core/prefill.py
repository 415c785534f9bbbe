"""How many prompt tokens a turn may compute, so that running answers keep flowing.

A turn with prefill takes what its decode step takes, and what its calls of the model take: each a
fixed cost, and a cost for each token. These two are fitted to measured turns as a straight line,
with exponentially fading weights.
"""

from __future__ import annotations

CHUNK_FIRST = 32
"""Nothing is known about the engine's speed when it has just started."""
CHUNK_MIN = 8
"""Below this a turn does little but read the model's weights, even with much context."""
GROWTH = 4
"""A chunk is at most this many times the largest measured: a small one says little of a large
one."""
IDLE_S = 1.0
"""What a turn may take while no answer is running: how late a cancel may then take effect."""
PATIENCE = 4.0
"""Where more than half as many requests wait for their prefill as decode, the gap may grow in that
proportion, up to this many times the target: holding seven back for one would help nobody."""
AT_ONCE = 1.5
"""The last tokens that anybody waits for may take this many times the target, once."""
WEIGHT = 0.25
"""Of a new measurement in the running means."""


class PrefillBudget:
    """Keeps the gap between tokens that running requests see near its target."""

    def __init__(self, *, chunk_max: int, gap_target_s: float) -> None:
        self.chunk_max = max(chunk_max, CHUNK_MIN)
        self.gap_target_s = gap_target_s
        self.restarted()

    def restarted(self) -> None:
        """Forget what was measured: the engine has just started."""
        self._decode_s = 0.0
        self._largest = 0.0
        # Running means over turns with prefill, of one call: tokens, seconds, and their products.
        self._n = self._s = self._nn = self._ns = 0.0

    def decoded(self, *, seconds: float) -> None:
        """A decode step took `seconds`, in a turn without prefill."""
        self._decode_s = _mean(self._decode_s or seconds, seconds)

    def prefilled(self, *, seconds: float, tokens: int, calls: int) -> None:
        """`tokens` took `seconds`, in `calls` of the model, one at least."""
        each, each_s = tokens / calls, seconds / calls
        if not self._largest:
            self._n, self._s = each, each_s
            self._nn, self._ns = each**2, each * each_s
        self._n, self._s = _mean(self._n, each), _mean(self._s, each_s)
        self._nn, self._ns = _mean(self._nn, each**2), _mean(self._ns, each * each_s)
        self._largest = max(self._largest, each)

    def chunk(self, *, decoding: int, waiting: int, left: int) -> int:
        """For a turn in which `decoding` requests decode, `waiting` need `left` tokens in all."""
        if not self._largest:
            return min(CHUNK_FIRST, self.chunk_max)
        fixed_s, token_s = self._line()
        if decoding:
            share = min(max(1.0, 2 * waiting / decoding), PATIENCE)
            allowed_s = self.gap_target_s * share - self._decode_s
            # Where the fixed cost alone is too much, at least as much goes into tokens.
            allowed_s = max(allowed_s - fixed_s, min(fixed_s, self.gap_target_s))
            if left * token_s <= AT_ONCE * self.gap_target_s:
                # One longer gap takes less of everybody's time than a bit in each of many.
                allowed_s = max(allowed_s, AT_ONCE * self.gap_target_s)
        else:
            allowed_s = IDLE_S - fixed_s
        fitting = int(max(allowed_s, 0.0) / token_s)
        return max(CHUNK_MIN, min(fitting, int(GROWTH * self._largest), self.chunk_max))

    def _line(self) -> tuple[float, float]:
        """The fixed cost and the cost of a token, in seconds."""
        mean_s = max(self._s / max(self._n, 1.0), 1e-9)
        variance = self._nn - self._n**2
        if variance < 1.0:
            return 0.0, mean_s
        slope = (self._ns - self._n * self._s) / variance
        # Noise may tilt the line beyond reason: tokens cost a quarter of it all at least (then the
        # next chunk is half as large again, and says more), and no more than all.
        slope = min(max(slope, mean_s / 4), mean_s)
        fixed_s = max(self._s - slope * self._n, 0.0)
        if self._decode_s and fixed_s > self._decode_s:
            # What is fixed is reading the weights, and a decode step does that too: a line that
            # says more has mistaken a growing context for it.
            fixed_s = self._decode_s
            slope = (self._s - fixed_s) / self._n
        return fixed_s, slope


def _mean(old: float, new: float) -> float:
    return old + WEIGHT * (new - old)
