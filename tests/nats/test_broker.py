"""The broker port, asked of its implementations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio
from support.broker_conformance import PATIENCE_S, Inbox, System, memory_system, nats_system
from support.nats_fixtures import fresh_subject, nats_url_fixture  # noqa: F401
from support.nats_virtual import virtual_server
from trio.testing import assert_checkpoints, assert_no_checkpoints

from trio_worker.errors import MessageTooLarge, StopWorker, WorkerFault
from trio_worker.ports import Message


@pytest.fixture(params=["memory", "virtual", pytest.param("nats", marks=pytest.mark.nats)])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """`virtual`: the NATS adapter, on a server in the event loop."""
    if request.param == "memory":
        yield memory_system()
    elif request.param == "virtual":
        with virtual_server() as server:
            yield nats_system(server.url)
    else:
        yield nats_system(request.getfixturevalue("nats_url"))


async def test_messages_arrive_whole_and_in_order(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as sender, system.open() as receiver:
        await receiver.subscribe(subject, inbox)
        for number in range(500):
            sender.publish(Message(subject=subject, body=b"%d" % number))
        await inbox.wait(500)
    assert inbox.bodies == [b"%d" % number for number in range(500)]


async def test_a_message_comes_with_its_subject_reply_and_headers(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    sent = Message(
        subject=subject,
        body=bytes(range(256)),
        reply="some.where",
        headers={"Request-Id": "r-1", "Note": "100 % plain: yes"},
    )
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        broker.publish(sent)
        (received,) = await inbox.wait()
    assert received == sent


async def test_a_message_without_reply_and_headers_says_so(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        broker.publish(Message(subject=subject))
        (received,) = await inbox.wait()
    assert received == Message(subject=subject, body=b"", reply=None, headers={})


async def test_header_values_cannot_break_the_protocol(system: System) -> None:
    """An error message may quote anything a caller sent."""
    subject, inbox = fresh_subject(), Inbox()
    value = " a\r\nTerminal: done\r\n\r\nb\tü\ud800 "
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        broker.publish(Message(subject=subject, body=b"x", headers={"Note": value}))
        broker.publish(Message(subject=subject, body=b"y"))
        await inbox.wait(2)
    first, second = inbox.messages
    assert first.body == b"x"
    assert second.body == b"y"
    assert first.headers == {
        "Note": "a%0D%0ATerminal: done%0D%0A%0D%0Ab%09%C3%BC%ED%A0%80",
    }


@pytest.mark.parametrize(
    "message",
    [
        Message(subject=""),
        Message(subject="a b"),
        Message(subject="a\r\nPUB"),
        Message(subject="a", reply="b\n"),
        Message(subject="a\ud800"),
        Message(subject="a", headers={"Two Words": "x"}),
        Message(subject="a", headers={"": "x"}),
        Message(subject="a", headers={"Name:": "x"}),
    ],
)
async def test_what_is_no_subject_or_header_is_refused(system: System, message: Message) -> None:
    async with system.open() as broker:
        with pytest.raises(ValueError):
            broker.publish(message)
        assert broker.statistics().unpublished_bytes == 0


@pytest.mark.parametrize("pattern", ["", "a b", "a..b", "a.>.b", "a*.b", ".a"])
async def test_what_is_no_pattern_cannot_be_subscribed_to(system: System, pattern: str) -> None:
    async with system.open() as broker:
        with pytest.raises(ValueError, match="subscribed"):
            await broker.subscribe(pattern, Inbox())


async def test_wildcards_take_in_what_they_should(system: System) -> None:
    base = fresh_subject()
    one, rest, exact = Inbox(), Inbox(), Inbox()
    async with system.open() as broker:
        await broker.subscribe(f"{base}.*.c", one)
        await broker.subscribe(f"{base}.>", rest)
        await broker.subscribe(f"{base}.a.c", exact)
        for tail in ("", ".a", ".a.c", ".b.c", ".a.c.d"):
            broker.publish(Message(subject=base + tail, body=tail.encode()))
        await broker.flush()
        await rest.wait(4)
    assert one.bodies == [b".a.c", b".b.c"]
    assert rest.bodies == [b".a", b".a.c", b".b.c", b".a.c.d"]
    assert exact.bodies == [b".a.c"]


async def test_a_group_shares_and_others_get_everything(system: System) -> None:
    subject = fresh_subject()
    members, single = [Inbox(), Inbox(), Inbox()], Inbox()
    async with system.open() as sender, system.open() as first, system.open() as second:
        await first.subscribe(subject, members[0], group="g")
        await second.subscribe(subject, members[1], group="g")
        await second.subscribe(subject, members[2], group="g")
        await second.subscribe(subject, single)
        for number in range(300):
            sender.publish(Message(subject=subject, body=b"%d" % number))
        await single.wait(300)
        await first.flush()
        await second.flush()
    shared = [body for member in members for body in member.bodies]
    assert sorted(shared) == sorted(single.bodies)
    assert all(len(member.bodies) > 30 for member in members)


async def test_no_interest_is_reported_to_the_publishing_connection(system: System) -> None:
    """How a worker learns, in a millisecond, that the caller has gone."""
    base = fresh_subject()
    control, strangers = Inbox(), Inbox()
    async with system.open() as broker, system.open() as stranger:
        await broker.subscribe(f"{base}.ctl.*", control)
        await stranger.subscribe(f"{base}.other.*", strangers)
        broker.publish(Message(subject=f"{base}.gone", body=b"x", reply=f"{base}.ctl.r1"))
        broker.publish(Message(subject=f"{base}.gone", body=b"x", reply=f"{base}.other.r1"))
        broker.publish(Message(subject=f"{base}.gone", body=b"x"))
        await broker.flush()
        await stranger.flush()
        (status,) = await control.wait()
    assert status.subject == f"{base}.ctl.r1"
    assert status.body == b""
    assert status.headers["Status"] == "503"
    assert status.headers["Nats-Subject"] == f"{base}.gone"
    assert strangers.messages == []


async def test_drain_keeps_what_had_arrived_and_ends_the_interest(system: System) -> None:
    subject, inbox, gone = fresh_subject(), Inbox(), Inbox()
    async with system.open() as sender, system.open() as receiver:
        subscription = await receiver.subscribe(subject, inbox)
        await sender.subscribe("_INBOX.gone", gone)
        for number in range(200):
            sender.publish(Message(subject=subject, body=b"%d" % number))
        await sender.flush()
        with trio.fail_after(PATIENCE_S):
            await subscription.drain()
        assert len(inbox.messages) == 200
        sender.publish(Message(subject=subject, reply="_INBOX.gone"))
        await gone.wait()
        await subscription.drain()
    assert len(inbox.messages) == 200


async def test_a_cancelled_drain_ends_the_interest_all_the_same(system: System) -> None:
    subject, inbox, gone = fresh_subject(), Inbox(), Inbox()
    async with system.open() as sender, system.open() as receiver:
        subscription = await receiver.subscribe(subject, inbox)
        await sender.subscribe("_INBOX.gone2", gone)
        with trio.CancelScope() as scope:
            scope.cancel()
            await subscription.drain()
        assert scope.cancelled_caught
        await receiver.flush()
        sender.publish(Message(subject=subject, reply="_INBOX.gone2"))
        await gone.wait()
    assert inbox.messages == []


async def test_a_cancelled_subscribe_leaves_no_interest(system: System) -> None:
    subject, inbox, gone = fresh_subject(), Inbox(), Inbox()
    async with system.open() as broker:
        with trio.CancelScope() as scope:
            scope.cancel()
            await broker.subscribe(subject, inbox)
        await broker.subscribe("_INBOX.gone3", gone)
        broker.publish(Message(subject=subject, reply="_INBOX.gone3"))
        await gone.wait()
    assert inbox.messages == []


async def test_a_failing_sink_does_not_end_its_subscription(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()

    def sink(message: Message) -> None:
        if message.body == b"bad":
            raise RuntimeError("a fault of ours")
        inbox(message)

    async with system.open() as broker:
        await broker.subscribe(subject, sink)
        broker.publish(Message(subject=subject, body=b"bad"))
        broker.publish(Message(subject=subject, body=b"good"))
        await inbox.wait()
    assert inbox.bodies == [b"good"]


async def test_a_sink_is_not_called_inside_publish(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        broker.publish(Message(subject=subject))
        assert inbox.messages == []
        await inbox.wait()


@pytest.mark.parametrize("headers", [{}, {"Request-Id": "r", "Note": "  a value "}])
async def test_the_largest_message_passes_and_one_byte_more_is_refused(
    system: System, headers: dict[str, str]
) -> None:
    """A server ends the connection of a client that sends more, for good."""
    subject, inbox = fresh_subject(), Inbox()
    block = b"NATS/1.0\r\nRequest-Id: r\r\nNote: a value\r\n\r\n" if headers else b""
    async with system.open() as broker:
        room = broker.max_payload - len(block)
        await broker.subscribe(subject, inbox)
        common = dict(list(headers.items())[:1])
        own = dict(list(headers.items())[1:])
        outlet = broker.open_outlet(subject, headers=common)

        def publish_loosely(body: bytes) -> None:
            broker.publish(Message(subject=subject, body=body, headers=headers))

        for publish in (publish_loosely, partial(outlet.publish, headers=own)):
            with pytest.raises(MessageTooLarge) as caught:
                publish(bytes(room + 1))
            assert caught.value.size == caught.value.limit + 1
            publish(bytes(room))
        await inbox.wait(2)
        assert broker.statistics().reconnects == 0
    assert [len(body) for body in inbox.bodies] == [room, room]


async def test_an_outlet_has_in_common_what_it_was_opened_with(system: System) -> None:
    """The same messages as without it, to the order of their headers."""
    subject, inbox = fresh_subject(), Inbox()
    common = {"Request-Id": "r-1", "Note": " zwölf "}
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        outlet = broker.open_outlet(subject, reply="some.where", headers=common)
        outlet.publish(b"first", {"Sequence": "0"})
        outlet.publish(b"second", {"Sequence": "1", "Terminal": "\tdone\n!"})
        outlet.publish(b"third", {})
        broker.open_outlet(subject, headers={}).publish(b"bare", {})
        await inbox.wait(4)
    plain = {"Request-Id": "r-1", "Note": "zw%C3%B6lf"}
    expected = [
        (b"first", "some.where", {**plain, "Sequence": "0"}),
        (b"second", "some.where", {**plain, "Sequence": "1", "Terminal": "done%0A!"}),
        (b"third", "some.where", plain),
        (b"bare", None, {}),
    ]
    received = [(each.body, each.reply, each.headers) for each in inbox.messages]
    assert received == expected
    assert [list(each[2]) for each in received] == [list(each[2]) for each in expected]


@pytest.mark.parametrize(
    ("subject", "reply", "headers"),
    [
        ("", None, {}),
        ("a b", None, {}),
        ("a", "b\n", {}),
        ("a\ud800", None, {}),
        ("a", "", {"": "x"}),
    ],
)
async def test_what_is_no_subject_or_header_opens_no_outlet(
    system: System, subject: str, reply: str | None, headers: dict[str, str]
) -> None:
    async with system.open() as broker:
        with pytest.raises(ValueError):
            broker.open_outlet(subject, reply=reply, headers=headers)


@pytest.mark.parametrize("headers", [{"Two Words": "x"}, {"": "x"}, {"Request-Id": "again"}])
async def test_what_is_no_header_or_one_too_many_is_not_published(
    system: System, headers: dict[str, str]
) -> None:
    async with system.open() as broker:
        outlet = broker.open_outlet("a", headers={"Request-Id": "r"})
        with pytest.raises(ValueError):
            outlet.publish(b"x", headers)
        assert outlet.unpublished_bytes == 0


async def test_subjects_that_fill_the_control_line_are_refused(system: System) -> None:
    """The reply subject is the caller's choice, and goes onto our line beside ours."""
    inbox = Inbox()
    base = fresh_subject()
    control = "inference.w.ctl.r"
    async with system.open() as broker:
        await broker.subscribe(f"{base}.>", inbox)
        line = f"HPUB {base}. {control} 18 19\r\n"
        headers = {"A": "b"}
        fits = f"{base}." + "x" * (4096 - len(line))
        broker.publish(Message(subject=fits, body=b"y", reply=control, headers=headers))
        with pytest.raises(MessageTooLarge):
            broker.publish(Message(subject=fits + "x", body=b"y", reply=control, headers=headers))
        await inbox.wait()
        await broker.flush()
        assert broker.statistics().reconnects == 0


async def test_outlets_count_and_discard_their_own(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        mine, yours = (broker.open_outlet(subject, headers={}) for _ in range(2))
        mine.publish(b"mine", {})
        yours.publish(b"yours", {})
        broker.publish(Message(subject=subject, body=b"nobody's"))
        assert mine.unpublished_bytes == len(subject) + 4
        assert broker.statistics().unpublished_bytes == 3 * len(subject) + 4 + 5 + 8
        mine.discard()
        assert mine.unpublished_bytes == 0
        assert yours.unpublished_bytes == len(subject) + 5
        await inbox.wait(2)
        await broker.flush()
        assert yours.unpublished_bytes == 0
        assert broker.statistics().unpublished_bytes == 0
        mine.discard()
    assert inbox.bodies == [b"yours", b"nobody's"]


async def test_what_belongs_to_no_request_is_bounded(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with system.open(outbox_limit_bytes=2 * (len(subject) + 10)) as broker:
        await broker.subscribe(subject, inbox)
        for number in range(5):
            broker.publish(Message(subject=subject, body=b"%010d" % number))
        broker.open_outlet(subject, headers={}).publish(b"last", {})
        assert broker.statistics().dropped == 3
        await inbox.wait(3)
    assert inbox.bodies == [b"0000000000", b"0000000001", b"last"]


async def test_inboxes_are_fresh(system: System) -> None:
    async with system.open() as broker:
        inboxes = {broker.new_inbox() for _ in range(100)}
    assert len(inboxes) == 100
    assert all(inbox.startswith("_INBOX.") and inbox.count(".") == 1 for inbox in inboxes)


async def test_statistics_add_up(system: System) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        for _ in range(3):
            broker.publish(Message(subject=subject))
        await inbox.wait(3)
        statistics = broker.statistics()
    assert statistics.connected
    assert (statistics.received, statistics.published) == (3, 3)
    assert (statistics.dropped, statistics.reconnects, statistics.slow_consumers) == (0, 0, 0)


async def test_what_is_published_last_still_arrives(system: System) -> None:
    """A terminal message is published right before the end."""
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as receiver:
        await receiver.subscribe(subject, inbox)
        with trio.CancelScope() as scope:
            async with system.open() as sender:
                for number in range(300):
                    sender.publish(Message(subject=subject, body=b"%d" % number))
                scope.cancel()
                await trio.sleep_forever()
        await inbox.wait(300)


async def test_flush_can_be_cancelled_and_the_connection_goes_on(system: System) -> None:
    """In nats-py the answer to a cancelled flush ends the read loop."""
    subject, inbox = fresh_subject(), Inbox()
    async with system.open() as broker:
        await broker.subscribe(subject, inbox)
        for steps in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(broker.flush)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        broker.publish(Message(subject=subject))
        await inbox.wait()
        with trio.fail_after(PATIENCE_S):
            await broker.flush()


async def test_exceptions_leave_the_context_as_they_were_raised(system: System) -> None:
    fault = WorkerFault("because")
    with pytest.raises(StopWorker) as caught:
        async with system.open():
            raise fault
    assert caught.value is fault
    with pytest.raises(KeyError):
        async with system.open(), trio.open_nursery():
            raise KeyError


async def test_what_may_wait_is_a_checkpoint_also_when_it_need_not(system: System) -> None:
    """A sweep that cancels at every checkpoint has to find the same ones in either broker."""
    subject = fresh_subject()
    async with AsyncExitStack() as stack:
        with assert_checkpoints():
            broker = await stack.enter_async_context(system.open())
        with assert_checkpoints():
            subscription = await broker.subscribe(subject, Inbox())
        with assert_checkpoints(), pytest.raises(ValueError):
            await broker.subscribe("a b", Inbox())
        with assert_checkpoints():
            await broker.flush()
        broker.publish(Message(subject=subject))
        with assert_checkpoints():
            await broker.flush()
        for _ in range(2):
            with assert_checkpoints():
                await subscription.drain()
        with assert_checkpoints():
            await stack.aclose()


async def test_what_never_waits_is_no_checkpoint(system: System) -> None:
    """Whatever is checked before a message is published still holds when it is."""
    subject = fresh_subject()
    async with system.open() as broker:
        with assert_no_checkpoints():
            outlet = broker.open_outlet(subject, headers={})
            outlet.publish(b"", {})
            broker.publish(Message(subject=subject))
            outlet.discard()
            broker.new_inbox()
            broker.statistics()


async def test_wherever_subscribing_is_cancelled_there_is_interest_or_there_is_none(
    system: System,
) -> None:
    """Also between the server's having it and its saying so."""
    gone = Inbox()
    async with system.open() as broker:
        await broker.subscribe("_INBOX.gone4", gone)
        for steps in range(30):
            subject, inbox = fresh_subject(), Inbox()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(broker.subscribe, subject, inbox)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            expected = 0 if nursery.cancel_scope.cancelled_caught else 1
            nobody = len(gone.messages)
            broker.publish(Message(subject=subject, reply="_INBOX.gone4"))
            await (inbox.wait() if expected else gone.wait(nobody + 1))
            assert len(inbox.messages) == expected


async def test_a_connection_that_stands_is_not_lost(system: System) -> None:
    async with system.open() as broker:
        with trio.move_on_after(0) as scope:
            await broker.wait_lost()
        assert scope.cancelled_caught
