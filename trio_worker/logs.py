"""Where the log goes: lines for people on a terminal, JSON for programs. Uses loguru throughout."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

FORMATS = ("auto", "human", "json")
LEVELS = ("trace", "debug", "info", "warning", "error")

LINES_PER_SECOND = 100
"""Of one kind, at level `info` and above. Whoever reads the log learns nothing from more."""
DEBUG_LINES_PER_SECOND = 1000
"""Of one kind below `info`, where the log is meant to be complete: still a bound, for any load."""


class Terminal:
    """Standard error, shared by the log and the line that shows the progress of something long.

    On a terminal that line changes in place and log lines go above it; elsewhere each step, and
    each tenth of it, is a line of the log. Nothing here waits: a line that a stuck terminal or pipe
    does not take at once is dropped, and the number of such lines is written as soon as it takes
    something again.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = sys.stderr.fileno() if fd is None else fd
        self._is_terminal = os.isatty(self._fd)
        self._line = ""
        """The progress that stands in the last line of a terminal; "" if there is none."""
        self._step = ""
        self._tenth = 0
        """Elsewhere, the step and the tenth of it that the log has told last."""
        self.dropped = 0
        """Lines that were not taken, and not told of yet."""

    def write(self, text: str) -> None:
        """A line of the log."""
        if self.dropped and self._put(f"({self.dropped} log lines were dropped)\n"):
            self.dropped = 0
        if not self._put(f"\r\x1b[K{text}{self._line}" if self._line else text):
            self.dropped += 1

    def progress(self, step: str, done: int, total: int, unit: str) -> None:
        """Show how far something long is; `total` is 0 where nobody knows how much there is."""
        measure = f" {100 * done // total:3d} % of {total} {unit}" if total else " …"
        if done and not total:
            measure = f" {done} {unit} …"
        if self._is_terminal:
            self._line = f"{step}{measure}"
            self.write("")
            return
        tenth = 10 * done // total if total else 0
        if step != self._step or tenth > self._tenth:
            logger.info("{}{}", step, measure)
        self._step, self._tenth = step, tenth

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


_Kind: TypeAlias = tuple[str | None, int]
"""The module and the line of a statement."""


class RateLimit:
    """A filter: in every second a limited number of lines of each kind pass; the rest is counted.

    The kind of a line is the statement that wrote it, so there are no more kinds than statements.
    How many were left out, and what the first of them said, is a line of its own before the first
    line of a later second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = -1
        self._passed: dict[_Kind, int] = {}
        self._left_out: dict[_Kind, tuple[int, Record]] = {}
        """How many, and the first of them."""

    def __call__(self, record: Record) -> bool:
        if "left_out" in record["extra"]:
            return True
        if (second := int(self._clock())) != self._second:
            self._second = second
            self._passed.clear()
            left_out, self._left_out = self._left_out, {}
            for count, first in left_out.values():
                _say_left_out(count, first)
        kind = record["name"], record["line"]
        passed = self._passed[kind] = self._passed.get(kind, 0) + 1
        informs = record["level"].no >= logger.level("INFO").no
        if passed <= (LINES_PER_SECOND if informs else DEBUG_LINES_PER_SECOND):
            return True
        count, first = self._left_out.get(kind, (0, record))
        self._left_out[kind] = count + 1, first
        return False


def _say_left_out(count: int, first: Record) -> None:
    def unbind(record: Record) -> None:
        # It is about none of the requests, least of all about the one that is served just now.
        record["extra"].clear()
        record["extra"]["left_out"] = count

    logger.patch(unbind).log(
        first["level"].name, "{} lines were left out, such as: {}", count, first["message"]
    )


def set_up_logging(*, log_format: str, level: str) -> Terminal:
    """Replace every sink by one on standard error; `auto` is JSON under systemd and launchd."""
    as_json = log_format == "json" or (log_format == "auto" and _is_supervised())
    terminal = Terminal()
    # As a library this package is silent (calling/on_trio.py).
    logger.enable("trio_worker")
    logger.remove()
    logger.add(
        terminal.write,
        level=level.upper(),
        format=_json if as_json else _human,
        filter=RateLimit(),
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
    """Hands over what libraries write with the standard library's logging."""

    def emit(self, record: logging.LogRecord) -> None:
        def written_there(line: Record) -> None:
            line["name"], line["line"] = record.name, record.lineno

        logger.patch(written_there).opt(exception=record.exc_info).log(
            record.levelname if record.levelname in {"WARNING", "ERROR", "CRITICAL"} else "DEBUG",
            "{}: {}",
            record.name,
            record.getMessage(),
        )
