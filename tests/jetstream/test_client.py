"""Asking JetStream over a connection: lines that break, answers that are lost, old servers."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from loguru import logger
from trio.testing import MockClock

from trio_worker.jetstream import streams
from trio_worker.jetstream.api import Fault, JetStreamError
from trio_worker.jetstream.client import ANSWER_S, JetStream, open_jetstream
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.simulated.jetstream import MemoryJetStream


class World:
    """A server, what is of JetStream in it, and one who asks."""

    def __init__(self, server: MemoryServer, broker: MemoryBroker, js: JetStream) -> None:
        self.server = server
        self.jetstream = MemoryJetStream(server)
        self.broker = broker
        self.js = js

    def lose_replies(self, part: bytes, times: int) -> list[bytes]:
        """The next replies with this in them do not arrive; returns what they were."""
        lost: list[bytes] = []
        hand_out = self.server.hand_out

        def losing(subject: str, message: Message, sender: MemoryBroker | None = None) -> bool:
            if part in message.body and len(lost) < times:
                lost.append(message.body)
                return True
            return hand_out(subject, message, sender)

        self.server.hand_out = losing  # type: ignore[method-assign]
        return lost


@pytest.fixture(name="log")
def log_fixture() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lambda line: lines.append(str(line)), level="WARNING")
    yield lines
    logger.remove(number)


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    server = MemoryServer(random=random.Random(0))
    async with open_memory_broker(server) as broker, open_jetstream(broker) as js:
        world = World(server, broker, js)
        for config in (
            streams.jobs_stream("INFERENCE"),
            streams.results_stream("RESULTS", keep_s=60),
        ):
            await js.ensure_stream(config)
        yield world


async def test_what_was_asked_before_the_line_broke_is_answered_when_it_is_mended(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.broker.disconnect()

        async def mend() -> None:
            await trio.sleep(10 * ANSWER_S)
            world.broker.reconnect()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mend)
            info = await world.js.stream_info("INFERENCE")
        assert info.state.messages == 0


async def test_silence_is_an_error_that_speaks_of_rights(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.jetstream.denied.add("$JS.API.>")
        began = trio.current_time()
        with pytest.raises(JetStreamError, match="may not publish there") as caught:
            await world.js.stream_info("INFERENCE")
        assert caught.value.fault is Fault.NO_ANSWER
        assert trio.current_time() - began == pytest.approx(ANSWER_S)


@pytest.mark.parametrize(("tries", "is_stored"), [(3, True), (2, False)])
async def test_a_publish_whose_receipts_are_lost_is_said_again(
    autojump_clock: MockClock, tries: int, *, is_stored: bool
) -> None:
    async with open_world() as world:
        lost = world.lose_replies(b'"stream"', 2)
        headers = {"Nats-Msg-Id": "j1"}

        async def publish() -> None:
            ack = await world.js.publish("jobs.inference.high.-.m", b"", headers, tries=tries)
            assert (ack.seq, ack.duplicate) == (1, True)

        if is_stored:
            await publish()
        else:
            with pytest.raises(JetStreamError):
                await publish()
        assert len(lost) == 2
        assert (await world.js.stream_info("INFERENCE")).state.messages == 1


async def test_an_error_is_not_asked_for_again(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        heard: list[Message] = []
        await world.broker.subscribe("results.inference.*", heard.append)
        once = {"Nats-Expected-Last-Subject-Sequence": "5"}
        with pytest.raises(JetStreamError):
            await world.js.publish("results.inference.j1", b"", once, tries=3)
        await world.broker.flush()
        assert len(heard) == 1


async def test_a_reply_that_comes_too_late_disturbs_nobody(
    autojump_clock: MockClock, log: list[str]
) -> None:
    async with open_world() as world:
        world.server.delay_s = 1.5 * ANSWER_S
        with pytest.raises(JetStreamError):
            await world.js.stream_info("INFERENCE")
        world.server.delay_s = 0
        assert (await world.js.stream_info("RESULTS")).config["name"] == "RESULTS"
        await trio.sleep(3 * ANSWER_S)
    assert log == []


async def test_a_consumer_for_other_subjects_is_named_and_left(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        one = streams.job_consumer("high", "a.b", ack_wait_s=30)
        other = streams.job_consumer("high", "a_b", ack_wait_s=30)
        await world.js.ensure_consumer("INFERENCE", one)
        with pytest.raises(JetStreamError, match=r"is for jobs.inference.high.\*.a.b") as caught:
            await world.js.ensure_consumer("INFERENCE", other)
        assert caught.value.fault is Fault.OTHER_CONFIG


async def test_an_older_server_gets_what_it_knows(autojump_clock: MockClock) -> None:
    """Message TTLs came with 2.11, and pulls by priority with 2.12."""
    server = MemoryServer(random=random.Random(0))
    asked: list[dict[str, Any]] = []

    async with (
        open_memory_broker(server, name="server") as answering,
        open_memory_broker(server) as broker,
        open_jetstream(broker) as js,
    ):

        def answer(message: Message) -> None:
            body = msgspec.json.decode(message.body or b"{}")
            config = body.get("config", body)
            reply: dict[str, Any] = {"config": config}
            if "INFO" in message.subject and asked:
                reply = {"config": asked[-1]}
            elif "INFO" in message.subject:
                reply = {"error": {"code": 404, "err_code": 10059, "description": "not found"}}
            elif {"allow_msg_ttl", "priority_policy"} & config.keys():
                reply = {"error": {"code": 400, "err_code": 10025, "description": "unknown field"}}
            else:
                asked.append(config)
            assert message.reply is not None
            answering.publish(Message(subject=message.reply, body=msgspec.json.encode(reply)))

        await answering.subscribe("$JS.API.>", answer)
        wanted = streams.jobs_stream("INFERENCE")
        await js.ensure_stream(wanted)
        consumer = streams.job_consumer("high", "m", ack_wait_s=30)
        await js.ensure_consumer("INFERENCE", consumer)
    del wanted["allow_msg_ttl"]
    del consumer["priority_policy"], consumer["priority_groups"]
    assert asked == [wanted, consumer]
