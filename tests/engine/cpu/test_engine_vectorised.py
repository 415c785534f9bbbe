"""Exponentials made of vectorised operations, against MLX's own and against double precision."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, base, llama
from support.tiny_model import admits, write_tiny_model

from trio_worker.engine.cpu import vectorised
from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch
from trio_worker.engine.shared_prefixes import Segment
from trio_worker.protocol.turn import Work

pytestmark = pytest.mark.mlx

RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> mx.array:
    return mx.array(RANDOM.standard_normal(shape).astype(np.float32))


def test_weights_are_those_of_a_softmax() -> None:
    below = np.linspace(-40, 0, 100_001)
    scores = ((below + 20) / 32).astype(np.float32)
    top = 20 / 32
    got = np.array(vectorised.weights_below(mx.array(scores), mx.array([top])), dtype=np.float64)
    exact = np.exp(32 * (scores.astype(np.float64) - top))
    inside = below >= -32
    assert np.max(np.abs(got - exact)[inside] / exact[inside]) < 1e-5
    assert np.max(got[~inside]) < 2e-14, "nothing beside a weight of one"


def test_swiglu_is_what_its_formula_says() -> None:
    gate = np.linspace(-60, 60, 100_001, dtype=np.float32)
    got = np.array(vectorised.swiglu(mx.array(gate), mx.ones(gate.shape)), dtype=np.float64)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    assert np.max(np.abs(got - exact) / np.maximum(1, np.abs(exact))) < 2e-6


def masks(rows: int, length: int, total: int) -> dict[str, Any]:
    seen = np.arange(total)[None] <= np.arange(total - length, total)[:, None]
    begins = RANDOM.integers(0, total - length + 1, (rows, 1, 1, 1))
    padded = seen[None, None] & (np.arange(total) >= begins)
    return {
        "none": None,
        "causal": "causal",
        "shared": mx.array(seen),
        "padded": mx.array(padded),
        "padding only": mx.array(np.arange(total) >= begins),
        "added": mx.array(np.where(padded, 0.5, -np.inf).astype(np.float32)),
    }


@pytest.mark.parametrize("kind", masks(1, 1, 1))
@pytest.mark.parametrize(
    ("rows", "length", "total"), [(1, 1, 300), (8, 1, 61), (1, 130, 130), (3, 70, 200)]
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_that_of_mlx(
    rows: int, length: int, total: int, groups: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorised, "_BLOCK", 1 << 12)
    queries, keys = normal(rows, 6, length, 16), normal(rows, groups, total, 16)
    values, mask = normal(rows, groups, total, 8), masks(rows, length, total)[kind]
    settings: dict[str, Any] = {"scale": 0.25, "mask": mask}
    wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, **settings)
    got = vectorised.attend(queries, keys, values, **settings)
    assert got.shape == wanted.shape
    assert np.max(np.abs(np.array(got - wanted))) < 5e-6


@pytest.mark.parametrize("kind", masks(1, 1, 1))
@pytest.mark.parametrize(("length", "own"), [(1, 9), (7, 7), (7, 30), (70, 90)])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_see_what_they_begin_with_as_if_it_were_their_own(
    length: int, own: int, groups: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorised, "_BLOCK", 1 << 12)
    stems: list[Any] = [(normal(1, groups, n, 16), normal(1, groups, n, 8)) for n in (5, 40)]
    segments = [Segment(2, stems[0]), Segment(1, None), Segment(3, stems[1]), Segment(1, stems[0])]
    rows = sum(segment.rows for segment in segments)
    queries, keys = normal(rows, 6, length, 16), normal(rows, groups, own, 16)
    values, mask = normal(rows, groups, own, 8), masks(rows, length, own)[kind]
    settings: dict[str, Any] = {"scale": 0.25, "mask": mask}
    got = vectorised.attend(queries, keys, values, segments=segments, **settings)
    begun = [stem for count, stem in segments for _ in range(count)]
    for row, stem in enumerate(begun):
        alone = slice(row, row + 1)
        parts = [keys[alone], values[alone]]
        if isinstance(mask, mx.array) and mask.ndim > 2:
            settings["mask"] = mask[alone]
        if stem is not None:
            parts = [mx.concatenate(list(each), axis=2) for each in zip(stem, parts, strict=True)]
            shown = settings["mask"]
            if isinstance(shown, mx.array):
                seen = shown.dtype.size == 1
                before = mx.full((*shown.shape[:-1], stem[0].shape[2]), seen, dtype=shown.dtype)
                settings["mask"] = mx.concatenate([before, shown], axis=-1)
        wanted = mx.fast.scaled_dot_product_attention(queries[alone], *parts, **settings)
        settings["mask"] = mask
        assert np.max(np.abs(np.array(got[alone] - wanted))) < 5e-6


def test_a_row_that_sees_nothing_stays_finite() -> None:
    mask = mx.zeros((1, 1, 1, 9), dtype=mx.bool_)
    attended = vectorised.attend(
        normal(1, 2, 3, 4), normal(1, 2, 9, 4), normal(1, 2, 9, 4), scale=1.0, mask=mask
    )
    assert mx.all(mx.isfinite(attended)).item()


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": mx.bfloat16},
        {"mask": mx.array(RANDOM.random((1, 4, 20, 30)) > 0.3)},
        {"sinks": normal(4)},
    ],
    ids=["16 bits", "a mask for each head", "sinks"],
)
def test_what_it_was_not_made_for_is_left_to_mlx_lm(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorised, "_FEWEST_SCORES", 0)
    dtype = other.pop("dtype", mx.float32)
    arrays: Any = [normal(1, heads, length, 8) for heads, length in ((4, 20), (2, 30), (2, 30))]
    arrays = [array.astype(dtype) for array in arrays]
    settings: dict[str, Any] = {"cache": None, "scale": 0.3, "mask": None, **other}
    wanted = base.scaled_dot_product_attention(*arrays, **settings)
    got: Any = vectorised._scaled_dot_product_attention(*arrays, **settings)
    assert got.dtype == dtype
    assert mx.array_equal(got, wanted).item()


def test_a_models_layers_call_them_and_say_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(write_tiny_model(tmp_path / "tiny")), None, lambda *_: None)
    assert llama.swiglu is not activations.swiglu
    assert llama.scaled_dot_product_attention is not base.scaled_dot_product_attention
    answers = []
    for fewest in (10**9, 0):
        monkeypatch.setattr(vectorised, "_FEWEST_GATES", fewest)
        monkeypatch.setattr(vectorised, "_FEWEST_SCORES", fewest)
        batch, tokens = open_batch(model, 0), []
        done = batch.turn(Work(admit=admits(4, 90, 100), prefill_tokens=64))
        while True:
            tokens += [(output.request_id, output.token) for output in done.outputs]
            if not done.residents:
                break
            done = batch.turn(Work(prefill_tokens=64))
        answers.append(tokens)
    assert len(answers[0]) > 3
    assert answers[0] == answers[1]
