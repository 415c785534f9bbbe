"""The log never waits for whoever reads it, and says what it is about."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import select
import tty
from collections.abc import Iterator

import pytest
from loguru import logger

from trio_worker.logs import (
    DEBUG_LINES_PER_SECOND,
    LINES_PER_SECOND,
    RateLimit,
    Terminal,
    _human,
    _json,
    _ToLoguru,
)


def fail(secret: str) -> None:
    raise ValueError(len(secret))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 16384)
    yield read, write
    os.close(read)
    os.close(write)


def test_a_reader_that_is_stuck_costs_lines_and_no_time(pipe: tuple[int, int]) -> None:
    read, write = pipe
    terminal = Terminal(write)
    for _ in range(200):
        terminal.write("x" * 200 + "\n")
    assert terminal.dropped > 50
    assert not select.select([], [write], [], 0)[1], "a write would have blocked"
    os.read(read, 1 << 20)
    terminal.write("after\n")
    said = os.read(read, 1 << 20).decode()
    assert said.startswith("(")
    assert said.endswith("log lines were dropped)\nafter\n")
    assert terminal.dropped == 0


def test_a_reader_that_has_gone_costs_lines_only() -> None:
    read, write = os.pipe()
    os.close(read)
    terminal = Terminal(write)
    terminal.write("x\n")
    assert terminal.dropped == 1
    os.close(write)


def test_json_lines_carry_what_was_bound_and_no_values_of_variables() -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format=_json, diagnose=False, level="DEBUG")
    try:
        with logger.contextualize(request_id="r1"):
            logger.bind(outcome="ok").debug("Request ended: {}", "ok")
            try:
                fail("do not print")
            except ValueError:
                logger.exception("failed")
    finally:
        logger.remove(sink)
    first, second = (json.loads(str(line)) for line in lines)
    assert first["request_id"] == "r1"
    assert first["outcome"] == "ok"
    assert first["message"] == "Request ended: ok"
    assert first["level"] == "debug"
    assert "ValueError: 12" in second["exception"]
    assert "do not print" not in second["exception"].replace('fail("do not print")', "")


def test_human_lines_carry_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format=_human, level="DEBUG")
    try:
        with logger.contextualize(request_id="r1"):
            logger.info("hello {}", "there")
    finally:
        logger.remove(sink)
    assert " r1 hello there\n" in str(lines[0])


class Clock:
    """Seconds as the test says they are."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def limited() -> Iterator[tuple[list[str], Clock]]:
    """The lines of a log that is limited, and the clock that limits it."""
    lines: list[str] = []
    clock = Clock()
    sink = logger.add(lines.append, format=_json, filter=RateLimit(clock), level="DEBUG")
    yield lines, clock
    logger.remove(sink)


def request_ends(number: int) -> None:
    with logger.contextualize(request_id=f"r{number}"):
        logger.info("Request {} ended", number)


def test_a_thousand_requests_a_second_write_a_bounded_number_of_lines(
    limited: tuple[list[str], Clock],
) -> None:
    """Every statement has its own allowance: what is rare is not lost among what is frequent."""
    lines, clock = limited
    for second in range(3):
        for number in range(1000):
            request_ends(number)
        logger.warning("rare {}", second)
        clock.now += 1
    said = [json.loads(line) for line in lines]
    assert len(said) == 3 * (LINES_PER_SECOND + 1) + 2
    assert [each["message"] for each in said if "rare" in each["message"]] == [
        "rare 0",
        "rare 1",
        "rare 2",
    ]


def test_what_was_asked_for_by_the_level_has_a_wider_bound(
    limited: tuple[list[str], Clock],
) -> None:
    """A log at `debug` is complete at any load that a worker has had so far."""
    lines, _ = limited
    for number in range(3 * DEBUG_LINES_PER_SECOND):
        logger.debug("step {}", number)
    assert len(lines) == DEBUG_LINES_PER_SECOND


def test_how_many_lines_were_left_out_is_said_once(limited: tuple[list[str], Clock]) -> None:
    """Before the next line of any kind, and without the id of a request it is not about."""
    lines, clock = limited
    for number in range(LINES_PER_SECOND + 7):
        request_ends(number)
    assert len(lines) == LINES_PER_SECOND
    clock.now += 60
    with logger.contextualize(request_id="other"):
        logger.warning("later")
    clock.now += 1
    logger.warning("later yet")
    left_out, later, later_yet = (json.loads(line) for line in lines[LINES_PER_SECOND:])
    assert left_out["message"] == (
        f"7 lines were left out, such as: Request {LINES_PER_SECOND} ended"
    )
    assert left_out["level"] == "info"
    assert left_out["left_out"] == 7
    assert "request_id" not in left_out
    assert later["message"] == "later"
    assert later_yet["message"] == "later yet"


def test_libraries_do_not_share_one_allowance(limited: tuple[list[str], Clock]) -> None:
    lines, _ = limited
    handler = _ToLoguru()
    for library, line, count in (("chatty", 7, 1000), ("quiet", 7, 1), ("chatty", 8, 1)):
        record = logging.LogRecord(library, logging.WARNING, "x.py", line, "hm", None, None)
        for _ in range(count):
            handler.emit(record)
    assert len(lines) == LINES_PER_SECOND + 2


def test_on_a_terminal_progress_is_one_line_that_changes_below_the_log() -> None:
    reader, writer = pty.openpty()
    tty.setraw(writer)  # Otherwise a line feed is read as two characters.
    terminal = Terminal(writer)
    terminal.progress("draining", 1, 4, "requests")
    terminal.write("a line of the log\n")
    terminal.end_progress()
    progress = "draining  25 % of 4 requests"
    expected = f"\r\x1b[K{progress}\r\x1b[Ka line of the log\n{progress}\r\x1b[K"
    shown = b""
    while len(shown) < len(expected) and select.select([reader], [], [], 5)[0]:
        shown += os.read(reader, 4096)
    os.close(reader)
    os.close(writer)
    assert shown.decode() == expected


def test_elsewhere_progress_is_a_line_for_each_tenth(pipe: tuple[int, int]) -> None:
    """However many requests a drain waits for."""
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}", level="INFO")
    terminal = Terminal(pipe[1])
    try:
        for done in range(1001):
            terminal.progress("draining", done, 1000, "requests")
        terminal.end_progress()
    finally:
        logger.remove(sink)
    assert len(lines) == 11
    assert str(lines[0]) == "draining   0 % of 1000 requests\n"
    assert str(lines[-1]) == "draining 100 % of 1000 requests\n"
