"""What stands in the way is said once, and shown until it is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from loguru import logger

from trio_worker.flow.troubles import SAY_AGAIN_S, Troubles


@pytest.fixture(name="log")
def log_fixture() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lambda line: lines.append(str(line).strip()), format="{level} {message}")
    yield lines
    logger.remove(number)


async def test_it_is_said_when_it_is_new_and_now_and_then(
    autojump_clock: object, log: list[str]
) -> None:
    troubles = Troubles("Durable jobs")
    for _ in range(int(SAY_AGAIN_S) + 1):
        troubles.note("results", "full")
        await trio.sleep(1)
    assert log == ["WARNING Durable jobs: full"] * 2
    troubles.note("results", "gone")
    troubles.note("pulls", "off")
    assert troubles.line == "gone; off"
    assert len(log) == 4


async def test_its_end_is_said_once(autojump_clock: object, log: list[str]) -> None:
    troubles = Troubles("Durable jobs")
    troubles.clear("results")
    troubles.note("results", "full")
    troubles.clear("results")
    troubles.clear("results")
    assert troubles.line is None
    assert log == ["WARNING Durable jobs: full", "INFO Durable jobs: results works again"]
    troubles.note("results", "full")
    assert len(log) == 3, "it is news again"
