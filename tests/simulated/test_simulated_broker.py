"""The message system in the event loop: what it adds for tests, on the mock clock."""

from __future__ import annotations

import random
from functools import partial

import pytest
import trio
import trio.testing
from support.broker_conformance import Inbox

from trio_worker.ports import Message
from trio_worker.simulated.broker import (
    MemoryBroker,
    MemoryServer,
    open_memory_broker,
    subject_matches,
)


@pytest.fixture(name="server")
def server_fixture() -> MemoryServer:
    return MemoryServer(random=random.Random(1))


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a", "a", True),
        ("a", "a.b", False),
        ("a.b", "a", False),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.*", "a.b", True),
        ("*.b", "a.b", True),
        (">", "a", True),
        (">", "a.b.c", True),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        ("a.*.>", "a.b", False),
        ("a.*.>", "a.b.c", True),
    ],
)
def test_patterns(pattern: str, subject: str, expected: bool) -> None:  # noqa: FBT001
    assert subject_matches(pattern, subject) is expected


async def test_delays_pass_on_the_clock_and_keep_the_order(
    server: MemoryServer, autojump_clock: trio.testing.MockClock
) -> None:
    inbox, times = Inbox(), []

    def sink(message: Message) -> None:
        times.append(trio.current_time())
        inbox(message)

    async with open_memory_broker(server) as broker:
        await broker.subscribe("a", sink)
        began = trio.current_time()
        server.delay_s = 3600.0
        broker.publish(Message(subject="a", body=b"1"))
        await trio.testing.wait_all_tasks_blocked()
        server.delay_s = 0.0
        broker.publish(Message(subject="a", body=b"2"))
        await broker.flush()
    assert inbox.bodies == [b"1", b"2"]
    assert times == [began + 3600, began + 3600]


async def test_an_outage_holds_what_is_sent_and_loses_what_is_under_way(
    server: MemoryServer, autojump_clock: trio.testing.MockClock
) -> None:
    inbox = Inbox()
    async with open_memory_broker(server) as sender, open_memory_broker(server) as receiver:
        await receiver.subscribe("a", inbox)
        outlet, other = (sender.open_outlet("a", headers={}) for _ in range(2))
        sender.disconnect()
        for number in range(5):
            outlet.publish(b"%d" % number, {})
            other.publish(b"other", {})
        await trio.sleep(10)
        assert inbox.messages == []
        assert outlet.unpublished_bytes == 10
        other.discard()
        assert sender.statistics().unpublished_bytes == 10
        assert not sender.statistics().connected
        sender.reconnect()
        await inbox.wait(5)
        assert inbox.bodies == [b"0", b"1", b"2", b"3", b"4"]
        assert sender.statistics().reconnects == 1

        server.delay_s = 1.0
        sender.publish(Message(subject="a", body=b"lost"))
        await sender.flush()
        server.delay_s = 5.0
        sender.publish(Message(subject="a", body=b"lost too"))
        await trio.sleep(0.1)
        receiver.disconnect()
        receiver.reconnect()
        sender.publish(Message(subject="a", body=b"kept"))
        await trio.sleep(20)
    assert inbox.bodies[5:] == [b"lost", b"kept"]


async def test_whoever_is_away_is_not_interested(server: MemoryServer) -> None:
    control = Inbox()
    async with open_memory_broker(server) as sender, open_memory_broker(server) as receiver:
        await receiver.subscribe("a", Inbox())
        await sender.subscribe("ctl", control)
        receiver.disconnect()
        sender.publish(Message(subject="a", reply="ctl"))
        (status,) = await control.wait()
    assert status.headers["Status"] == "503"


async def test_subscribe_and_flush_wait_for_the_line(server: MemoryServer) -> None:
    inbox = Inbox()
    async with open_memory_broker(server) as broker:
        broker.disconnect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.subscribe, "a", inbox)
            nursery.start_soon(broker.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 2
            broker.reconnect()
        broker.publish(Message(subject="a"))
        await inbox.wait()


async def test_an_end_for_good_is_told_and_stays(server: MemoryServer) -> None:
    async with open_memory_broker(server) as broker:
        broker.close_for_good("thrown out")
        with trio.testing.assert_checkpoints():
            assert await broker.wait_lost() == "thrown out"
        broker.reconnect()
        assert not broker.statistics().connected
        broker.publish(Message(subject="a"))
    assert broker.statistics().dropped == 1


async def test_what_is_under_way_to_one_subscription_is_bounded(server: MemoryServer) -> None:
    inbox = Inbox()
    server.delay_s = 0.01
    async with open_memory_broker(server, subscription_limit=3) as broker:
        await broker.subscribe("a", inbox)
        for number in range(5):
            broker.publish(Message(subject="a", body=b"%d" % number))
        await broker.flush()
        assert broker.statistics().slow_consumers == 2
    assert inbox.bodies == [b"0", b"1", b"2"]


async def test_the_same_seed_chooses_the_same_members() -> None:
    """Although Trio runs the tasks of one pass in a random order."""

    async def chosen() -> list[tuple[int, bytes]]:
        server = MemoryServer(random=random.Random(42))
        order: list[tuple[int, bytes]] = []

        def take(number: int, message: Message) -> None:
            order.append((number, message.body))

        async with (
            open_memory_broker(server) as first,
            open_memory_broker(server) as second,
            open_memory_broker(server) as third,
        ):
            brokers = (first, second, third)
            for number, broker in enumerate(brokers):
                await broker.subscribe("a", partial(take, number), group="g")
            for count in range(60):
                brokers[count % 3].publish(Message(subject="a", body=b"%d" % count))
            for broker in brokers:
                await broker.flush()
        return order

    runs = [await chosen() for _ in range(5)]
    assert all(run == runs[0] for run in runs)
    assert [body for _, body in runs[0]] == [b"%d" % count for count in range(60)]


async def test_the_others_go_on_when_one_connection_closes(
    server: MemoryServer, autojump_clock: trio.testing.MockClock
) -> None:
    """Any connection's task may be the one that carries."""
    inbox = Inbox()
    server.delay_s = 5.0
    async with open_memory_broker(server) as receiver:
        await receiver.subscribe("a", inbox)
        for _ in range(20):
            async with open_memory_broker(server) as sender:
                sender.publish(Message(subject="a"))
        await receiver.flush()
    assert len(inbox.messages) == 20


async def test_leaving_is_bounded_when_nothing_moves(
    server: MemoryServer, autojump_clock: trio.testing.MockClock
) -> None:
    server.delay_s = 1e6
    began = trio.current_time()
    async with open_memory_broker(server, close_timeout_s=2.0) as broker:
        broker.publish(Message(subject="a"))
    assert trio.current_time() - began == pytest.approx(2.0)
    assert isinstance(broker, MemoryBroker)


# --- splits, and connections that are frozen ------------------------------------------------


async def test_the_sides_of_a_split_do_not_know_of_each_other(
    server: MemoryServer, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        open_memory_broker(server) as asking,
        open_memory_broker(server) as near,
        open_memory_broker(server) as far,
    ):
        heard_near, heard_far, status = Inbox(), Inbox(), Inbox()
        await near.subscribe("a", heard_near, group="g")
        await far.subscribe("a", heard_far, group="g")
        await far.subscribe("b", heard_far)
        await asking.subscribe("status", status)
        server.split(far)
        for _ in range(20):
            asking.publish(Message(subject="a"))
        asking.publish(Message(subject="b", reply="status"))
        far.publish(Message(subject="a", body=b"far"))
        await trio.sleep(1)
        assert len(heard_near.messages) == 20
        assert heard_far.bodies == [b"far"]
        assert [each.headers["Status"] for each in status.messages] == ["503"]
        server.heal()
        asking.publish(Message(subject="b", body=b"again"))
        await trio.sleep(1)
        assert heard_far.bodies == [b"far", b"again"]


async def test_what_goes_to_a_frozen_connection_waits_for_it_and_so_does_what_it_says(
    server: MemoryServer, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_memory_broker(server) as asking, open_memory_broker(server) as frozen:
        heard, status = Inbox(), Inbox()
        await frozen.subscribe("a", heard)
        await asking.subscribe("said", status)
        frozen.freeze()
        for number in range(3):
            asking.publish(Message(subject="a", body=b"%d" % number, reply="said"))
            frozen.publish(Message(subject="said", body=b"%d" % number))
        await trio.sleep(10)
        assert heard.messages == status.messages == []
        frozen.thaw()
        asking.publish(Message(subject="a", body=b"3"))
        await trio.sleep(0.001)
        assert heard.bodies == [b"0", b"1", b"2", b"3"]
        assert status.bodies == [b"0", b"1", b"2"]
