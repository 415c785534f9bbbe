"""Where the log goes: lines for people on a terminal, JSON for programs. Uses loguru throughout."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

FORMATS = ("auto", "human", "json")
LEVELS = ("trace", "debug", "info", "warning", "error")


def set_up_logging(*, log_format: str, level: str) -> None:
    """Replace every sink by one on standard error; `auto` is JSON under systemd and launchd."""
    as_json = log_format == "json" or (log_format == "auto" and _is_supervised())
    logger.remove()
    # `diagnose` would print the values of variables beside a traceback: prompts and passwords.
    if as_json:
        logger.add(sys.stderr, level=level.upper(), serialize=True, diagnose=False)
    else:
        logger.add(sys.stderr, level=level.upper(), format=_human, diagnose=False)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)


def _is_supervised() -> bool:
    return "JOURNAL_STREAM" in os.environ or os.environ.get("XPC_SERVICE_NAME", "0") != "0"


def _human(record: Record) -> str:
    request = " <cyan>{extra[request_id]}</cyan>" if "request_id" in record["extra"] else ""
    return f"{{time:HH:mm:ss.SSS}} <level>{{level: <7}}</level>{request} {{message}}\n{{exception}}"


class _ToLoguru(logging.Handler):
    """Libraries that use the standard library's logging end up in the same place."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(exception=record.exc_info).log(
            record.levelname if record.levelname in {"WARNING", "ERROR", "CRITICAL"} else "DEBUG",
            "{}: {}",
            record.name,
            record.getMessage(),
        )


class Progress:
    """Shows the steps of something long: one changing line on a terminal, else a line a step."""

    def __init__(self) -> None:
        self._step = ""
        self._shown = 0
        self._live = sys.stderr.isatty()

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        tenth = 10 * done // total if total else 0
        if step == self._step and not self._live and tenth <= self._shown:
            return
        measure = f" {100 * done // total:3d} % of {total} {unit}" if total else " …"
        if self._live:
            lead = "\n" if self._step not in {"", step} else ""
            sys.stderr.write(f"{lead}\r\x1b[K{step}{measure}")
            sys.stderr.flush()
        else:
            logger.info("{}{}", step, measure)
        self._step, self._shown = step, tenth

    def end(self) -> None:
        """Leave the changing line."""
        if self._live and self._step:
            sys.stderr.write("\n")
        self._step = ""
