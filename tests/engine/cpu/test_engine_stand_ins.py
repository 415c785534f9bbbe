"""What stands in for mlx-lm's functions, against these."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, base, llama
from support.tiny_model import admits, write_tiny_model

from trio_worker.engine.cpu import stand_ins
from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch
from trio_worker.protocol.turn import Work

pytestmark = pytest.mark.mlx

RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> mx.array:
    return mx.array(RANDOM.standard_normal(shape).astype(np.float32))


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
    monkeypatch.setattr(stand_ins, "_FEWEST_SCORES", 0)
    dtype = other.pop("dtype", mx.float32)
    arrays: Any = [normal(1, heads, length, 8) for heads, length in ((4, 20), (2, 30), (2, 30))]
    arrays = [array.astype(dtype) for array in arrays]
    settings: dict[str, Any] = {"cache": None, "scale": 0.3, "mask": None, **other}
    wanted = base.scaled_dot_product_attention(*arrays, **settings)
    got: Any = stand_ins.attended(*arrays, **settings)
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
        monkeypatch.setattr(stand_ins, "_FEWEST_GATES", fewest)
        monkeypatch.setattr(stand_ins, "_FEWEST_SCORES", fewest)
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
