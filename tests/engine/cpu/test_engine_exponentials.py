"""Exponentials made of vectorised operations, against double precision."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from trio_worker.engine.cpu import exponentials

pytestmark = pytest.mark.mlx


def test_weights_are_those_of_a_softmax() -> None:
    below = np.linspace(-40, 0, 100_001)
    scores = ((below + 20) / 32).astype(np.float32)
    top = 20 / 32
    got = np.array(exponentials.weights_below(mx.array(scores), mx.array([top])), dtype=np.float64)
    exact = np.exp(32 * (scores.astype(np.float64) - top))
    inside = below >= -32
    assert np.max(np.abs(got - exact)[inside] / exact[inside]) < 1e-5
    assert np.max(got[~inside]) < 2e-14, "nothing beside a weight of one"


def test_swiglu_is_what_its_formula_says() -> None:
    gate = np.linspace(-60, 60, 100_001, dtype=np.float32)
    got = np.array(exponentials.swiglu(mx.array(gate), mx.ones(gate.shape)), dtype=np.float64)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    assert np.max(np.abs(got - exact) / np.maximum(1, np.abs(exact))) < 2e-6
