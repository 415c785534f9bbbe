"""Stand in for mlx-lm's functions where the ones for a CPU are quicker, and leave it the rest."""

from __future__ import annotations

import os
import shutil
from typing import Any

import mlx.core as mx
from mlx_lm.models import activations, base

from trio_worker.engine.caches import RowsCache
from trio_worker.engine.cpu.attention import attend
from trio_worker.engine.cpu.exponentials import swiglu
from trio_worker.engine.mended_mlx_lm import call_instead


def use_for(module: Any) -> None:
    """Have the layers of `module` call these functions instead of mlx-lm's of the same names."""
    call_instead(
        module,
        {
            activations.swiglu: gated,
            base.scaled_dot_product_attention: attended,
        },
    )


def _fewest_gates() -> int:
    """Elements from which this is faster, by whether MLX can fuse operations (it runs `g++`)."""
    return 2048 if shutil.which("g++") and "MLX_DISABLE_COMPILE" not in os.environ else 8192


_FEWEST_GATES = _fewest_gates()
_FEWEST_SCORES = 8192
"""Scores from which this is faster, about: 18,000 where an exponential of MLX's takes 8 ns, hence
some 6,000 where it takes 20."""


def gated(gate: mx.array, x: mx.array) -> mx.array:
    """What mlx-lm's `swiglu` returns."""
    if gate.dtype != mx.float32 or gate.size < _FEWEST_GATES:
        plain: mx.array = activations.swiglu(gate, x)
        return plain
    return swiglu(gate, x)


def attended(  # noqa: PLR0917 - mlx-lm's
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """What mlx-lm's function returns, for rows that may begin with stems.

    Raises `NotImplementedError` where a row does and attention is of a kind that cannot.
    """
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
