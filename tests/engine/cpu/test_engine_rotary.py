"""Rotary positions whose tables all layers share, against MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from support.tiny_model import LAYERS, admits, write_tiny_model

from trio_worker.engine.cpu import rotary
from trio_worker.engine.cpu.rotary import SharedRoPE
from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch
from trio_worker.protocol.turn import Work

pytestmark = pytest.mark.mlx

THREE = mx.array([5, -2, 4000])
OTHER_THREE = mx.array([0, 7, 8191])


def normal(rows: int, heads: int, length: int, width: int) -> mx.array:
    return mx.random.normal((rows, length, heads, width)).transpose(0, 2, 1, 3)


@pytest.mark.parametrize(("base", "scale"), [(10_000.0, 1.0), (500_000.0, 0.25)])
def test_it_says_what_mlx_says_in_whatever_order_it_is_asked(base: float, scale: float) -> None:
    theirs = nn.RoPE(16, base=base, scale=scale)
    ours = SharedRoPE(16, base=base, scale=scale)
    asked: list[tuple[int, int, Any]] = [
        (1, 1, 0),
        (1, 1, 8000),
        (1, 30, 8000),
        (1, 30, 7),
        (3, 1, THREE),
        (3, 30, THREE),
        (3, 30, OTHER_THREE),
        (3, 1, OTHER_THREE),
        (1, 1, mx.array([0])),
        (1, 1, 0),
        (3, 1, THREE),
        (3, 1, THREE + 1),
    ]
    for rows, length, offset in asked:
        for heads in (6, 2):
            x = normal(rows, heads, length, 16)
            assert mx.array_equal(ours(x, offset=offset), theirs(x, offset=offset))


@pytest.mark.parametrize(
    "x",
    [normal(2, 3, 4, 24), normal(2, 3, 4, 16).astype(mx.bfloat16), mx.random.normal((3, 4, 16))],
    ids=["wider than what is rotated", "16 bits", "without heads"],
)
def test_what_it_was_not_made_for_is_left_to_mlx(x: mx.array) -> None:
    wanted = nn.RoPE(16, base=10_000.0)(x, offset=3)
    got = SharedRoPE(16, base=10_000.0, scale=1.0)(x, offset=3)
    assert got.dtype == x.dtype
    assert mx.array_equal(got, wanted)


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self, *ropes: Any) -> None:
        super().__init__()
        self.layers = [_Layer(rope) for rope in ropes]


def test_layers_that_rotate_alike_share_one_and_others_do_not() -> None:
    model = _Model(
        nn.RoPE(8), nn.RoPE(8), nn.RoPE(8, base=500.0), nn.RoPE(8, traditional=True), nn.RoPE(8)
    )
    rotary.use_for(model)
    first, second, other, traditional, last = (layer.rope for layer in model.layers)
    assert first is second is last
    assert type(first) is type(other) is SharedRoPE
    assert first is not other
    assert other.base == 500.0
    assert type(traditional) is nn.RoPE


def test_a_model_that_rotates_otherwise_stays_as_it_is() -> None:
    other = nn.SinusoidalPositionalEncoding(8)
    model = _Model(other, other)
    rotary.use_for(model)
    assert all(layer.rope is other for layer in model.layers)


def test_a_step_and_a_call_for_prompts_compute_one_table_for_all_layers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(write_tiny_model(tmp_path / "tiny")), None, lambda *_: None)
    batch = open_batch(model, 0)
    computed = []
    plain = mx.cos

    def counted(angles: mx.array) -> mx.array:
        computed.append(angles.shape)
        return plain(angles)

    monkeypatch.setattr(mx, "cos", counted)
    assert LAYERS > 1
    batch.turn(Work(admit=admits(20, 22, 25), prefill_tokens=128))
    assert [shape[2] for shape in computed] == [24, 1, 1], "the prompts, and two steps"
    computed.clear()
    for _ in range(3):
        batch.turn(Work(prefill_tokens=128))
    assert [shape[:3] for shape in computed] == [(3, 1, 1)] * 3
