"""A model's exponentials on a CPU, from operations that MLX vectorises there.

MLX computes `exp` on x86 one element at a time, some 20 ns each on one core: a third of a decode
step of eight rows, and most of a long prompt. Products and sums of arrays are vectorised, and
fused where MLX finds a compiler (`g++`), so an exponential made of them takes a tenth of that.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import activations, base

from trio_worker.engine.caches import RowsCache
from trio_worker.engine.mended_mlx_lm import call_instead
from trio_worker.engine.shared_prefixes import Part, Segment

_SPAN = 32.0
"""e to minus this is nothing beside a sum of which one term is 1, in single precision."""
_EDGE = 20.0
"""What a gate lets through does not change beyond, in single precision."""
_DEGREE, _SQUARINGS = 5, 6
"""Of a series that gives an exponential's 64th root."""
_BLOCK, _BLOCK_ROWS = 1 << 18, 64
"""Scores computed at once: a megabyte of them, but of so many queries at least, since the keys are
read once for each block."""
_MANY = 1 << 17
"""Numbers from which MLX's `max` and `sum` take longer than vectorised operations that say the
same."""
_MASKED = -1e30
"""Finite, so that a row of padding, all of it masked, does not become not-a-number."""


def _series(logarithm: Callable[[Any], Any], low: float, high: float) -> list[float]:
    """Coefficients of a power series for the root of e to `logarithm(w)`, w from `low` to `high`.

    Interpolated at Chebyshev's nodes, so that no table of constants has to be believed.
    """
    chebyshev = np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda w: np.exp(logarithm(w) / 2**_SQUARINGS), _DEGREE, domain=[low, high]
    )
    return [float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef]


_OF_WEIGHTS = _series(lambda w: _SPAN * (w / 2 - 1), 0.0, 2.0)
_OF_GATES = _series(lambda w: w / 2, -2 * _EDGE, 2 * _EDGE)


def _exponential(w: mx.array, series: list[float]) -> mx.array:
    """Each squaring doubles the relative error."""
    value = series[-1] * w + series[-2]
    for coefficient in series[-3::-1]:
        value = value * w + coefficient
    for _ in range(_SQUARINGS):
        value = value * value
    return value


# Where numbers are cut off, sums of absolute values do it: MLX's `maximum` branches on every
# element, which takes longer than all the rest where half of them are below.


@partial(mx.compile, shapeless=True)
def weights_below(scores: mx.array, top: mx.array) -> mx.array:
    """exp(32 (scores - top)), at least exp(-32); relative error 1e-5 at most.

    Nothing in `scores` is above `top`.
    """
    above = scores - (top - 1.0)
    return _exponential(above + mx.abs(above), _OF_WEIGHTS)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x; error of the silu 2e-6 at most."""
    return gate * x / (1.0 + _exponential(abs(gate - _EDGE) - abs(gate + _EDGE), _OF_GATES))


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
                queries[:, :, start:end] * (scale / _SPAN),
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
        mask = mx.maximum(mask / _SPAN, _MASKED)
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


def use_for(module: Any) -> None:
    """Have the layers of `module` call these functions instead of mlx-lm's of the same names."""
    call_instead(
        module,
        {
            activations.swiglu: _swiglu,
            base.scaled_dot_product_attention: _scaled_dot_product_attention,
        },
    )


def _fewest_gates() -> int:
    """Elements from which this is faster, by whether MLX can fuse operations (it runs `g++`)."""
    return 2048 if shutil.which("g++") and "MLX_DISABLE_COMPILE" not in os.environ else 8192


_FEWEST_GATES = _fewest_gates()
_FEWEST_SCORES = 8192
"""Scores from which this is faster, about: 18,000 where an exponential of MLX's takes 8 ns, hence
some 6,000 where it takes 20."""


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    if gate.dtype != mx.float32 or gate.size < _FEWEST_GATES:
        plain: mx.array = activations.swiglu(gate, x)
        return plain
    return swiglu(gate, x)


def _scaled_dot_product_attention(  # noqa: PLR0917 - mlx-lm's
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    for_all_heads = mask is None or isinstance(mask, str) or mask.ndim < 3 or mask.shape[-3] == 1
    other = (
        hasattr(cache, "bits")
        or sinks is not None
        or not for_all_heads
        or queries.dtype != mx.float32
    )
    segments = cache.shared() if isinstance(cache, RowsCache) else ()
    if segments and other:
        raise NotImplementedError("attention of this kind to what rows have in common")
    if not segments and (
        other
        or queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2] < _FEWEST_SCORES
    ):
        plain: mx.array = base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
        return plain
    return attend(queries, keys, values, scale=scale, mask=mask, segments=segments)
