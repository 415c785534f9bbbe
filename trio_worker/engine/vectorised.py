"""A model's exponentials on a CPU, from operations that MLX vectorises there.

MLX computes `exp` on x86 one element at a time, some 20 ns each on one core: a third of a decode
step of eight rows, and most of a long prompt. Products and sums of arrays are vectorised, and
fused where MLX finds a compiler (`g++`), so an exponential made of them takes a tenth of that.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import activations, base

_FLOOR = -32.0
"""e to this is nothing beside a sum of which one term is 1, in single precision."""
_SQUARINGS = 5
_BLOCK, _BLOCK_ROWS = 1 << 18, 64
"""Scores computed at once: a megabyte of them, but of so many queries at least, since the keys are
read once for each block."""
_MASKED = -1e30
"""Finite, so that a row of padding, all of it masked, does not become not-a-number."""


def _series(centre: float) -> list[float]:
    """Coefficients of exp(centre + u) for u from -0.5 to 0.5; relative error 1e-8.

    Interpolated at Chebyshev's nodes, so that no table of constants has to be believed.
    """
    chebyshev = np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda u: np.exp(centre + u), 6, domain=[-0.5, 0.5]
    )
    return [float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef]


_BELOW_ZERO, _AROUND_ZERO = _series(-0.5), _series(0.0)


def _power(u: mx.array, series: list[float], squarings: int) -> mx.array:
    """The series at u, to the power of 2 ** squarings. Each squaring doubles the relative error."""
    value = series[-1] * u + series[-2]
    for coefficient in series[-3::-1]:
        value = value * u + coefficient
    for _ in range(squarings):
        value = value * value
    return value


@partial(mx.compile, shapeless=True)
def weights_below(scores: mx.array, top: mx.array) -> mx.array:
    """exp(scores - top), where nothing in `scores` is above `top`; relative error 1e-5 at most."""
    return _power(mx.maximum(scores - top, _FLOOR) * (1 / -_FLOOR) + 0.5, _BELOW_ZERO, _SQUARINGS)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x; error of the silu 2e-6 at most."""
    u = mx.clip(gate, _FLOOR, -_FLOOR) * (0.5 / _FLOOR)
    return gate * x / (1.0 + _power(u, _AROUND_ZERO, _SQUARINGS + 1))


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` returns, for masks that all heads share.

    Goes through the queries in blocks whose scores stay in the processor's own cache.
    """
    rows, heads, length, _ = queries.shape
    total = keys.shape[2]
    block = max(_BLOCK // (rows * heads * total), _BLOCK_ROWS)
    attended = []
    for start in range(0, length, block):
        end = min(start + block, length)
        # What comes later than a block is hidden from all of it.
        seen = total - length + end if isinstance(mask, str) else total
        part = mask
        if isinstance(mask, mx.array) and mask.shape[-2] > 1:
            part = mask[..., start:end, :]
        attended.append(
            _attend_block(
                queries[:, :, start:end],
                keys[:, :, :seen],
                values[:, :, :seen],
                scale=scale,
                mask=part,
            )
        )
    return attended[0] if len(attended) == 1 else mx.concatenate(attended, axis=2)


def _attend_block(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    rows, heads, length, width = queries.shape
    groups, total = keys.shape[1:3]
    # The query heads that share keys become rows of one product.
    scores = (queries * scale).reshape(rows, groups, -1, width) @ keys.swapaxes(-1, -2)
    apart = (rows, groups, heads // groups, length, total)
    if isinstance(mask, str):
        # Only the newest tokens hide anything from each other.
        scores = scores.reshape(apart)
        hidden = mx.triu(mx.full((length, length), _MASKED), k=1)
        scores[..., total - length :] = scores[..., total - length :] + hidden
    elif mask is not None:
        if mask.dtype == mx.bool_:
            mask = mx.where(mask, 0.0, _MASKED)
        scores = scores.reshape(apart) + (mx.expand_dims(mask, -3) if mask.ndim > 2 else mask)
    scores = scores.reshape(rows, groups, -1, total)
    weights = weights_below(scores, scores.max(axis=-1, keepdims=True))
    attended = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return attended.reshape(rows, heads, length, -1)


def use_for(module: Any) -> None:
    """Have the layers of `module` call these functions instead of mlx-lm's of the same names.

    They are looked up in the Python modules that define the layers, for the whole process.
    """
    for name in {type(layer).__module__ for layer in module.modules()}:
        names = vars(sys.modules[name])
        if names.get("swiglu") is activations.swiglu:
            names["swiglu"] = _swiglu
        if names.get("scaled_dot_product_attention") is base.scaled_dot_product_attention:
            names["scaled_dot_product_attention"] = _scaled_dot_product_attention


def _fewest() -> int:
    """Elements from which this is faster, by whether MLX can fuse operations (it runs `g++`)."""
    return 2048 if shutil.which("g++") and "MLX_DISABLE_COMPILE" not in os.environ else 8192


_FEWEST = _fewest()


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    if gate.dtype != mx.float32 or gate.size < _FEWEST:
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
    shared = mask is None or isinstance(mask, str) or mask.ndim < 3 or mask.shape[-3] == 1
    if (
        hasattr(cache, "bits")
        or sinks is not None
        or not shared
        or queries.dtype != mx.float32
        or queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2] < _FEWEST
    ):
        plain: mx.array = base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
        return plain
    return attend(queries, keys, values, scale=scale, mask=mask)
