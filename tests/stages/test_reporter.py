"""The regular report: when it comes, what it says, and when there is nothing to log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import trio
from support.log_records import logged, texts
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker.ports import Message

INTERVAL_S = 8.0
EVERY = f"worker.monitoring.report_interval_ms={1000 * INTERVAL_S:.0f}"
TURN = "worker.simulated.turn_ms=1000"


@pytest.fixture
def records() -> Iterator[list[Any]]:
    """What the log says about reports."""
    with logged("INFO", of="trio_worker.stages.reporter") as records:
        yield records


async def test_a_report_comes_at_each_interval_and_is_the_snapshot_of_that_moment(
    autojump_clock: MockClock,
) -> None:
    got: list[tuple[float, Message]] = []
    async with running_worker(EVERY, TURN) as rig:
        await rig.caller.subscribe(
            "worker.*.stats", lambda message: got.append((trio.current_time(), message))
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=12))
            await trio.sleep(2.5 * INTERVAL_S)
    assert [at for at, _ in got] == [INTERVAL_S, 2 * INTERVAL_S]
    assert {message.subject for _, message in got} == {"worker.w1.stats"}
    first, second = (msgspec.json.decode(message.body) for _, message in got)
    assert (first["worker"]["uptime_s"], second["worker"]["uptime_s"]) == (8, 16)
    assert (first["requests"]["in_flight"], second["requests"]["in_flight"]) == (1, 0)
    assert (first["requests"]["completed"], second["requests"]["completed"]) == (0, 1)
    assert first.keys() == msgspec.to_builtins(rig.snapshot()).keys()


async def test_a_line_is_written_once_and_then_when_something_happened(
    autojump_clock: MockClock, records: list[Any]
) -> None:
    async with running_worker(EVERY, TURN) as rig:
        await trio.sleep(0.5 * INTERVAL_S)
        assert texts(records) == [], "there is nothing to report yet"
        await trio.sleep(3 * INTERVAL_S)
        assert texts(records) == [
            "0 completed, 0 in flight, 0 queued, 0 in the batch, 0.0 tokens/s, 100 MB"
        ]
        records.clear()
        # Nobody has completed and nothing is counted before the end, but one is in flight.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=18))
            await trio.sleep(3 * INTERVAL_S)
        assert [line.partition(", 0 queued")[0] for line in texts(records)] == [
            "0 completed, 1 in flight",
            "0 completed, 1 in flight",
            "1 completed, 0 in flight",
        ]
        assert texts(records)[0].endswith(", 1 in the batch, 0.3 tokens/s, 100 MB")
        records.clear()
        await trio.sleep(3 * INTERVAL_S)
        assert texts(records) == []
        # Some tokens, and no completion.
        await rig.ask(prompt="x", max_tokens=9, timeout_ms=2500)
        await trio.sleep(2 * INTERVAL_S)
        assert len(records) == 1


async def test_a_snapshot_that_the_server_would_not_take_is_said_to_be_too_large(
    autojump_clock: MockClock, records: list[Any]
) -> None:
    got: list[Message] = []
    async with running_worker(EVERY, max_payload=1024) as rig:
        await rig.caller.subscribe("worker.*.stats", got.append)
        await trio.sleep(1.5 * INTERVAL_S)
        assert not got
        assert texts(records)[0].endswith("100 MB; the snapshot is over the server's max_payload")
        rig.server.max_payload = 2**20
        await rig.ask(prompt="x", max_tokens=1)
        await trio.sleep(INTERVAL_S)
        assert len(got) == 1
        assert texts(records)[1].endswith("100 MB")
