"""A worker id is used once on a NATS: whoever comes second is told before it takes anything."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from trio_worker.errors import ConfigError
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.stages.claim import claim_id

PREFIXES = ("_INBOX.",)


@asynccontextmanager
async def two_brokers() -> AsyncIterator[tuple[MemoryServer, MemoryBroker, MemoryBroker]]:
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="first") as first,
        open_memory_broker(server, name="second") as second,
    ):
        yield server, first, second


async def test_a_free_id_is_claimed_at_the_servers_word_and_then_answered_to(
    autojump_clock: MockClock,
) -> None:
    async with two_brokers() as (server, first, second):
        began_at = trio.current_time()
        await claim_id(first, "one", PREFIXES)
        assert trio.current_time() - began_at < 0.1
        assert [each._pattern for each in server._subscriptions] == ["worker.one.ping"]
        answers: list[Message] = []
        inbox = second.new_inbox()
        await second.subscribe(inbox, answers.append)
        await second.subscribe("elsewhere", answers.append)
        for reply in (inbox, None, "elsewhere"):
            second.publish(Message(subject="worker.one.ping", reply=reply))
        await trio.sleep(1)
        assert [(each.subject, each.body) for each in answers] == [(inbox, b"one")]


async def test_an_id_that_answers_is_taken(autojump_clock: MockClock) -> None:
    async with two_brokers() as (server, first, second):
        await claim_id(first, "one", PREFIXES)
        with pytest.raises(ConfigError, match="a worker with the id one is running on this NATS"):
            await claim_id(second, "one", PREFIXES)
        await claim_id(second, "two", PREFIXES)
        assert sorted(each._pattern for each in server._subscriptions) == [
            "worker.one.ping",
            "worker.two.ping",
        ]


async def test_somebody_who_listens_and_says_nothing_holds_a_start_up_for_a_second(
    autojump_clock: MockClock,
) -> None:
    async with two_brokers() as (_, first, second):
        await first.subscribe("worker.one.ping", lambda _: None)
        began_at = trio.current_time()
        await claim_id(second, "one", PREFIXES)
        assert trio.current_time() - began_at == pytest.approx(1.0)


async def test_two_answers_are_one(autojump_clock: MockClock) -> None:
    async with two_brokers() as (_, first, second):
        await claim_id(first, "one", PREFIXES)
        await claim_id(first, "one_", PREFIXES)

        def answer(message: Message) -> None:
            assert message.reply is not None
            first.publish(Message(subject=message.reply))

        await first.subscribe("worker.one.ping", answer)
        with pytest.raises(ConfigError):
            await claim_id(second, "one", PREFIXES)
