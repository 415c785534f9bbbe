"""A model's exponentials on a CPU, from operations that MLX vectorises there.

MLX computes `exp` on x86 one element at a time, some 20 ns each on one core: a third of a decode
step of eight rows, and most of a long prompt. Products and sums of arrays are vectorised, and
fused where MLX finds a compiler (`g++`), so an exponential made of them takes a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

SPAN = 32.0
"""e to minus this is nothing beside a sum of which one term is 1, in single precision."""
_EDGE = 20.0
"""What a gate lets through does not change beyond, in single precision."""
_DEGREE, _SQUARINGS = 5, 6
"""Of a series that gives an exponential's 64th root."""


def _series(logarithm: Callable[[Any], Any], low: float, high: float) -> list[float]:
    """Coefficients of a power series for the root of e to `logarithm(w)`, w from `low` to `high`.

    Interpolated at Chebyshev's nodes, so that no table of constants has to be believed.
    """
    chebyshev = np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda w: np.exp(logarithm(w) / 2**_SQUARINGS), _DEGREE, domain=[low, high]
    )
    return [float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef]


_OF_WEIGHTS = _series(lambda w: SPAN * (w / 2 - 1), 0.0, 2.0)
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
