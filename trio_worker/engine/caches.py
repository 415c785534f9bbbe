"""The attention cache of rows that are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache


class RowsCache(BatchKVCache):  # type: ignore[misc]
    """mlx-lm's cache of a batch, made for rows that come and go while others decode.

    1. After rows have come together it has room for more tokens; without it, the next token
       would copy all of it a second time.
    2. Rows of one length have no padding and need no mask for it, which saves its part in every
       layer, and lets a long prompt be computed without looking at what is hidden.
    """

    keys: Any
    values: Any
    offset: Any
    left_padding: Any
    padded = False
    """Whether rows differ in where they begin."""
    _idx: int

    @classmethod
    def of(
        cls, layers: Sequence[Any], held: Sequence[int], missing: Sequence[int], *, room: int
    ) -> Self:
        """What each `KVCache` holds at its beginning, so many tokens of it, ending together.

        A row may begin up to `missing` tokens after what comes next does; `room` is for that.
        """
        longest = max(held)
        padding = [longest - count for count in held]
        rows = cls([p + m for p, m in zip(padding, missing, strict=True)])
        rows.padded = any(padding) or any(missing)
        if not longest:
            return rows
        rows.offset += longest
        rows._idx = longest
        if len(layers) == 1:
            # A row by itself goes on in its own memory.
            rows.keys, rows.values = layers[0].keys, layers[0].values
            return rows
        places = list(zip(held, padding, strict=True))
        rows.keys, rows.values = (
            _stacked([getattr(layer, name) for layer in layers], places, longest + room)
            for name in ("keys", "values")
        )
        return rows

    def extend(self, other: RowsCache) -> None:
        """Take over the rows of `other`, all to end together."""
        self.padded = self.padded or other.padded or self.size() != other.size()
        if self.keys is None or other.keys is None:
            super().extend(other)
            return
        longest = max(self.size(), other.size())
        places = [(each.size(), longest - each.size()) for each in (self, other)]
        self.keys, self.values = (
            _stacked([getattr(each, name) for each in (self, other)], places, longest + 1)
            for name in ("keys", "values")
        )
        self.left_padding, self.offset = (
            mx.concatenate([self.left_padding + places[0][1], other.left_padding + places[1][1]]),
            mx.concatenate([self.offset, other.offset]),
        )
        self._idx = longest

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows."""
        super().filter(batch_indices)
        # What padding is left is on the device, but a row by itself has none.
        self.padded = self.padded and len(batch_indices) > 1

    def make_mask(self, N: int, return_array: bool = False, **others: Any) -> Any:  # noqa: N803, FBT001, FBT002 - mlx-lm's
        """What the next `N` tokens of each row may see; None if everything."""
        if self.padded or return_array or others.get("window_size") is not None:
            return super().make_mask(N, return_array=return_array, **others)
        return "causal" if N > 1 else None


def is_plain(layers: Sequence[Any]) -> bool:
    """Whether `RowsCache.of` can take these."""
    return all(type(layer) is KVCache for layer in layers)


def _stacked(
    arrays: Sequence[mx.array | None], places: Sequence[tuple[int, int]], size: int
) -> mx.array:
    """The rows of all arrays, of each so many tokens from such a place on, in steps of 256."""
    known = next(array for array in arrays if array is not None)
    count = sum(1 if array is None else array.shape[0] for array in arrays)
    size = -(-size // RowsCache.step) * RowsCache.step
    stacked = mx.zeros((count, known.shape[1], size, known.shape[3]), dtype=known.dtype)
    row = 0
    for array, (held, start) in zip(arrays, places, strict=True):
        end = row + (1 if array is None else array.shape[0])
        if array is not None and held:
            stacked[row:end, :, start : start + held] = array[..., :held, :]
        row = end
    return stacked
