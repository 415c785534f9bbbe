"""Where things are in the repository."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"
PACKAGE = REPOSITORY / "trio_worker"
DOCS = REPOSITORY / "docs"
