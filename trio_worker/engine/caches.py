"""The attention cache of rows that are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from trio_worker.engine.shared_prefixes import Segment, Stem

STEP, STEP_LONG = 64, 256
"""By how many tokens the room of rows grows, and that of rows which have as many already. Growing
copies all of them, which long rows had better do seldom; but whoever comes or goes copies the room
that nobody uses as well."""


class RowsCache(BatchKVCache):  # type: ignore[misc]
    """mlx-lm's cache of a batch, made for rows that come and go while others decode.

    1. After rows have come together it has room for more tokens; without it, the next token
       would copy all of it a second time.
    2. Rows of one length have no padding and need no mask for it, which saves its part in every
       layer, and lets a long prompt be computed without looking at what is hidden.
    3. What rows begin with may be a `Stem`. Then all but `offset` is about the tokens after it,
       and the model's attention must ask for `shared`; `can_share` says whether it does.
    """

    keys: Any
    values: Any
    offset: Any
    left_padding: Any
    padded = False
    """Whether rows differ in where they begin."""
    asked = False
    """Whether attention has asked for what is shared."""
    _stems: Sequence[Stem | None]
    """Of each row."""
    _segments: Sequence[Segment]
    _layer = 0

    def __init__(self, left_padding: Sequence[int]) -> None:
        super().__init__(list(left_padding))
        self._share([None] * len(left_padding))

    @classmethod
    def of(
        cls,
        layers: Sequence[Any],
        held: Sequence[int],
        missing: Sequence[int],
        *,
        room: int,
        stems: Sequence[Stem | None] | None = None,
        layer: int = 0,
    ) -> Self:
        """What each `KVCache` holds after its row's stem, `held` tokens of it, ending together.

        A row may begin up to `missing` tokens after what comes next does; `room` is for that.
        """
        longest = max(held)
        padding = [longest - count for count in held]
        rows = cls([p + m for p, m in zip(padding, missing, strict=True)])
        rows.padded = any(padding) or any(missing)
        rows._layer = layer
        rows._share(stems or [None] * len(layers))
        begins = [stem.length if stem else 0 for stem in rows._stems]
        rows.offset += mx.array(begins) + longest
        if not longest:
            return rows
        if len(layers) == 1 and not any(begins):
            # A row by itself goes on in its own memory.
            keys, values = layers[0].keys, layers[0].values
        else:
            places = list(zip(begins, held, padding, strict=True))
            keys, values = (
                _stacked([getattr(layer, name) for layer in layers], places, longest + room)
                for name in ("keys", "values")
            )
        rows.state = keys, values, rows.offset, rows.left_padding, longest
        return rows

    @property
    def step(self) -> int:
        return _step(self.size())

    def shared(self) -> Sequence[Segment]:
        """What rows begin with, for the attention to add; empty if none begins with a stem."""
        self.asked = True
        return self._segments

    def extend(self, other: RowsCache) -> None:
        """Take over the rows of `other`, all to end together."""
        self.padded = self.padded or other.padded or self.size() != other.size()
        self._share([*self._stems, *other._stems])
        if self.keys is None or other.keys is None:
            super().extend(other)
            return
        longest = max(self.size(), other.size())
        places = [(0, each.size(), longest - each.size()) for each in (self, other)]
        keys, values = (
            _stacked([getattr(each, name) for each in (self, other)], places, longest + 1)
            for name in ("keys", "values")
        )
        offset = mx.concatenate([self.offset, other.offset])
        padding = [self.left_padding + places[0][2], other.left_padding + places[1][2]]
        self.state = keys, values, offset, mx.concatenate(padding), longest

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows, in this order."""
        super().filter(batch_indices)
        self._share([self._stems[i] for i in batch_indices])
        # What padding is left is on the device, but a row by itself has none.
        self.padded = self.padded and len(batch_indices) > 1

    def adopt(self, idx: int, stem: Stem) -> None:
        """Let a row that has none, and holds itself what is in `stem`, begin with it."""
        self._share([*self._stems[:idx], stem, *self._stems[idx + 1 :]])
        padding: list[int] = self.left_padding.tolist()
        padding[idx] += stem.length
        cut, count = min(padding), len(padding)
        keys, values, size = self.keys, self.values, self.size() - cut
        if cut:
            keys, values = (_stacked([each], [(cut, size, 0)], size + 1) for each in (keys, values))
        self.state = keys, values, self.offset, mx.array([each - cut for each in padding]), size
        self.padded = count > 1

    def extract(self, idx: int) -> KVCache:
        """A copy of all that a row has."""
        return self.beginning(idx, None)

    def beginning(self, idx: int, length: int | None) -> KVCache:
        """A copy of the first tokens of a row, of all of them if `length` is None."""
        stem = self._stems[idx]
        padding: int = self.left_padding[idx].item()
        own = self.size() - padding
        if length is not None:
            own = min(own, max(length - (stem.length if stem else 0), 0))
        parts = [] if stem is None else [stem.layers[self._layer]]
        keys, values = ([part[which][..., :length, :] for part in parts] for which in (0, 1))
        if own or not parts:
            place = slice(padding, padding + own)
            keys.append(self.keys[idx : idx + 1, :, place])
            values.append(self.values[idx : idx + 1, :, place])
        cache = KVCache()
        cache.keys, cache.values = _joined(keys), _joined(values)
        cache.offset = cache.keys.shape[2]
        return cache

    def make_mask(self, N: int, return_array: bool = False, **others: Any) -> Any:  # noqa: N803, FBT001, FBT002 - mlx-lm's
        """What the next `N` tokens of each row may see; None if everything."""
        windowed = others.get("window_size") is not None
        if windowed and self._segments:
            raise NotImplementedError("a window that begins within a stem")
        if self.padded or return_array or windowed:
            return super().make_mask(N, return_array=return_array, **others)
        return "causal" if N > 1 else None

    def _share(self, stems: Sequence[Stem | None]) -> None:
        self._stems = stems
        self._segments = [
            Segment(len(list(rows)), stem.layers[self._layer] if stem else None)
            for stem, rows in groupby(stems)
        ]
        if not any(stems):
            self._segments = []


def share_positions(layers: Sequence[Any]) -> None:
    """Before a call: have all layers name the rows' positions by one array.

    What is made of it is then made once. The layers are all `RowsCache`s, or none is.
    """
    if isinstance(layers[0], RowsCache):
        for layer in layers[1:]:
            layer.offset = layers[0].offset


def can_share(model: Any) -> bool:
    """Whether the attention of all layers of `model` asks for what rows begin with.

    Nothing is computed for it.
    """
    whole = make_prompt_cache(model)
    if not is_plain(whole):
        return False
    model(mx.array([[0, 0]]), cache=whole)
    stem = Stem(tuple((layer.keys[..., :2, :], layer.values[..., :2, :]) for layer in whole), 2)
    try:
        for length in (1, 2):
            caches = [
                RowsCache.of([cache], [0], [0], room=length, stems=[stem], layer=i)
                for i, cache in enumerate(whole)
            ]
            model(mx.array([[0] * length]), cache=caches)
            if not all(cache.asked for cache in caches):
                return False
    except NotImplementedError:
        return False
    return True


def is_plain(layers: Sequence[Any]) -> bool:
    """Whether `RowsCache.of` can take these."""
    return all(type(layer) is KVCache for layer in layers)


def _stacked(
    arrays: Sequence[mx.array | None], places: Sequence[tuple[int, int, int]], size: int
) -> mx.array:
    """The rows of all arrays, with room for `size` tokens at least.

    A place says, of each array: from which token on, how many tokens, and where they go.
    """
    known = next(array for array in arrays if array is not None)
    count = sum(1 if array is None else array.shape[0] for array in arrays)
    step = _step(size)
    size = -(-size // step) * step
    stacked = mx.zeros((count, known.shape[1], size, known.shape[3]), dtype=known.dtype)
    row = 0
    for array, (first, held, start) in zip(arrays, places, strict=True):
        end = row + (1 if array is None else array.shape[0])
        if array is not None and held:
            stacked[row:end, :, start : start + held] = array[..., first : first + held, :]
        row = end
    return stacked


def _step(size: int) -> int:
    return STEP if size < STEP_LONG else STEP_LONG


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return mx.contiguous(parts[0]) if len(parts) == 1 else mx.concatenate(list(parts), axis=2)
