"""Products with the matrix over the vocabulary, which has far more rows than columns, on a CPU.

A BLAS copies such a matrix into the order that suits it before it multiplies it with a few rows.
In blocks that stay in the processor's cache, the copy is read from there.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

TALL = 16
"""So many times as many rows as columns: smaller matrices gain nothing by it."""
BLOCK = 2048
"""Rows of a block; four times as many or half are as fast."""
MANY = 64
"""With so many rows to multiply, copying the matrix takes little of the time."""


class _Embedding(nn.Embedding):  # type: ignore[misc]
    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, self.weight)


class _Linear(nn.Linear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        product = _product(x, self.weight)
        return product + self.bias if "bias" in self else product


def use_for(module: Any) -> None:
    """Replace the layers of `module` that have tall matrices; they keep their weights."""
    others = []
    for name, layer in module.named_modules():
        if type(layer) not in {nn.Linear, nn.Embedding}:
            continue
        outputs, inputs = layer.weight.shape
        if outputs <= TALL * inputs:
            continue
        linear = type(layer) is nn.Linear
        other: Any = _Linear(1, 1, bias="bias" in layer) if linear else _Embedding(1, 1)
        other.update(layer.parameters())
        others.append((name, other))
    module.update_modules(tree_unflatten(others))


def _product(x: mx.array, weight: mx.array) -> mx.array:
    """`x` times the transposed `weight`."""
    count = x.size // x.shape[-1]
    if count >= MANY:
        return x @ weight.T
    if count == 1:
        # Two rows take less time than one, which goes to a routine of its own.
        return (mx.concatenate([x, x], axis=-2) @ weight.T)[..., :1, :]
    blocks = [weight[first : first + BLOCK] for first in range(0, len(weight), BLOCK)]
    return mx.concatenate([x @ block.T for block in blocks], axis=-1)
