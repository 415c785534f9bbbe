"""Jobs on their way into the queue, and answers on the way back, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from support.batch_rig import STREAMS, ScriptedWorker, answer, job, open_queue
from trio.testing import MockClock

from trio_worker.gateway.batch_queue import (
    FULL_S,
    LOOK_AT,
    LOOK_EVERY_S,
    Submission,
    open_collector,
    submit,
    waiting_jobs,
)
from trio_worker.jetstream.api import Fault, JetStreamError
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.jetstream import MemoryJetStream
from trio_worker.wire import subjects


@dataclass
class World:
    server: MemoryServer
    memory: MemoryJetStream
    worker: ScriptedWorker
    js: JetStream
    """Of whoever submits."""

    def in_queue(self) -> list[str]:
        messages = self.memory.streams[STREAMS.jobs].messages.values()
        return [each.headers["Nats-Msg-Id"] for each in messages]


@asynccontextmanager
async def open_world(job_s: float | None = 0.1, **changes: object) -> AsyncIterator[World]:
    server = MemoryServer(random=random.Random(1))
    memory = MemoryJetStream(server)
    async with (
        open_memory_broker(server, name="worker") as there,
        open_queue(there, job_s=job_s, **changes) as worker,
        open_memory_broker(server, name="caller") as here,
        open_jetstream(here) as js,
    ):
        yield World(server, memory, worker, js)


def jobs(count: int) -> list[str]:
    return [job(number).request_id for number in range(1, count + 1)]


async def test_what_is_there_is_not_put_there_again(autojump_clock: MockClock) -> None:
    wanted = [job(number) for number in range(1, 701)]
    # Ids are forgotten at once: what protects from twice is what is seen.
    async with open_world(job_s=None, duplicate_window=1) as world:
        first = await submit(world.js, STREAMS, wanted[:300])
        for each in wanted[:5]:
            await answer(world.worker.js, each.request_id)
            await world.js.delete_message(STREAMS.jobs, first.stored - 299 + wanted.index(each))
        await trio.sleep(1)
        second = await submit(world.js, STREAMS, wanted)
        assert sorted(world.in_queue()) == sorted(each.request_id for each in wanted[5:])
    assert (first.stored, first.were_there) == (300, 0)
    assert (second.stored, second.were_there) == (400, 300)


async def test_a_full_queue_is_waited_for(autojump_clock: MockClock) -> None:
    seen: list[tuple[int, bool]] = []

    def see(submission: Submission) -> None:
        seen.append((submission.done, submission.is_held_up))

    async with open_world(job_s=0.2, max_msgs=10) as world:
        done = await submit(
            world.js, STREAMS, [job(number) for number in range(1, 101)], on_progress=see
        )
        await trio.sleep(60)
        assert world.worker.runs.total() == 100
    assert done.stored == 100
    assert any(is_held_up for _, is_held_up in seen)
    assert seen[-1] == (100, False)


async def test_who_may_not_go_on_stops_also_before_a_full_queue(autojump_clock: MockClock) -> None:
    may_go_on = True
    async with open_world(job_s=None, max_msgs=10) as world:
        with trio.fail_after(10 * FULL_S):
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def stop() -> None:
                    nonlocal may_go_on
                    await trio.sleep(3 * FULL_S)
                    may_go_on = False

                done = await submit(
                    world.js,
                    STREAMS,
                    [job(number) for number in range(1, 101)],
                    may_go_on=lambda: may_go_on,
                )
    assert done.stored == 10


async def test_what_waiting_does_not_mend_is_raised(autojump_clock: MockClock) -> None:
    async with open_world(job_s=None) as world:
        world.memory.denied.add("jobs.>")
        with pytest.raises(JetStreamError) as caught:
            await submit(world.js, STREAMS, [job(1)])
        assert caught.value.fault is Fault.NO_ANSWER


async def test_a_lost_receipt_does_not_put_a_job_there_twice(autojump_clock: MockClock) -> None:
    async with open_world(job_s=None) as world:
        publish = world.memory.streams[STREAMS.jobs].publish
        lost = 0

        def publish_and_lose(message):  # type: ignore[no-untyped-def]
            nonlocal lost
            receipt = publish(message)
            if lost == 0:
                lost += 1
                world.server.hand_out = lambda *_: True  # type: ignore[method-assign]
                world.server.call_at(
                    trio.current_time() + 1, lambda: world.server.__dict__.pop("hand_out")
                )
            return receipt

        world.memory.streams[STREAMS.jobs].publish = publish_and_lose  # type: ignore[method-assign]
        done = await submit(world.js, STREAMS, [job(1)])
        assert (done.stored, lost) == (1, 1)
        assert world.in_queue() == ["b-1"]


async def test_a_queue_that_may_not_be_looked_into_is_none(autojump_clock: MockClock) -> None:
    async with open_world(job_s=None) as world:
        await submit(world.js, STREAMS, [job(1)])
        assert list(await waiting_jobs(world.js, STREAMS.jobs, [subjects.JOBS]) or ()) == ["b-1"]
        world.memory.denied.add("$JS.API.DIRECT.GET.INFERENCE")
        assert await waiting_jobs(world.js, STREAMS.jobs, [subjects.JOBS]) is None
        again = await submit(world.js, STREAMS, [job(1), job(2)])
        assert again.stored == 2, "the stream knows the id"
        assert world.in_queue() == ["b-1", "b-2"]


async def test_a_job_leaves_the_queue_when_its_time_is_over(autojump_clock: MockClock) -> None:
    async with open_world(job_s=None) as world:
        await submit(world.js, STREAMS, [job(1)], expires_s=30)
        await submit(world.js, STREAMS, [job(2)])
        await trio.sleep(31)
        assert world.in_queue() == ["b-2"]


async def test_answers_are_heard_each_once_those_of_before_too(autojump_clock: MockClock) -> None:
    ids = jobs(LOOK_AT + 50)
    async with open_world(job_s=None) as world:
        for each in ids[::2]:
            await answer(world.worker.js, each)
        found: list[str] = []
        async with open_collector(world.js, STREAMS.results, ids) as collector:
            while some := await collector.look_over():
                found += some
            assert sorted(found) == sorted(ids[::2])
            stored_at: dict[str, float] = {}
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def others_and_ours() -> None:
                    for each in ids[1::2]:
                        await trio.sleep(0.1)
                        await answer(world.worker.js, f"other-{each}")
                        stored_at[each] = trio.current_time()
                        await answer(world.worker.js, each)

                while some := await collector.more():
                    found += some
                    now = trio.current_time()
                    assert all(now - stored_at[each] < 1 for each in some), "each at once"
        assert sorted(found) == sorted(ids)
        assert not collector.pending


async def test_an_answer_that_was_not_heard_is_found_a_little_later(
    autojump_clock: MockClock,
) -> None:
    async with open_world(job_s=None) as world:
        del world.memory.streams[STREAMS.results].config["republish"]
        async with open_collector(world.js, STREAMS.results, jobs(3)) as collector:
            assert await collector.look_over() == {}
            await answer(world.worker.js, "b-2")
            began = trio.current_time()
            assert list(await collector.more()) == ["b-2"]
            assert trio.current_time() - began <= LOOK_EVERY_S + 1


async def test_nothing_to_wait_for_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with (
        open_world(job_s=None) as world,
        open_collector(world.js, STREAMS.results, []) as collector,
    ):
        assert await collector.more() == {}
