"""The client on Trio, against a worker that acts as scripted and against a whole one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from support.peers import CONTROL, Reply, chunk, refusal
from support.worker_rig import WORKER_ID, running_worker
from trio.testing import MockClock

from trio_worker.client import Client
from trio_worker.errors import (
    InternalError,
    NoWorker,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
)
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker


class ScriptedWorker:
    """Answers the first request with the first script, and so on; silent after the last."""

    def __init__(self, broker: MemoryBroker, scripts: list[list[Reply]]) -> None:
        self._broker = broker
        self._scripts = iter(scripts)
        self.requests: list[tuple[float, Any]] = []
        self.cancels: list[Message] = []

    def take(self, message: Message) -> None:
        self.requests.append((trio.current_time(), json.loads(message.body)))
        for body, headers in next(self._scripts, []):
            assert message.reply is not None
            self._broker.publish(
                Message(subject=message.reply, body=body, headers=headers, reply=CONTROL)
            )

    async def listen(self) -> None:
        await self._broker.subscribe("inference", self.take)
        await self._broker.subscribe(CONTROL, self.cancels.append)
        await self._broker.subscribe("inference.cancel", self.cancels.append)


@asynccontextmanager
async def scripted(
    *scripts: list[Reply], listening: bool = True
) -> AsyncIterator[tuple[ScriptedWorker, Client]]:
    server = MemoryServer(random=random.Random(0))
    async with open_memory_broker(server, name="worker") as far:
        worker = ScriptedWorker(far, list(scripts))
        if listening:
            await worker.listen()
        async with open_memory_broker(server, name="caller") as near:
            yield worker, Client(near, timeout_ms=10_000, attempts=3)


async def test_trio_retries_after_the_time_the_error_names(autojump_clock: MockClock) -> None:
    busy = refusal("INTERNAL", retry_after_ms=2000)
    async with scripted([busy], [busy], [chunk(0, "yes", terminal=True)]) as (worker, client):
        began_at = trio.current_time()
        whole = await client.complete({"prompt": "x"})
    assert whole.text == "yes"
    times = [at - began_at for at, _ in worker.requests]
    assert times[0] == 0
    assert 2 <= times[1] <= 3
    assert 4 <= times[2] <= 6
    assert [request["timeout_ms"] for _, request in worker.requests] == [
        math.ceil(10_000 - 1000 * at) for at in times
    ]
    assert len({request["request_id"] for _, request in worker.requests}) == 1


async def test_trio_gives_up_a_second_after_the_deadline_and_cancels(
    autojump_clock: MockClock,
) -> None:
    async with scripted([chunk(0)]) as (worker, client):
        began_at = trio.current_time()
        with pytest.raises(RequestTimeout) as caught:
            await client.complete({"prompt": "x", "timeout_ms": 3000})
        assert trio.current_time() - began_at == pytest.approx(4)
        await trio.sleep(1)
    assert caught.value.details == {"stage": "client"}
    assert [cancel.body for cancel in worker.cancels] == [b"cancel"]


async def test_trio_asks_another_of_the_group_at_once_when_one_is_full(
    autojump_clock: MockClock,
) -> None:
    """Who takes the second message stands for another member of the group."""
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="workers") as far,
        open_memory_broker(server, name="caller") as near,
    ):
        full = [refusal("QUEUE_FULL", retry_after_ms=60_000)]
        worker = ScriptedWorker(far, [full, [chunk(0, "yes", terminal=True)]])
        await worker.listen()
        began_at = trio.current_time()
        whole = await Client(near).complete({"prompt": "x"})
        assert trio.current_time() == began_at
    assert whole.text == "yes"


async def test_trio_waits_for_a_worker_for_the_grace_or_until_the_deadline(
    autojump_clock: MockClock,
) -> None:
    done = [chunk(0, "late", terminal=True)]
    async with scripted(done, listening=False) as (worker, client):
        began_at = trio.current_time()
        with pytest.raises(NoWorker, match="inference"):
            await client.complete({"prompt": "x", "timeout_ms": 2000})
        assert 1.5 < trio.current_time() - began_at <= 2
        began_at = trio.current_time()
        with pytest.raises(NoWorker, match="inference"):
            await client.complete({"prompt": "x", "timeout_ms": 60_000})
        assert 4.5 < trio.current_time() - began_at <= 5
        impatient = Client(client._broker, timeout_ms=None, nobody_listens_grace_s=0)
        with pytest.raises(NoWorker, match=r"asked for 0\.0 s"):
            await impatient.complete({"prompt": "x"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen_later, worker)
            assert (await client.complete({"prompt": "x"})).text == "late"
    assert not worker.cancels


async def _listen_later(worker: ScriptedWorker) -> None:
    await trio.sleep(3)
    await worker.listen()


async def test_trio_loses_nothing_by_a_cancelled_wait_not_even_a_retry(
    autojump_clock: MockClock,
) -> None:
    async with scripted(
        [refusal("INTERNAL", retry_after_ms=4000)], [chunk(0, "yes", terminal=True)]
    ) as (worker, client):
        async with client.ask({"prompt": "x"}) as answer:
            for _attempt in range(3):
                with trio.move_on_after(1) as scope:
                    await anext(answer)
                assert scope.cancelled_caught
            assert await answer.text() == "yes"
    assert len(worker.requests) == 2


async def test_trio_says_when_the_server_would_not_take_the_request(
    autojump_clock: MockClock,
) -> None:
    async with scripted() as (worker, client):
        with pytest.raises(PayloadTooLarge, match=r"the NATS server takes 1048576$") as caught:
            await client.complete({"prompt": "x" * 2**20})
    assert caught.value.details["limit"] == 2**20
    assert isinstance(caught.value.details["bytes"], int)
    assert caught.value.details["bytes"] > 2**20
    assert not worker.requests


async def test_trio_leaves_nothing_behind_however_an_answer_is_left(
    autojump_clock: MockClock,
) -> None:
    """The end of the answer, an error, and a cancellation, under which leaving still waits."""
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="worker") as far,
        open_memory_broker(server, name="caller") as near,
    ):
        worker = ScriptedWorker(
            far, [[chunk(0, "yes", terminal=True)], [refusal("CANCELLED")], [chunk(0)]]
        )
        await worker.listen()
        client = Client(near)
        await client.complete({"prompt": "x"})
        with pytest.raises(RequestCancelled):
            await client.complete({"prompt": "x"})
        with trio.move_on_after(1) as scope:
            await client.complete({"prompt": "x"})
        assert scope.cancelled_caught
        assert not [each for each in server._subscriptions if each.broker is near]
        assert not near.statistics().unpublished_bytes, "the cancel has been taken"
        await trio.testing.wait_all_tasks_blocked()
        assert [cancel.body for cancel in worker.cancels] == [b"cancel"]


async def test_trio_assumes_half_a_minute_three_attempts_and_any_worker(
    autojump_clock: MockClock,
) -> None:
    busy = [refusal("INTERNAL", retry_after_ms=50)]
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="worker") as far,
        open_memory_broker(server, name="caller") as near,
    ):
        worker = ScriptedWorker(far, [busy] * 9)
        await worker.listen()
        with pytest.raises(InternalError):
            await Client(near).complete({"prompt": "x"})
        with pytest.raises(NoWorker, match=r"inference\.w9"):
            await Client(near).complete({"prompt": "x"}, worker_id="w9")
    assert worker.requests[0][1]["timeout_ms"] == 30_000
    assert len(worker.requests) == 3


async def test_trio_bounds_the_wait_for_a_connection(autojump_clock: MockClock) -> None:
    server = MemoryServer(random=random.Random(0))
    async with open_memory_broker(server, name="caller") as broker:
        broker.disconnect()
        with pytest.raises(RequestTimeout):
            await Client(broker, timeout_ms=2000).complete({"prompt": "x"})
        assert trio.current_time() < 5


async def test_trio_streams_and_completes_and_cancels_at_a_worker(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        request = {"prompt": "a b", "max_tokens": 5, "seed": 3}
        whole = await rig.client.complete(request)
        joined = await rig.client.complete({**request, "stream": True})
        assert joined.text == whole.text
        assert joined.usage == whole.usage
        async with rig.client.ask({**request, "stream": True}) as answer:
            assert (await anext(answer)).text == ""
            assert answer.control_subject == f"inference.{WORKER_ID}.ctl.{answer.request_id}"
            answer.cancel()
            with pytest.raises(RequestCancelled):
                await answer.text()
            assert answer.ended


@pytest.mark.parametrize("stream", [True, False])
async def test_trio_leaving_early_cancels_at_the_worker(
    autojump_clock: MockClock, *, stream: bool
) -> None:
    async with running_worker() as rig:
        with trio.move_on_after(1):
            await rig.client.complete({"prompt": "x", "max_tokens": 500, "stream": stream})
        await trio.sleep(0.2)
        snapshot = rig.snapshot()
        assert snapshot.requests.in_flight == 0
        assert snapshot.requests.by_outcome == {"CANCELLED": 1}


async def test_trio_asks_another_worker_when_one_drains(autojump_clock: MockClock) -> None:
    """The second attempt meets nobody, and the fleet's next worker later."""
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.simulated.turn_ms=100"
    ) as rig:
        client = Client(rig.caller, timeout_ms=60_000)
        answers: list[str] = []

        async def ask() -> None:
            answers.append((await client.complete({"prompt": "x", "max_tokens": 30})).text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            rig.stop()
            await rig.finished.wait()
            assert len(answers) == 1
            successor = ScriptedWorker(rig.caller, [[chunk(0, "from another", terminal=True)]])
            await successor.listen()
    assert answers[1] == "from another"
