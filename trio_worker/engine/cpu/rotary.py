"""Rotary positions on a CPU, whose sines and cosines are computed once for all layers.

MLX computes them again for the queries and the keys of every layer, one element at a time, and
applies them in a dozen operations, which takes some 7 % of a decode step. The rotation itself is
that of Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten


class SharedRoPE(nn.RoPE):  # type: ignore[misc]
    """`nn.RoPE` for all layers of a model.

    Holds the tables of the last positions it was asked for: of the same array, or number, and
    as many tokens. mlx-lm's caches take another array when they move on; none changes one in place.
    """

    def __init__(self, dims: int, *, base: float, scale: float) -> None:
        super().__init__(dims, base=base, scale=scale)
        half = dims // 2
        # As MLX computes them, so that far positions are the same.
        self._frequencies = mx.exp(mx.arange(0, -half, -1) * (math.log(base) / half))
        self._asked: tuple[Any, int] = (None, 0)
        self._tables: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate `x` of shape (rows, heads, length, width), from each row's `offset` on."""
        if x.shape[-1] != self.dims or x.ndim != 4 or x.dtype != mx.float32:
            rotated: mx.array = super().__call__(x, offset)
            return rotated
        cos, sin = self._tables_of(offset, x.shape[-2])
        half = self.dims // 2
        return _rotated(x, mx.concatenate([x[..., half:], x[..., :half]], axis=-1), cos, sin)

    def _tables_of(self, offset: Any, length: int) -> tuple[mx.array, mx.array]:
        last, count = self._asked
        # Arrays are the same by being one, numbers by their value.
        same = offset is last or (
            isinstance(offset, int) and isinstance(last, int) and offset == last
        )
        if self._tables is None or not same or length != count:
            begins = offset.reshape(-1, 1, 1, 1) if isinstance(offset, mx.array) else offset
            positions = (begins + mx.arange(length).reshape(1, 1, -1, 1)) * self.scale
            angles = positions * self._frequencies
            cos, sin = mx.cos(angles), mx.sin(angles)
            self._tables = (
                mx.concatenate([cos, cos], axis=-1),
                mx.concatenate([-sin, sin], axis=-1),
            )
            self._asked = (offset, length)
        return self._tables


@partial(mx.compile, shapeless=True)
def _rotated(x: mx.array, other_half: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return x * cos + other_half * sin


def use_for(module: Any) -> None:
    """Have all layers of `module` that rotate alike do it by one `SharedRoPE`."""
    shared: dict[tuple[int, float, float], SharedRoPE] = {}
    replaced = []
    for name, layer in module.named_modules():
        if type(layer) is nn.RoPE and not layer.traditional:
            kind = (layer.dims, layer.base, layer.scale)
            if kind not in shared:
                shared[kind] = SharedRoPE(layer.dims, base=layer.base, scale=layer.scale)
            replaced.append((name, shared[kind]))
    module.update_modules(tree_unflatten(replaced))
