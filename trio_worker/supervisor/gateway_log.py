"""What the gateway's process writes: lines of the worker's own log, as it would write them."""

from __future__ import annotations

import msgspec
from loguru import logger

LINE_BYTES = 64 * 1024
"""Of one line, tracebacks included; a longer one is broken into several."""
LEVELS = frozenset({"TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"})


def relay(line: str) -> None:
    """Log a line in JSON with its level and what was bound to it; any other line as a warning.

    The latter come from the interpreter, or from a library that writes to standard error.
    """
    try:
        said = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.DecodeError:
        if text := line.rstrip():
            logger.warning("gateway: {}", text)
        return
    level, message = str(said.pop("level", "")).upper(), str(said.pop("message", ""))
    traceback = said.pop("exception", None)
    said.pop("time", None)
    text = message if traceback is None else f"{message}\n{str(traceback).rstrip()}"
    logger.bind(**said).log(level if level in LEVELS else "WARNING", "gateway: {}", text)
