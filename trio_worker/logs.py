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


class Terminal:
    """Standard error, shared by the log and the line that shows the progress of something long.

    On a terminal that line changes in place and log lines go above it; elsewhere each step, and
    each tenth of it, is a line of the log.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._line = ""
        self._step = ""
        self._shown = 0

    def write(self, text: str) -> None:
        """A line of the log."""
        if self._line:
            text = f"\r\x1b[K{text}{self._line}"
        sys.stderr.write(text)
        sys.stderr.flush()

    def progress(self, step: str, done: int, total: int, unit: str) -> None:
        """Something long has come so far; 0 of 0 where there is no measure."""
        measure = f" {100 * done // total:3d} % of {total} {unit}" if total else " …"
        if self._live:
            self._line = f"{step}{measure}"
            self.write("")
            return
        tenth = 10 * done // total if total else 0
        if step != self._step or tenth > self._shown:
            logger.info("{}{}", step, measure)
        self._step, self._shown = step, tenth

    def end_progress(self) -> None:
        if self._line:
            self._line = ""
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def set_up_logging(*, log_format: str, level: str) -> Terminal:
    """Replace every sink by one on standard error; `auto` is JSON under systemd and launchd."""
    as_json = log_format == "json" or (log_format == "auto" and _is_supervised())
    terminal = Terminal()
    logger.remove()
    # `diagnose` would print the values of variables beside a traceback: prompts and passwords.
    if as_json:
        logger.add(terminal.write, level=level.upper(), serialize=True, diagnose=False)
    else:
        logger.add(
            terminal.write,
            level=level.upper(),
            format=_human,
            colorize=sys.stderr.isatty(),
            diagnose=False,
        )
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    return terminal


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
