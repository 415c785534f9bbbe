"""The tiny model, where it is to show what is around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_model import admits, write_tiny_model

from trio_worker.protocol.turn import FinishReason, Output, Work

pytestmark = pytest.mark.mlx


def test_an_endless_ones_answers_go_on_and_every_token_is_text(tmp_path: Path) -> None:
    """Otherwise a stream would have fewer messages than steps, and end when it likes."""
    from trio_worker.engine.models.load import load
    from trio_worker.engine.serve import open_batch

    model = load(str(write_tiny_model(tmp_path / "endless", endless=True)), None, lambda *_: None)
    batch = open_batch(model, 0)
    outputs: list[Output] = []
    report = batch.turn(Work(admit=admits(*range(1, 33))))
    while report.residents:
        outputs += report.outputs
        report = batch.turn(Work())
    outputs += report.outputs
    assert len(outputs) == 32 * 20
    assert all(output.text.isprintable() and output.text for output in outputs)
    assert {output.finish for output in outputs} == {None, FinishReason.LENGTH}
