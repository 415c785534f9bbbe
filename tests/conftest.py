"""What holds for every test."""

from __future__ import annotations

import sys

from loguru import logger

# A line per request slows ten virtual minutes of traffic down to many real ones.
logger.remove()
logger.add(lambda line: sys.stderr.write(line), level="WARNING", diagnose=False)
