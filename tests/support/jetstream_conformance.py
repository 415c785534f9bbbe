"""What this project relies on of JetStream: asked of nats-server, and of what stands in for it.

Each function is one fact; `FACTS` is what the tests run over both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import trio

from support.broker_conformance import Inbox, System
from trio_worker.jetstream import api, streams
from trio_worker.jetstream.api import Fault, JetStreamError, Json
from trio_worker.jetstream.client import JetStream, Pulls, open_jetstream
from trio_worker.ports import Broker, Message
from trio_worker.wire import subjects

FACTS: list[Callable[[Ground], Awaitable[None]]] = []
MODEL = "qwen2.5"
PATIENCE_S = 5.0


@dataclass
class Ground:
    """A fresh message system with JetStream, and a connection to it."""

    system: System
    broker: Broker
    js: JetStream

    @asynccontextmanager
    async def another(self) -> AsyncIterator[tuple[Broker, JetStream]]:
        async with self.system.open(name="another") as broker, open_jetstream(broker) as js:
            yield broker, js

    async def make_streams(self, **changes: Any) -> None:
        """Those of jobs, in memory."""
        for config in (
            streams.jobs_stream("INFERENCE") | changes,
            streams.results_stream("RESULTS", keep_s=3600),
            streams.dead_stream("DEAD"),
        ):
            await self.js.ensure_stream(config)

    async def make_consumer(self, level: str = "high", *, ack_wait_s: float = 30.0) -> str:
        config = streams.job_consumer(level, MODEL, ack_wait_s=ack_wait_s)
        await self.js.ensure_consumer("INFERENCE", config)
        return str(config["durable_name"])

    async def submit(
        self, body: bytes = b"{}", *, level: str = "high", caller: str = "-", **headers: str
    ) -> api.PubAck:
        subject = subjects.job(level=level, caller=caller, model=MODEL)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.js.publish(subject, body, named)


def fact(function: Callable[[Ground], Awaitable[None]]) -> Callable[[Ground], Awaitable[None]]:
    FACTS.append(function)
    return function


@asynccontextmanager
async def ground_of(system: System) -> AsyncIterator[Ground]:
    async with system.open(name="ground") as broker, open_jetstream(broker) as js:
        yield Ground(system, broker, js)


async def refused(call: Awaitable[object]) -> JetStreamError:
    with pytest.raises(JetStreamError) as caught:
        await call
    return caught.value


async def next_of(pulls: Pulls, within_s: float = PATIENCE_S) -> Message:
    with trio.fail_after(within_s):
        return await pulls.receive()


async def settled(ground: Ground) -> None:
    await ground.broker.flush()
    await ground.broker.flush()


# --- streams ------------------------------------------------------------------------------


@fact
async def a_stream_is_made_once_and_found_afterwards(ground: Ground) -> None:
    config = streams.jobs_stream("INFERENCE")
    await ground.js.ensure_stream(config)
    await ground.submit()
    found = await ground.js.ensure_stream(config | {"max_bytes": 1_000_000})
    assert found.state.messages == 1
    assert found.config["max_bytes"] == config["max_bytes"]


@fact
async def a_missing_stream_is_named(ground: Ground) -> None:
    error = await refused(ground.js.stream_info("INFERENCE"))
    assert (error.fault, error.code) == (Fault.STREAM_MISSING, 10059)


@fact
async def a_stream_of_another_kind_is_refused_and_left_alone(ground: Ground) -> None:
    config = streams.jobs_stream("INFERENCE")
    await ground.js.ensure_stream(config | {"retention": "limits"})
    error = await refused(ground.js.ensure_stream(config))
    assert error.fault is Fault.OTHER_CONFIG
    assert "retention is limits" in str(error)
    assert (await ground.js.stream_info("INFERENCE")).config["retention"] == "limits"


@fact
async def subjects_belong_to_one_stream(ground: Ground) -> None:
    await ground.js.ensure_stream(streams.jobs_stream("INFERENCE"))
    error = await refused(ground.js.ensure_stream(streams.jobs_stream("OTHER")))
    assert (error.fault, error.code) == (Fault.OVERLAP, 10065)


@fact
async def messages_by_subject_are_counted(ground: Ground) -> None:
    await ground.make_streams()
    await ground.submit(caller="a")
    await ground.submit(caller="a")
    await ground.submit(caller="b")
    info = await ground.js.stream_info("INFERENCE", subjects="jobs.inference.*.a.>")
    assert info.state.subjects == {f"jobs.inference.high.a.{MODEL}": 2}


# --- publishing ---------------------------------------------------------------------------


@fact
async def a_receipt_says_where_a_message_is(ground: Ground) -> None:
    await ground.make_streams()
    first = await ground.submit(b"one")
    second = await ground.submit(b"two")
    assert (first.stream, first.seq, second.seq) == ("INFERENCE", 1, 2)


@fact
async def without_a_stream_nobody_answers(ground: Ground) -> None:
    error = await refused(ground.js.publish("results.inference.x", b""))
    assert error.fault is Fault.NOBODY


@fact
async def a_message_id_is_stored_once(ground: Ground) -> None:
    await ground.make_streams()
    first = await ground.submit(Nats_Msg_Id="x")
    again = await ground.submit(Nats_Msg_Id="x")
    assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)
    assert (await ground.js.stream_info("INFERENCE")).state.messages == 1


@fact
async def an_answer_is_stored_once(ground: Ground) -> None:
    await ground.make_streams()
    heard, raw = Inbox(), Inbox()
    await ground.broker.subscribe(subjects.answer("*"), heard)
    await ground.broker.subscribe(subjects.result("*"), raw)
    once = {api.EXPECTED_LAST: "0"}
    await ground.js.publish(subjects.result("j1"), b"one", once | {"Worker-Id": "w1"})
    error = await refused(ground.js.publish(subjects.result("j1"), b"two", once))
    assert (error.fault, error.code) == (Fault.WRONG_LAST, 10071)
    await settled(ground)
    assert heard.bodies == [b"one"]
    assert heard.messages[0].subject == "answers.inference.j1"
    headers = dict(heard.messages[0].headers)
    assert headers.pop("Nats-Time-Stamp")
    assert headers == {
        "Worker-Id": "w1",
        "Nats-Expected-Last-Subject-Sequence": "0",
        "Nats-Stream": "RESULTS",
        "Nats-Subject": "results.inference.j1",
        "Nats-Sequence": "1",
        "Nats-Last-Sequence": "0",
    }
    assert raw.bodies == [b"one", b"two"], "a subscriber of the stream's own subject hears both"


@fact
async def a_full_stream_refuses(ground: Ground) -> None:
    await ground.make_streams(max_msgs=2)
    await ground.submit()
    await ground.submit()
    error = await refused(ground.submit())
    assert (error.fault, error.code) == (Fault.FULL, 10077)


@fact
async def a_caller_may_be_bounded_by_the_stream(ground: Ground) -> None:
    await ground.make_streams(max_msgs_per_subject=1, discard_new_per_subject=True)
    await ground.submit(caller="a")
    error = await refused(ground.submit(caller="a", Nats_Msg_Id="x"))
    assert (error.fault, error.code) == (Fault.FULL, 10077)
    await ground.submit(caller="b")
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0)
        job = await next_of(pulls)
        assert (await refused(ground.submit(caller="a"))).fault is Fault.FULL
        await ground.js.request(str(job.reply), api.ACK)
    assert not (await ground.submit(caller="a", Nats_Msg_Id="x")).duplicate


@fact
async def what_has_been_in_a_stream_too_long_is_gone(ground: Ground) -> None:
    await ground.make_streams()
    await ground.submit(Nats_TTL="1")
    await ground.submit()
    assert (await ground.js.stream_info("INFERENCE")).state.messages == 2
    await trio.sleep(1.5)
    assert (await ground.js.stream_info("INFERENCE")).state.messages == 1


# --- reading ------------------------------------------------------------------------------


@fact
async def the_last_message_of_a_subject_is_had_directly(ground: Ground) -> None:
    await ground.make_streams()
    assert await ground.js.get_last("RESULTS", subjects.result("j1")) is None
    await ground.js.publish(subjects.result("j1"), b"one", {"Worker-Id": "w1"})
    found = await ground.js.get_last("RESULTS", subjects.result("j1"))
    assert found is not None
    assert (found.subject, found.sequence, found.body) == (subjects.result("j1"), 1, b"one")
    assert found.headers.keys() == {
        *("Worker-Id", "Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp")
    }


@fact
async def a_stream_that_is_missing_cannot_be_read(ground: Ground) -> None:
    error = await refused(ground.js.get_last("RESULTS", "results.inference.x"))
    assert error.fault is Fault.NOBODY
    assert "stream is missing" in str(error)


@fact
async def a_stream_is_read_in_batches(ground: Ground) -> None:
    await ground.make_streams()
    for number in range(7):
        await ground.js.publish(subjects.result(f"j{number}"), b"%d" % number)
    await ground.js.publish("dead.inference.high.-.m", b"other")
    read: list[bytes] = []
    sequence = 1
    for _ in range(3):
        batch = await ground.js.read(
            "RESULTS", subject=subjects.result("*"), sequence=sequence, messages=3
        )
        assert batch.pending == 6 - len(read) - len(batch.messages) + 1
        read += [each.body for each in batch.messages]
        sequence = batch.next_sequence
    assert read == [b"%d" % number for number in range(7)]
    ended = await ground.js.read("RESULTS", subject=subjects.result("*"), sequence=sequence)
    assert (ended.messages, ended.next_sequence) == ((), sequence)


@fact
async def the_last_of_many_subjects_are_had_at_once(ground: Ground) -> None:
    await ground.make_streams()
    for number in range(3):
        await ground.js.publish(subjects.result(f"j{number}"), b"%d" % number)
    wanted = [subjects.result(f"j{number}") for number in (0, 2, 5)]
    found = await ground.js.last_of("RESULTS", wanted)
    assert {name: each.body for name, each in found.items()} == {wanted[0]: b"0", wanted[1]: b"2"}
    assert await ground.js.last_of("RESULTS", wanted[2:]) == {}


# --- pulling ------------------------------------------------------------------------------


@fact
async def a_pull_brings_the_oldest_message(ground: Ground) -> None:
    await ground.make_streams()
    await ground.submit(b"one", caller="a")
    await ground.submit(b"two")
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0)
        job = await next_of(pulls)
    assert (job.subject, job.body) == (f"jobs.inference.high.a.{MODEL}", b"one")
    assert api.status_of(job) is None
    delivery = api.delivery_of(job.reply)
    assert delivery is not None
    assert (delivery.stream, delivery.consumer) == ("INFERENCE", consumer)
    assert (delivery.delivered, delivery.sequence, delivery.pending) == (1, 1, 1)


@fact
async def a_pull_without_a_wait_says_that_there_is_nothing(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0)
        status = api.status_of(await next_of(pulls))
    assert status is not None
    assert status.number == 404


@fact
async def an_open_pull_waits_until_its_time_is_over(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0, expires_s=0.5)
        status = api.status_of(await next_of(pulls))
        assert status is not None
        assert status.number == 408
        pulls.ask("INFERENCE", consumer, priority=0, expires_s=30)
        await settled(ground)
        await ground.submit(b"late")
        assert (await next_of(pulls)).body == b"late"


@fact
async def a_pull_of_a_missing_consumer_is_answered_at_once(ground: Ground) -> None:
    await ground.make_streams()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", "none", priority=0, expires_s=30)
        status = api.status_of(await next_of(pulls))
    assert status is not None
    assert status.number == 503
    assert status.consumer_is_gone


@fact
async def levels_and_models_do_not_mix(ground: Ground) -> None:
    await ground.make_streams()
    await ground.submit(level="low")
    await ground.js.publish(subjects.job(level="high", caller=None, model="other"), b"")
    consumer = await ground.make_consumer("high")
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0)
        status = api.status_of(await next_of(pulls))
    assert status is not None
    assert status.number == 404


@fact
async def a_pull_that_is_left_swallows_nothing(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0, expires_s=30)
        await settled(ground)
        assert (await ground.js.consumer_info("INFERENCE", consumer)).num_waiting == 1
    await ground.submit(b"one")
    info = await ground.js.consumer_info("INFERENCE", consumer)
    assert (info.num_waiting, info.num_pending, info.num_ack_pending) == (0, 1, 0)


@fact
async def the_pull_of_the_freest_is_served_first(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as busy, ground.js.open_pulls() as free:
        busy.ask("INFERENCE", consumer, priority=7, expires_s=30)
        await settled(ground)
        free.ask("INFERENCE", consumer, priority=1, expires_s=30)
        await settled(ground)
        await ground.submit(b"one")
        assert (await next_of(free)).body == b"one"
        await ground.submit(b"two")
        assert (await next_of(busy)).body == b"two"


@fact
async def a_consumer_that_is_made_twice_is_one(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer(ack_wait_s=10)
    assert await ground.make_consumer(ack_wait_s=20) == consumer
    info = await ground.js.consumer_info("INFERENCE", consumer)
    assert info.config["ack_wait"] == 10 * api.NS, "it is never changed"


@fact
async def a_missing_consumer_is_named(ground: Ground) -> None:
    await ground.make_streams()
    error = await refused(ground.js.consumer_info("INFERENCE", "none"))
    assert (error.fault, error.code) == (Fault.CONSUMER_MISSING, 10014)


@fact
async def an_open_pull_hears_that_its_consumer_is_gone(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer()
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0, expires_s=30)
        await settled(ground)
        await ground.js.request(f"$JS.API.CONSUMER.DELETE.INFERENCE.{consumer}")
        status = api.status_of(await next_of(pulls))
    assert status is not None
    assert status.number == 409
    assert status.consumer_is_gone


# --- acknowledging ------------------------------------------------------------------------


@asynccontextmanager
async def one_taken(ground: Ground, ack_wait_s: float) -> AsyncIterator[tuple[Pulls, str, Message]]:
    await ground.make_streams()
    await ground.submit(b"one")
    consumer = await ground.make_consumer(ack_wait_s=ack_wait_s)
    async with ground.js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0)
        job = await next_of(pulls)
        pulls.ask("INFERENCE", consumer, priority=0, expires_s=30)
        yield pulls, consumer, job


async def left(ground: Ground) -> int:
    return (await ground.js.stream_info("INFERENCE")).state.messages


def deliveries(message: Message) -> int:
    delivery = api.delivery_of(message.reply)
    assert delivery is not None
    return delivery.delivered


async def say(ground: Ground, job: Message, body: bytes) -> None:
    ground.broker.publish(Message(subject=str(job.reply), body=body))
    await settled(ground)


@fact
async def an_acknowledgement_takes_the_message_out(ground: Ground) -> None:
    async with one_taken(ground, 30) as (_, consumer, job):
        assert await left(ground) == 1
        info = await ground.js.consumer_info("INFERENCE", consumer)
        assert (info.num_ack_pending, info.num_pending) == (1, 0)
        await say(ground, job, api.ACK)
        assert await left(ground) == 0


@fact
async def what_is_not_acknowledged_comes_again(ground: Ground) -> None:
    async with one_taken(ground, 1.0) as (pulls, _, _job):
        since = trio.current_time()
        again = await next_of(pulls)
        assert trio.current_time() - since > 0.5
        assert (again.body, deliveries(again)) == (b"one", 2)


@fact
async def progress_puts_that_off(ground: Ground) -> None:
    async with one_taken(ground, 1.5) as (pulls, _, job):
        since = trio.current_time()
        for _ in range(4):
            await trio.sleep(0.5)
            await say(ground, job, api.PROGRESS)
        again = await next_of(pulls)
        assert trio.current_time() - since > 2.8
        assert deliveries(again) == 2


@fact
async def what_is_given_back_comes_again_at_once(ground: Ground) -> None:
    async with one_taken(ground, 30) as (pulls, _, job):
        await say(ground, job, api.nak())
        assert deliveries(await next_of(pulls)) == 2


@fact
async def or_after_a_while(ground: Ground) -> None:
    async with one_taken(ground, 30) as (pulls, _, job):
        since = trio.current_time()
        await say(ground, job, api.nak(0.6))
        assert deliveries(await next_of(pulls)) == 2
        assert 0.5 < trio.current_time() - since < 2.5


@fact
async def a_terminated_message_is_gone(ground: Ground) -> None:
    async with one_taken(ground, 30) as (_, _, job):
        await say(ground, job, api.term("it was too much"))
        assert await left(ground) == 0


@fact
async def a_late_acknowledgement_counts(ground: Ground) -> None:
    async with one_taken(ground, 1.0) as (pulls, _, job):
        again = await next_of(pulls)
        await say(ground, job, api.ACK)
        assert await left(ground) == 0
        await say(ground, again, api.ACK)
        assert await left(ground) == 0


@fact
async def a_connection_that_ends_takes_its_pulls_along(ground: Ground) -> None:
    await ground.make_streams()
    consumer = await ground.make_consumer()
    async with ground.another() as (_, js), js.open_pulls() as pulls:
        pulls.ask("INFERENCE", consumer, priority=0, expires_s=30)
        await settled(ground)
    await ground.submit()
    info = await ground.js.consumer_info("INFERENCE", consumer)
    assert (info.num_waiting, info.num_pending) == (0, 1)


@fact
async def a_waiting_message_may_be_taken_out(ground: Ground) -> None:
    await ground.make_streams()
    ack = await ground.submit()
    await ground.js.delete_message("INFERENCE", ack.seq)
    assert await left(ground) == 0
    await refused(ground.js.delete_message("INFERENCE", ack.seq))


@fact
async def unknown_fields_are_refused(ground: Ground) -> None:
    body: Json = {**streams.jobs_stream("INFERENCE"), "colour": "blue"}
    error = await refused(
        ground.js.request(api.stream_create("INFERENCE"), msgspec.json.encode(body))
    )
    assert error.code == 10025
