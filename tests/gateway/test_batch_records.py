"""How batches are told of, and counted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.batch_rig import STREAMS, answer, open_queue
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.batch_jobs import request_id_of
from trio_worker.gateway.batch_records import BatchRecord, Tally, batch_of_file, output_id, page_of
from trio_worker.gateway.batch_store import BatchStore
from trio_worker.gateway.batch_tally import AHEAD, looked_after, stored_at
from trio_worker.gateway.directory import ANSWER_S, Directory
from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.jetstream import MemoryJetStream

RECORD = BatchRecord(
    id="batch_1",
    caller="-",
    input_file_id="file-1",
    endpoint="/v1/completions",
    created_at=100,
    expires_at=500,
    keep_results_s=400,
    priority="low",
    total=1000,
    in_progress_at=101,
    submitted_at=102,
)


@pytest.mark.parametrize(
    ("times", "status"),
    [
        ({"in_progress_at": None}, "validating"),
        ({}, "in_progress"),
        ({"cancelling_at": 1}, "cancelling"),
        ({"cancelling_at": 1, "cancelled_at": 2}, "cancelled"),
        ({"completed_at": 1}, "completed"),
        ({"expired_at": 1}, "expired"),
        ({"failed_at": 1}, "failed"),
    ],
)
def test_a_status_is_what_has_happened_last(times: dict[str, int], status: str) -> None:
    record = replace(RECORD, **times)
    assert record.status == status
    assert record.is_over is (status in {"cancelled", "completed", "expired", "failed"})


def test_files_of_answers_are_there_when_there_is_something_in_them() -> None:
    def files(record: BatchRecord, **tally: int) -> tuple[bool, bool]:
        told = record.told(Tally(**tally))
        return told["output_file_id"] is not None, told["error_file_id"] is not None

    done = replace(RECORD, completed_at=200)
    assert files(done, succeeded=1000) == (True, False)
    assert files(done, failed=1000) == (False, True)
    assert files(done, succeeded=1, failed=999) == (True, True)
    assert files(RECORD, succeeded=5) == (False, False), "not before its end"
    assert files(replace(RECORD, expired_at=500), succeeded=5) == (True, True)
    assert files(replace(RECORD, failed_at=500)) == (False, False)


def test_a_file_of_answers_tells_its_batch() -> None:
    assert batch_of_file(output_id("batch_1")) == ("batch_1", False)
    assert batch_of_file("file-batch_1-errors") == ("batch_1", True)
    assert batch_of_file("file-0123") is None


@given(count=st.integers(0, 30), limit=st.integers(1, 12))
def test_pages_together_are_the_list(count: int, limit: int) -> None:
    told: list[dict[str, Any]] = [
        {"id": f"f{number}", "created_at": number // 3} for number in range(count)
    ]
    seen: list[str] = []
    after = None
    while True:
        page = page_of(told, after=after, limit=limit, is_newest_first=True)
        seen += [each["id"] for each in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert sorted(seen) == sorted(each["id"] for each in told)
    assert len(seen) == count
    with pytest.raises(InvalidRequest, match="after: there is no f99 in this list"):
        page_of(told, after="f99", limit=1, is_newest_first=True)


def test_times_of_the_server_are_read() -> None:
    assert stored_at({"Nats-Time-Stamp": "1994-11-06T08:49:37.123456789Z"}) == 784111777
    assert stored_at({"Nats-Time-Stamp": "1994-11-06T08:49:37Z"}) == 784111777
    assert stored_at({"Nats-Time-Stamp": "soon"}) == stored_at({}) == 0


async def test_answers_are_counted_on_from_the_first_that_is_missing(
    autojump_clock: MockClock,
) -> None:
    server = MemoryServer(random=random.Random(1))
    MemoryJetStream(server)
    async with (
        open_memory_broker(server, name="here") as broker,
        open_queue(broker, job_s=None) as worker,
    ):
        store = BatchStore(worker.js)
        await store.ensure()
        await store.begin(RECORD)

        async def say(*numbers: int) -> None:
            for number in numbers:
                await answer(worker.js, request_id_of(RECORD.id, number), fails=number % 10 == 0)

        async def look(now: int = 200) -> tuple[BatchRecord, Tally]:
            found = await store.batch(None, RECORD.id)
            assert found is not None
            return await looked_after(store, STREAMS.results, *found, lambda: now)

        await say(*range(1, 101), *range(105, 110), 250, 100 + AHEAD + 250)
        record, tally = await look()
        assert record.counted == 100
        assert (tally.succeeded, tally.failed) == (95, 11), "but for what is far behind a gap"
        assert tally.prompt_tokens == 95 * 3
        await say(*range(101, 105), 110, *range(111, 250), *range(251, 100 + AHEAD + 250))
        record, tally = await look()
        assert record.counted == tally.answered == 100 + AHEAD + 250
        await say(*range(100 + AHEAD + 251, 1001))
        record, tally = await look()
        assert record.status == "completed"
        assert (tally.succeeded, tally.failed) == (900, 100)
        assert (await look(10_000))[0] == record, "what is over stays as it is"


async def test_workers_are_asked_once_and_not_waited_for_for_long(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        directory = Directory(lambda: 1.0)
        began = trio.current_time()
        await directory.ask_once(rig.caller)
        assert [each.worker_id for each in directory.offers] == ["w1"]
        assert trio.current_time() - began < ANSWER_S
    server = MemoryServer(random=random.Random(1))
    async with open_memory_broker(server, name="alone") as broker:
        directory = Directory(lambda: 1.0)
        with trio.fail_after(2 * ANSWER_S):
            await directory.ask_once(broker)
        assert not directory.offers
