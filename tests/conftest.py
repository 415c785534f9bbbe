"""What holds for every test."""

from __future__ import annotations

import sys

from loguru import logger


def _write(line: str) -> None:
    # Not bound to one file: pytest puts another in its place for each test.
    sys.stderr.write(line)


# A line per request slows ten virtual minutes of traffic down to many real ones.
logger.remove()
logger.add(_write, level="WARNING", diagnose=False)
