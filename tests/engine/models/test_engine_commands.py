"""The commands of the engine process for people."""

from __future__ import annotations

from typing import Any

import pytest
from support.engine_commands import engine_command, finished
from support.gguf_files import quiet
from support.tiny_model import (
    write_tiny_model,
)

from trio_worker.engine.models.check import check
from trio_worker.engine.models.load import load

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Any:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_the_check_says_whether_a_model_batches_correctly(tiny: Any, tmp_path: Any) -> None:
    code, out, _ = finished(engine_command("check", str(tiny), cache=tmp_path))
    assert code == 0
    assert "batches correctly" in out


def test_the_commands_refuse_an_unknown_model_with_a_sentence(tmp_path: Any) -> None:
    code, out, err = finished(engine_command("prepare", "no-such-model", cache=tmp_path))
    assert (code, out) == (78, "")
    assert err.startswith("unknown model")


def test_the_check_finds_a_model_whose_rows_disturb_each_other(tiny: Any) -> None:
    model = load(str(tiny), None, quiet)
    attention: Any = model.module.layers[0].self_attn

    class Leaking(type(attention)):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return super().__call__(x + x.mean(axis=0, keepdims=True), mask, cache)

    attention.__class__ = Leaking
    assert check(model)
