"""Nothing is lost while processes die and lines break: a short run of `python -m chaos`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.tiny_model import write_tiny_model

from chaos.run import run_chaos

pytestmark = [pytest.mark.nats, pytest.mark.mlx]

SECONDS = 12.0


async def test_every_request_is_ended_once_through_kills_hangs_and_broken_lines(
    tmp_path: Path,
) -> None:
    """The same seed each time, so that a change is not blamed for another one's bug.

    `just chaos` draws a new one; `CHAOS_SEED` takes the one that a failure has printed.
    """
    seed = int(os.environ.get("CHAOS_SEED", "7"))
    model = str(write_tiny_model(tmp_path / "tiny"))
    summary = await run_chaos(tmp_path, model, seed=seed, seconds=SECONDS)
    assert summary.startswith(f"seed {seed}")
