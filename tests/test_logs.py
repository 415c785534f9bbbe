"""The log never waits for whoever reads it, and says what it is about."""

from __future__ import annotations

import fcntl
import json
import os
import select
from collections.abc import Iterator

import pytest
from loguru import logger

from trio_worker.logs import Terminal, _human, _json


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
