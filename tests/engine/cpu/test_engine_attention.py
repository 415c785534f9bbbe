"""Attention of our own, against MLX's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from trio_worker.engine.cpu import attention
from trio_worker.engine.shared_prefixes import Segment

pytestmark = pytest.mark.mlx

RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> mx.array:
    return mx.array(RANDOM.standard_normal(shape).astype(np.float32))


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
    monkeypatch.setattr(attention, "_BLOCK", 1 << 12)
    queries, keys = normal(rows, 6, length, 16), normal(rows, groups, total, 16)
    values, mask = normal(rows, groups, total, 8), masks(rows, length, total)[kind]
    settings: dict[str, Any] = {"scale": 0.25, "mask": mask}
    wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, **settings)
    got = attention.attend(queries, keys, values, **settings)
    assert got.shape == wanted.shape
    assert np.max(np.abs(np.array(got - wanted))) < 5e-6


@pytest.mark.parametrize("kind", masks(1, 1, 1))
@pytest.mark.parametrize(("length", "own"), [(1, 9), (7, 7), (7, 30), (70, 90)])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_see_what_they_begin_with_as_if_it_were_their_own(
    length: int, own: int, groups: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 1 << 12)
    stems: list[Any] = [(normal(1, groups, n, 16), normal(1, groups, n, 8)) for n in (5, 40)]
    segments = [Segment(2, stems[0]), Segment(1, None), Segment(3, stems[1]), Segment(1, stems[0])]
    rows = sum(segment.rows for segment in segments)
    queries, keys = normal(rows, 6, length, 16), normal(rows, groups, own, 16)
    values, mask = normal(rows, groups, own, 8), masks(rows, length, own)[kind]
    settings: dict[str, Any] = {"scale": 0.25, "mask": mask}
    got = attention.attend(queries, keys, values, segments=segments, **settings)
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
    attended = attention.attend(
        normal(1, 2, 3, 4), normal(1, 2, 9, 4), normal(1, 2, 9, 4), scale=1.0, mask=mask
    )
    assert mx.all(mx.isfinite(attended)).item()
