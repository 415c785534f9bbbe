"""Attention on a CPU by exponentials that MLX vectorises, in blocks that fit a processor's cache.

Rows may begin with what is held once for several of them (`shared_prefixes.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add

import mlx.core as mx

from trio_worker.engine.cpu.exponentials import SPAN, weights_below
from trio_worker.engine.shared_prefixes import Part, Segment

_BLOCK, _BLOCK_ROWS = 1 << 18, 64
"""Scores computed at once: a megabyte of them, but of at least this many queries, since the keys
are read once for each block."""
_MANY = 1 << 17
"""Numbers from which MLX's `max` and `sum` take longer than vectorised operations that say the
same."""
_MASKED = -1e30
"""Finite, so that a row of padding, all of it masked, does not become not-a-number."""


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    segments: Sequence[Segment] = (),
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` returns, for masks that all heads share.

    With `segments`, the rows of each see all of its stem too, which neither `keys` nor `mask` know
    of. Goes through rows and queries in blocks whose scores stay in the processor's own cache.
    """
    first, attended = 0, []
    for count, stem in segments or [Segment(queries.shape[0], None)]:
        for rows in _row_blocks(first, count, queries, keys, stem):
            hidden = mask
            if isinstance(mask, mx.array) and mask.ndim > 3:
                hidden = _of(mask, rows)
            own = (_of(keys, rows), _of(values, rows))
            attended.append(_attend_rows(_of(queries, rows), own, stem, scale=scale, mask=hidden))
        first += count
    return attended[0] if len(attended) == 1 else mx.concatenate(attended)


def _row_blocks(
    first: int, count: int, queries: mx.array, keys: mx.array, stem: Part | None
) -> Iterator[slice]:
    _, heads, length, _ = queries.shape
    total = keys.shape[2] + (stem[0].shape[2] if stem else 0)
    block = max(_BLOCK // (heads * length * total), 1)
    for start in range(first, first + count, block):
        yield slice(start, min(start + block, first + count))


def _of(array: mx.array, rows: slice) -> mx.array:
    return array if array.shape[0] in {1, rows.stop - rows.start} else array[rows]


def _attend_rows(
    queries: mx.array,
    own_part: Part,
    stem: Part | None,
    *,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    rows, heads, length, _ = queries.shape
    keys, values = own_part
    own = keys.shape[2]
    total = own + (stem[0].shape[2] if stem else 0)
    block = max(_BLOCK // (rows * heads * total), _BLOCK_ROWS)
    attended = []
    for start in range(0, length, block):
        end = min(start + block, length)
        # What comes later than a block is hidden from all of it.
        seen = own - length + end if isinstance(mask, str) else own
        hidden = mask
        if isinstance(mask, mx.array) and mask.shape[-2] > 1:
            hidden = mask[..., start:end, :]
        # Only the newest tokens hide anything from each other.
        old = seen - (end - start) if isinstance(mask, str) else 0
        ends = (0, old, seen) if 0 < old < seen else (0, seen)
        parts = [(keys[:, :, a:b], values[:, :, a:b]) for a, b in itertools.pairwise(ends)]
        attended.append(
            _attend_block(
                queries[:, :, start:end] * (scale / SPAN),
                [stem, *parts] if stem else parts,
                hidden,
            )
        )
    return attended[0] if len(attended) == 1 else mx.concatenate(attended, axis=2)


def _attend_block(
    queries: mx.array, parts: Sequence[Part], mask: mx.array | str | None
) -> mx.array:
    """`mask` is about the last of `parts`; those of one row are for all rows."""
    rows, heads, length, width = queries.shape
    groups = parts[0][0].shape[1]
    # The query heads that share keys become rows of one product.
    queries = queries.reshape(rows, groups, -1, width)
    scores = [_as_rows(queries, len(keys)) @ keys.swapaxes(-1, -2) for keys, _ in parts]
    if mask is not None:
        hidden = mx.triu(mx.full((length, length), _MASKED), k=1) if isinstance(mask, str) else mask
        scores[-1] = _hide(scores[-1], hidden, heads // groups)
    top = reduce(mx.maximum, (_as_rows(_tops(each), rows) for each in scores))
    weights = [weights_below(each, _as_rows(top, len(each))) for each in scores]
    sums = reduce(add, (_as_rows(_sums(each), rows) for each in weights))
    attended = reduce(
        add,
        (
            _as_rows(_product(each, values), rows)
            for each, (_, values) in zip(weights, parts, strict=True)
        ),
    )
    return (attended / sums).reshape(rows, heads, length, -1)


def _product(weights: mx.array, values: mx.array) -> mx.array:
    """Their matrix product; three rows, as of as many heads, take MKL longer than four."""
    if weights.shape[-2] != 3:
        return weights @ values
    four = mx.pad(weights, [(0, 0), (0, 0), (0, 1), (0, 0)])
    return (four @ values)[..., :3, :]


def _as_rows(array: mx.array, rows: int) -> mx.array:
    """From (rows, groups, length, width) to (1, groups, rows * length, width), or back."""
    if len(array) == rows:
        return array
    _, groups, _, width = array.shape
    return array.swapaxes(0, 1).reshape(groups, rows, -1, width).swapaxes(0, 1)


def _hide(scores: mx.array, mask: mx.array, sharing: int) -> mx.array:
    rows, groups, _, total = scores.shape
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, _MASKED)
    else:
        mask = mx.maximum(mask / SPAN, _MASKED)
    apart = scores.reshape(rows, groups, sharing, -1, total)
    return (apart + (mx.expand_dims(mask, -3) if mask.ndim > 2 else mask)).reshape(scores.shape)


def _tops(scores: mx.array) -> mx.array:
    """The highest of the last axis."""
    while scores.size > _MANY and scores.shape[-1] > 1:
        half = (scores.shape[-1] + 1) // 2
        scores = mx.maximum(scores[..., :half], scores[..., -half:])
    return scores.max(axis=-1, keepdims=True)


def _sums(weights: mx.array) -> mx.array:
    """Over the last axis."""
    if weights.size > _MANY:
        return weights @ mx.ones((weights.shape[-1], 1))
    return weights.sum(axis=-1, keepdims=True)
