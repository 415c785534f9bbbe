"""A model's weights in single precision, which is what a CPU computes with fastest.

Only float32 matrix products reach the BLAS; quantised and 16-bit ones are some ten times slower.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import dequantize_model

_SHARE_OF_MEMORY = 0.6
"""Weights are widened only while they take less than this of the machine's memory."""


def fits(module: Any) -> bool:
    """Whether its weights in single precision take no more of the memory than they may."""
    return _size_at_float32(module) <= _SHARE_OF_MEMORY * _memory_bytes()


def widen(module: Any) -> None:
    """Bring all weights of `module` into single precision; nothing is computed yet."""
    _unpack_common(module)
    dequantize_model(module)
    module.update(tree_map(_widen, module.parameters()))


def _unpack_common(module: Any) -> None:
    """Dequantise the common kinds of layers, some five times as fast as MLX does on a CPU."""
    plain = []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        if layer.mode != "affine" or layer.bits not in {4, 8}:
            continue
        new: Any = (
            nn.Linear(1, 1, bias=False)
            if isinstance(layer, nn.QuantizedLinear)
            else nn.Embedding(1, 1)
        )
        new.weight = mx.array(_unpack(layer))
        if "bias" in layer:
            new.bias = layer.bias
        plain.append((name, new))
    module.update_modules(tree_unflatten(plain))


def _unpack(layer: Any) -> npt.NDArray[np.float32]:
    packed = np.array(layer.weight).view(np.uint8)
    if layer.bits == 4:
        # The first of two numbers is in the lower half of their byte.
        packed = np.stack((packed & 15, packed >> 4), axis=-1)
    groups = packed.reshape(*layer.scales.shape, layer.group_size).astype(np.float32)
    groups *= np.array(layer.scales.astype(mx.float32))[..., None]
    groups += np.array(layer.biases.astype(mx.float32))[..., None]
    return groups.reshape(*layer.weight.shape[:-1], -1)


def _widen(array: mx.array) -> mx.array:
    narrow = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(mx.float32) if narrow else array


def _size_at_float32(module: Any) -> int:
    size = 0
    for name, array in tree_flatten(module.parameters()):
        if array.dtype == mx.uint32 and name.endswith(".weight"):
            size += array.size * 32  # at most eight 4-bit numbers in each, of four bytes then
        else:
            size += array.size * 4
    return size


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
