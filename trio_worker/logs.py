"""Where the log goes: lines for people on a terminal, JSON for programs. Uses loguru throughout."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import traceback
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

FORMATS = ("auto", "human", "json")
LEVELS = ("trace", "debug", "info", "warning", "error")


class Terminal:
    """Standard error, shared by the log and the line that shows the progress of something long.

    On a terminal that line changes in place and log lines go above it; elsewhere each step, and
    each tenth of it, is a line of the log. Nothing here waits: what a stuck terminal or pipe does
    not take at once is dropped, and its number said as soon as it takes something again.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = sys.stderr.fileno() if fd is None else fd
        self._live = os.isatty(self._fd)
        self._line = ""
        self._step = ""
        self._shown = 0
        self.dropped = 0

    def write(self, text: str) -> None:
        """A line of the log."""
        if self.dropped and self._put(f"({self.dropped} log lines were dropped)\n"):
            self.dropped = 0
        if not self._put(f"\r\x1b[K{text}{self._line}" if self._line else text):
            self.dropped += 1

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
            self._put("\r\x1b[K")

    def _put(self, text: str) -> bool:
        """Write it if that does not block; False if it, or a part of it, was not taken.

        Whoever can be written to takes at least `PIPE_BUF` bytes at once (POSIX, pipe(7)).
        """
        data = text.encode(errors="replace")
        for start in range(0, len(data), select.PIPE_BUF):
            try:
                if not select.select([], [self._fd], [], 0)[1]:
                    return False
                os.write(self._fd, data[start : start + select.PIPE_BUF])
            except OSError:
                return False
        return True


def set_up_logging(*, log_format: str, level: str) -> Terminal:
    """Replace every sink by one on standard error; `auto` is JSON under systemd and launchd."""
    as_json = log_format == "json" or (log_format == "auto" and _is_supervised())
    terminal = Terminal()
    logger.remove()
    logger.add(
        terminal.write,
        level=level.upper(),
        format=_json if as_json else _human,
        colorize=not as_json and sys.stderr.isatty(),
        # Would print the values of variables beside a traceback: prompts and passwords.
        diagnose=False,
    )
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    return terminal


def _is_supervised() -> bool:
    return "JOURNAL_STREAM" in os.environ or os.environ.get("XPC_SERVICE_NAME", "0") != "0"


def _human(record: Record) -> str:
    request = " <cyan>{extra[request_id]}</cyan>" if "request_id" in record["extra"] else ""
    return f"{{time:HH:mm:ss.SSS}} <level>{{level: <7}}</level>{request} {{message}}\n{{exception}}"


def _json(record: Record) -> str:
    """One object a line: time, level, message, what was bound to the line, and a traceback."""
    fields: dict[str, object] = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name.lower(),
        "message": record["message"],
        **{key: value for key, value in record["extra"].items() if key != "json"},
    }
    if (exception := record["exception"]) is not None and exception.value is not None:
        fields["exception"] = "".join(traceback.format_exception(exception.value))
    record["extra"]["json"] = json.dumps(fields, default=str, ensure_ascii=False)
    return "{extra[json]}\n"


class _ToLoguru(logging.Handler):
    """Libraries that use the standard library's logging end up in the same place."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(exception=record.exc_info).log(
            record.levelname if record.levelname in {"WARNING", "ERROR", "CRITICAL"} else "DEBUG",
            "{}: {}",
            record.name,
            record.getMessage(),
        )
