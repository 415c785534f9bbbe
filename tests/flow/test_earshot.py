"""Being heard by who listens late."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from support.broker_conformance import Inbox

from trio_worker.errors import MessageTooLarge
from trio_worker.flow import earshot as module
from trio_worker.flow.earshot import HEARD_AT_LEAST_S, HEARD_WITHIN_S, SETTLE_S, Earshot
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker

HERE = "response.r"
GONE = "inference.w1.ctl.r"


@dataclass
class Rig:
    earshot: Earshot
    broker: MemoryBroker
    listener: MemoryBroker
    nursery: trio.Nursery


@asynccontextmanager
async def speaking(max_payload: int = 1024) -> AsyncIterator[Rig]:
    server = MemoryServer(random=random.Random(0), delay_s=0.001, max_payload=max_payload)
    async with (
        open_memory_broker(server, name="speaker") as broker,
        open_memory_broker(server, name="listener") as listener,
        trio.open_nursery() as nursery,
    ):
        earshot = Earshot(broker, nursery, worker_id="w1")
        await broker.subscribe("inference.w1.probe.*", earshot.take)
        yield Rig(earshot, broker, listener, nursery)


async def test_what_is_said_before_anybody_listens_is_heard_in_order_and_once(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with speaking() as rig:
        outlet = rig.earshot.open_outlet(HERE, headers={})
        inbox = Inbox()
        for number in range(20):
            outlet.publish(b"%d" % number, {})
            await trio.sleep(0.01)
            if number == 12:
                await rig.listener.subscribe(HERE, inbox)
        await inbox.wait(20)
        await trio.sleep(1)
        assert inbox.bodies == [b"%d" % number for number in range(20)]
        assert outlet.unpublished_bytes == 0


async def test_the_first_word_is_not_said_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with speaking() as rig:
        inbox = Inbox()
        await rig.listener.subscribe(HERE, inbox)
        began_at = trio.current_time()
        rig.earshot.open_outlet(HERE, headers={}).publish(b"x", {})
        await inbox.wait()
        assert SETTLE_S <= trio.current_time() - began_at < SETTLE_S + 0.01


async def test_what_comes_later_than_that_waits_for_nothing(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with speaking() as rig:
        inbox = Inbox()
        await rig.listener.subscribe(HERE, inbox)
        outlet = rig.earshot.open_outlet(HERE, headers={})
        await trio.sleep(1)
        began_at = trio.current_time()
        outlet.publish(b"x", {})
        await inbox.wait()
        assert trio.current_time() - began_at < 0.01


async def test_who_does_not_listen_is_told_of_on_the_replies(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with speaking() as rig:
        gone = Inbox()
        await rig.broker.subscribe(GONE, gone)
        outlet = rig.earshot.open_outlet(HERE, reply=GONE, headers={})
        outlet.publish(b"x", {})
        await trio.sleep(HEARD_WITHIN_S - 0.1)
        assert not gone.messages
        await trio.sleep(0.2)
        assert gone.messages[0].headers["Status"] == "503"
        assert outlet.unpublished_bytes == 0


async def test_who_should_have_listened_for_long_is_given_up_sooner(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with speaking() as rig:
        gone = Inbox()
        await rig.broker.subscribe(GONE, gone)
        outlet = rig.earshot.open_outlet(HERE, reply=GONE, headers={})
        await trio.sleep(HEARD_WITHIN_S)
        outlet.publish(b"x", {})
        await trio.sleep(HEARD_AT_LEAST_S - 0.1)
        assert not gone.messages
        await trio.sleep(0.2)
        assert gone.messages


async def test_the_end_is_still_heard_when_the_worker_ends(
    autojump_clock: trio.abc.Clock,
) -> None:
    inbox = Inbox()
    async with speaking() as rig:
        outlet = rig.earshot.open_outlet(HERE, headers={})
        outlet.publish(b"token", {})
        await trio.sleep(0.2)
        rig.nursery.cancel_scope.cancel()
        outlet.publish(b"end", {})
        with trio.CancelScope(shield=True):
            await trio.sleep(0.3)
            await rig.listener.subscribe(HERE, inbox)
            await inbox.wait(2)
    assert inbox.bodies == [b"token", b"end"]


async def test_an_end_that_nobody_hears_holds_nothing_up(autojump_clock: trio.abc.Clock) -> None:
    began_at = trio.current_time()
    async with speaking() as rig:
        rig.earshot.open_outlet(HERE, headers={}).publish(b"end", {})
        rig.nursery.cancel_scope.cancel()
    assert HEARD_AT_LEAST_S < trio.current_time() - began_at < HEARD_AT_LEAST_S + 0.1


async def test_an_outage_delays_and_doubles_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with speaking() as rig:
        inbox = Inbox()
        await rig.listener.subscribe(HERE, inbox)
        outlet = rig.earshot.open_outlet(HERE, headers={})
        rig.broker.disconnect()
        outlet.publish(b"one", {})
        outlet.publish(b"two", {})
        await trio.sleep(3)
        assert outlet.unpublished_bytes
        rig.broker.reconnect()
        await inbox.wait(2)
        await trio.sleep(10)
        assert inbox.bodies == [b"one", b"two"]


async def test_an_outage_that_lasts_leaves_what_there_is_to_the_outbox(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with speaking() as rig:
        inbox = Inbox()
        await rig.listener.subscribe(HERE, inbox)
        outlet = rig.earshot.open_outlet(HERE, headers={})
        rig.broker.disconnect()
        outlet.publish(b"one", {})
        await trio.sleep(HEARD_WITHIN_S + 2)
        outlet.publish(b"two", {})
        rig.broker.reconnect()
        await inbox.wait(2)
        await trio.sleep(10)
        assert inbox.bodies == [b"one", b"two"]


async def test_what_is_discarded_is_not_said(autojump_clock: trio.abc.Clock) -> None:
    async with speaking() as rig:
        outlet = rig.earshot.open_outlet(HERE, headers={})
        outlet.publish(b"one", {})
        outlet.publish(b"two", {})
        assert outlet.unpublished_bytes == 6
        outlet.discard()
        assert outlet.unpublished_bytes == 0
        outlet.publish(b"end", {})
        inbox = Inbox()
        await rig.listener.subscribe(HERE, inbox)
        await trio.sleep(1)
        assert inbox.bodies == [b"end"]


async def test_what_is_too_large_is_refused_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with speaking(max_payload=10) as rig:
        outlet = rig.earshot.open_outlet(HERE, headers={})
        with pytest.raises(MessageTooLarge):
            outlet.publish(b"x" * 11, {})
        assert outlet.unpublished_bytes == 0


async def test_beyond_the_bound_things_are_said_once(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFUSALS_MAX", 2)
    async with speaking() as rig:
        inbox = Inbox()
        for number in range(3):
            rig.earshot.open_outlet(f"response.{number}", headers={}).publish(b"%d" % number, {})
        await trio.sleep(0.1)
        await rig.listener.subscribe("response.*", inbox)
        await inbox.wait(2)
        await trio.sleep(1)
        assert sorted(inbox.bodies) == [b"0", b"1"]
        rig.earshot.open_outlet("response.4", headers={}).publish(b"4", {})
        await inbox.wait(3)


async def test_answers_to_requests_in_flight_are_not_bounded_with_refusals(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFUSALS_MAX", 0)
    async with speaking() as rig:
        inbox = Inbox()
        rig.earshot.open_outlet(HERE, reply=GONE, headers={}).publish(b"x", {})
        await trio.sleep(0.1)
        await rig.listener.subscribe(HERE, inbox)
        await inbox.wait()


async def test_a_late_word_of_the_server_harms_nobody(autojump_clock: trio.abc.Clock) -> None:
    async with speaking() as rig:
        inbox = Inbox()
        await rig.listener.subscribe(HERE, inbox)
        outlet = rig.earshot.open_outlet(HERE, headers={})
        for number in range(10):
            rig.listener.publish(
                Message(subject=f"inference.w1.probe.{number}", headers={"Status": "503"})
            )
        await trio.sleep(0.01)
        outlet.publish(b"x", {})
        await trio.sleep(1)
        assert inbox.bodies == [b"x"]
