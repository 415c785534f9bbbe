"""What a model computes on, and what that is called."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from trio_worker.engine.cpu.blas import MISSING, preload_blas


def on_cpu() -> bool:
    """Whether this machine has nothing better to compute with."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def accelerator() -> str:
    """`metal`, `cuda` or `cpu`."""
    if on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def described(module: Any) -> str:
    """The device and what a model's numbers are on it, for people."""
    kinds = {array.dtype for _, array in tree_flatten(module.parameters())}
    number = next(
        (
            str(kind).rpartition(".")[2]
            for kind in (mx.float32, mx.bfloat16, mx.float16)
            if kind in kinds
        ),
        "quantised",
    )
    if on_cpu():
        blas = preload_blas()
        if blas == "none":
            blas = "without BLAS"
        return " ".join(part for part in ("cpu", number, blas) if part)
    chip = str(mx.device_info().get("device_name") or mx.default_device())
    packed = " quantised" if mx.uint32 in kinds else ""
    return f"{chip} {number}{packed}"


def blas_warning() -> str | None:
    """What the user loses for want of a fast BLAS, where that is so."""
    return MISSING if on_cpu() and preload_blas() == "none" else None
