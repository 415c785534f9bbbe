"""What holds for every test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from loguru import logger

import trio_worker.client  # noqa: F401 - silences the package, so it has to come before
from trio_worker.engine.cpu.blas import preload_blas

# How long an example takes is the machine's matter, and what else it does.
settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")

# Before any test imports MLX: some compute with the demo model in this process.
preload_blas()


def _write(line: str) -> None:
    # Not bound to one file: pytest puts another in its place for each test.
    sys.stderr.write(line)


# A line per request slows ten virtual minutes of traffic down to many real ones.
logger.enable("trio_worker")
logger.remove()
logger.add(_write, level="WARNING", diagnose=False)


_ALL_MLX = re.compile(r"^pytestmark = .*\bmark\.mlx\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where tests marked `mlx` are left out, whole modules of them need not import it."""
    if collection_path.suffix == ".py" and "not mlx" in config.option.markexpr:
        return True if _ALL_MLX.search(collection_path.read_text(encoding="utf-8")) else None
    return None
