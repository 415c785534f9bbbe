"""Every job is answered once while processes die: short runs of `python -m chaos.jobs`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.tiny_model import write_tiny_model

from chaos.jobs import run_jobs

pytestmark = [pytest.mark.nats, pytest.mark.mlx]


@pytest.mark.parametrize(
    ("trouble", "jobs"),
    [
        ("workers", 30),
        pytest.param("workers", 120, marks=pytest.mark.thorough),
        pytest.param("server", 120, marks=pytest.mark.thorough),
        pytest.param("freeze", 120, marks=pytest.mark.thorough),
    ],
)
async def test_every_job_is_answered_once_through_kills_freezes_and_restarts(
    trouble: str, jobs: int, tmp_path: Path
) -> None:
    """The same seed each time; `just chaos-jobs` draws a new one, and has more jobs."""
    seed = int(os.environ.get("CHAOS_SEED", "7"))
    model = str(write_tiny_model(tmp_path / "tiny"))
    summary = await run_jobs(tmp_path, model, seed=seed, jobs=jobs, trouble=trouble)
    assert summary.startswith(f"seed {seed}")
    assert f"'{trouble}'" in summary, "nothing has happened"
