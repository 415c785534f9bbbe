"""The log-probabilities of one step's tokens, for the rows that have asked for them."""

from __future__ import annotations

from typing import Any, TypeAlias

import mlx.core as mx


class Logprobs:
    """The log-probabilities of one step, read from the device once and for all rows."""

    def __init__(self, chosen: mx.array, tops: mx.array | None, values: mx.array | None) -> None:
        self._arrays = (chosen, tops, values)
        self._read: list[Any] | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in self._arrays if array is not None]

    def read(self, index: int, top: int) -> tuple[float, list[tuple[int, float]]]:
        """Of the asking row `index`: its token's value, and its `top` likeliest tokens."""
        if self._read is None:
            self._read = [None if a is None else a.tolist() for a in self._arrays]
        chosen, tops, values = self._read
        if not top or tops is None:
            return chosen[index], []
        return chosen[index], list(zip(tops[index][:top], values[index][:top], strict=True))


Place: TypeAlias = tuple[Logprobs, int]
"""Where those of a row's token are."""
