"""What the NATS broker does in time, on the mock clock: every figure here is exact."""

from __future__ import annotations

import asyncio

import pytest
import trio
import trio_asyncio
from support.broker_conformance import Inbox
from support.nats_rig import log_fixture  # noqa: F401
from support.nats_virtual import (
    WAIT_S,
    WINDOW_BYTES,
    VirtualServer,
    opened,
    server_fixture,  # noqa: F401
)
from trio.testing import MockClock, assert_checkpoints

from trio_worker.errors import BrokerUnavailable, ConfigError, MessageTooLarge
from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Message

# --- connecting ---------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["down", "black hole", "silent"])
async def test_an_attempt_to_connect_ends_at_its_time(
    server: VirtualServer, autojump_clock: MockClock, trouble: str
) -> None:
    server.is_up = trouble != "down"
    server.is_black_hole = trouble == "black hole"
    server.is_silent = trouble == "silent"
    with pytest.raises(BrokerUnavailable, match="tried for 11 s"):
        async with opened(server.url, connect_timeout_s=11.0):
            raise AssertionError
    assert trio.current_time() == pytest.approx(11.0)
    # Two seconds of patience, and two between.
    per_attempt_s = WAIT_S if trouble == "down" else 2 * WAIT_S
    assert server.attempts_at == pytest.approx(
        [number * per_attempt_s for number in range(len(server.attempts_at))]
    )
    assert len(server.attempts_at) == 1 + 11 // per_attempt_s


async def test_a_server_that_comes_late_is_found_at_the_next_attempt(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    server.is_up = False
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def come() -> None:
            await trio.sleep(7)
            server.start()

        async with opened(server.url):
            assert trio.current_time() == pytest.approx(8.0)


# --- an outage ----------------------------------------------------------------------------


async def test_after_an_outage_it_is_back_at_the_next_attempt_with_everything_it_held(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    inbox = Inbox()
    async with opened(server.url) as broker:
        await broker.subscribe("a.*", inbox)
        server.attempts_at.clear()
        server.kill()
        await trio.sleep(0.5)
        kept = broker.open_outlet("a.kept", headers={})
        gone = broker.open_outlet("a.gone", headers={})
        for number in range(200):
            kept.publish(b"%d" % number, {})
            gone.publish(b"", {})
        gone.discard()
        assert not broker.statistics().connected
        await trio.sleep(6.0)
        assert not inbox.messages
        server.start()
        await inbox.wait(200)
        assert trio.current_time() == pytest.approx(8.0)
        await trio.sleep(60)
    assert server.attempts_at == pytest.approx([2.0, 4.0, 6.0, 8.0])
    assert inbox.bodies == [b"%d" % number for number in range(200)]
    assert broker.statistics().reconnects == 1
    assert broker.statistics().dropped == 0


async def test_it_reconnects_for_ever(server: VirtualServer, autojump_clock: MockClock) -> None:
    async with opened(server.url, reconnect_wait_s=60.0) as broker:
        server.kill()
        await trio.sleep(24 * 3600 + 1)
        assert len(server.attempts_at) == 24 * 60 + 1
        server.start()
        await trio.sleep(60)
        assert broker.statistics().connected


async def test_what_belongs_to_no_request_is_bounded_over_an_outage(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    inbox = Inbox()
    async with opened(server.url, outbox_limit_bytes=1000) as broker:
        await broker.subscribe("a", inbox)
        server.kill()
        await trio.sleep(0.1)
        for number in range(30):
            broker.publish(Message(subject="a", body=b"%099d" % number))
        assert broker.statistics().unpublished_bytes == 1000
        assert broker.statistics().dropped == 20
        server.start()
        await trio.sleep(WAIT_S)
        assert [int(body) for body in inbox.bodies] == list(range(10))


async def test_what_was_on_its_way_when_the_line_broke_is_lost_and_not_sent_twice(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    """At most once: a second copy of a terminal message would be worse than none."""
    async with opened(server.url) as broker:
        server.hang()
        broker.publish(Message(subject="a", body=b"on its way"))
        await trio.sleep(1)
        server.kill()
        await trio.sleep(0.1)
        broker.publish(Message(subject="a", body=b"held"))
        server.start()
        await trio.sleep(WAIT_S)
    assert server.bodies == [b"held"]


async def test_a_subscription_given_up_over_an_outage_does_not_come_back(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    inbox = Inbox()
    async with opened(server.url) as broker:
        kept = await broker.subscribe("kept", inbox)
        ended = await broker.subscribe("ended", inbox)
        server.kill()
        await trio.sleep(0.1)
        with trio.move_on_after(0.5) as scope:
            await broker.subscribe("never", inbox)
        assert scope.cancelled_caught
        started = trio.current_time()
        await ended.drain()
        assert trio.current_time() == started
        server.start()
        await trio.sleep(WAIT_S)
        (line,) = server.lines
        assert set(line.subscriptions.values()) == {"kept"}
        await kept.drain()
        assert not line.subscriptions


# --- a server that hangs ------------------------------------------------------------------


async def test_a_hung_server_is_given_up_after_three_intervals(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url, ping_interval_s=15.0) as broker:
        await trio.sleep(601)
        assert server.verbs("PING")[1:] == pytest.approx([15.0 * n for n in range(1, 41)])
        server.hang()
        # Two pings without an answer, and the time for a third one.
        await trio.sleep(43.9)
        assert broker.statistics().connected
        await trio.sleep(0.2)
        assert not broker.statistics().connected
        server.go_on()
        await trio.sleep(2 * WAIT_S)
        assert broker.statistics().connected
        assert broker.statistics().reconnects == 1


async def test_a_server_that_hangs_for_less_costs_a_delay_only(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    inbox = Inbox()
    async with opened(server.url, ping_interval_s=15.0) as broker:
        await broker.subscribe("a", inbox)
        for _ in range(10):
            server.hang()
            broker.publish(Message(subject="a"))
            await trio.sleep(29)
            server.go_on()
            await trio.sleep(31)
        assert broker.statistics().reconnects == 0
    assert len(inbox.messages) == 10


async def test_what_is_past_the_outbox_while_a_server_hangs_is_bounded(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    """The rest can still be discarded, and is accounted to its request."""
    async with opened(server.url, close_timeout_s=0.5) as broker:
        server.hang()
        outlet = broker.open_outlet("a", headers={})
        for _ in range(1000):
            outlet.publish(bytes(10_000), {})
        await trio.sleep(1)
        # The window, and what one pass wrote last.
        past = 10_000_000 - outlet.unpublished_bytes
        assert past <= WINDOW_BYTES + 64 * 1024 + 10_000
        outlet.discard()
        assert broker.statistics().unpublished_bytes == 0


async def test_what_waits_for_a_hung_server_leaves_over_the_next_line_and_once(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    """What the old one's buffers had is lost with it, also what was cut in two."""
    async with opened(server.url) as broker:
        server.hang()
        for number in range(40):
            broker.publish(Message(subject="a", body=b"%-10000d" % number))
        await trio.sleep(1)
        held = broker.statistics().unpublished_bytes // 10_001
        assert 0 < held < 40
        server.kill()
        server.start()
        await broker.flush()
    assert [int(body) for body in server.bodies] == list(range(40 - held, 40))


async def test_an_error_of_a_line_that_has_been_replaced_holds_up_nothing(
    server: VirtualServer, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio may hear of it when the next line stands already, which breaks no more."""
    async with opened(server.url) as broker:
        client = broker.connection.client
        wait_written = client.wait_written

        async def late() -> None:
            await wait_written()
            raise ConnectionResetError

        monkeypatch.setattr(client, "wait_written", late)
        server.hang()
        for _ in range(40):
            broker.publish(Message(subject="a", body=bytes(10_000)))
        await trio.sleep(1)
        server.go_on()
        with trio.fail_after(1):
            await broker.flush()
    assert len(server.bodies) == 40


async def test_waits_on_a_hung_server_end_with_their_scopes(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url, close_timeout_s=0.5) as broker:
        subscription = await broker.subscribe("a", Inbox())
        server.hang()
        broker.publish(Message(subject="b", body=bytes(900_000)))
        started = trio.current_time()
        for wait in (broker.flush, lambda: broker.subscribe("c", Inbox()), subscription.drain):
            with trio.move_on_after(0.25) as scope:
                await wait()
            assert scope.cancelled_caught
        assert trio.current_time() - started == pytest.approx(0.75)


async def test_draining_is_bounded_by_itself(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url, close_timeout_s=0.5) as broker:
        subscription = await broker.subscribe("a", Inbox())
        server.hang()
        started = trio.current_time()
        await subscription.drain()
        assert trio.current_time() - started == pytest.approx(5.0)


async def test_a_flush_over_an_outage_returns_when_the_server_has_it_all(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    async with opened(server.url) as broker:
        server.kill()
        await trio.sleep(0.1)
        broker.publish(Message(subject="a", body=b"x"))
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def back() -> None:
                await trio.sleep(5)
                server.start()

            await broker.flush()
            assert server.bodies == [b"x"]
            assert trio.current_time() == pytest.approx(6.0)


async def test_a_flush_under_way_when_the_line_breaks_goes_on_over_the_next_one(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        server.hang()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def break_down() -> None:
                await trio.sleep(1)
                server.kill()
                server.start()

            with trio.fail_after(60):
                await broker.flush()
            # Back after three seconds, and tried again a quarter of a second after the break.
            assert 1 + WAIT_S <= trio.current_time() <= 1 + WAIT_S + 0.25


# --- how it is written ------------------------------------------------------------------------


async def test_what_is_published_in_one_step_is_written_as_one_buffer(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    """A turn of the engine has a token for every answer."""
    async with opened(server.url) as broker:
        outlets = [broker.open_outlet("a", headers={}) for _ in range(50)]
        server.writes.clear()
        for turn in range(3):
            for outlet in outlets:
                outlet.publish(b"%d" % turn, {})
            await trio.testing.wait_all_tasks_blocked()
        assert server.writes == [50 * len(b"PUB a 1\r\n0\r\n")] * 3
    assert server.bodies == [b"0"] * 50 + [b"1"] * 50 + [b"2"] * 50


@pytest.mark.parametrize(("size", "in_a_pass"), [(10_000, 7), (10, 256), (100_000, 1)])
async def test_other_tasks_run_while_a_long_outbox_is_written(
    server: VirtualServer, autojump_clock: MockClock, size: int, in_a_pass: int
) -> None:
    async with opened(server.url) as broker:
        server.writes.clear()
        for _ in range(10 * in_a_pass):
            broker.publish(Message(subject="a", body=bytes(size)))
        rounds = 0
        while broker.statistics().unpublished_bytes:
            await trio.lowlevel.checkpoint()
            rounds += 1
        assert rounds >= 10
        one = len(f"PUB a {size}\r\n\r\n") + size
        assert server.writes == [in_a_pass * one] * 10


# --- closing ------------------------------------------------------------------------------


async def test_closing_sends_what_is_held_and_takes_no_time(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        for number in range(1000):
            broker.publish(Message(subject="a", body=b"%d" % number))
    assert trio.current_time() == 0
    assert len(server.bodies) == 1000
    assert not server.lines


@pytest.mark.parametrize("size", [10, 2 * WINDOW_BYTES])
async def test_closing_on_a_hung_server_takes_its_bound_and_a_grace(
    server: VirtualServer, autojump_clock: MockClock, size: int, log: list[str]
) -> None:
    async with opened(server.url, close_timeout_s=2.0) as broker:
        server.hang()
        for _ in range(50):
            broker.publish(Message(subject="a", body=bytes(size)))
        await trio.sleep(1)
        started = trio.current_time()
    assert 2.0 <= trio.current_time() - started <= 2.0 + 0.5
    assert not server.lines
    held_back = any("could not be sent" in line for line in log)
    assert held_back is (size > WINDOW_BYTES)


async def test_closing_without_a_connection_does_not_wait_for_one(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    async with opened(server.url, close_timeout_s=60.0) as broker:
        server.kill()
        await trio.sleep(1)
        broker.publish(Message(subject="a"))
        started = trio.current_time()
    assert trio.current_time() - started <= 0.5
    assert broker.statistics().dropped == 1
    assert any("1 messages could not be sent" in line for line in log)


async def test_a_cancelled_block_still_sends_what_it_held(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(1):
        async with opened(server.url) as broker:
            await trio.sleep(0.5)
            broker.publish(Message(subject="a", body=b"before"))
            try:
                await trio.sleep_forever()
            finally:
                broker.publish(Message(subject="a", body=b"last word"))
    assert server.bodies == [b"before", b"last word"]
    assert trio.current_time() == pytest.approx(1.0)


# --- what the server says -----------------------------------------------------------------


async def test_a_subject_that_may_not_be_published_to_costs_those_messages_only(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    server.unpermitted = {"secret"}
    async with opened(server.url) as broker:
        for number in range(80):
            broker.publish(Message(subject="secret"))
            broker.publish(Message(subject="a", body=b"%d" % number))
            await trio.sleep(0.125)
        assert server.bodies == [b"%d" % number for number in range(80)]
        assert broker.statistics().reconnects == 0
    said = [line for line in log if "permissions violation" in line]
    # One in five seconds, over ten.
    assert len(said) == 2
    assert "(and 39 like it before)" in said[1]


async def test_a_subject_that_may_not_be_subscribed_to_is_an_error_of_configuration(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    """nats-py returns as if all were well, and nothing ever arrives."""
    server.unpermitted = {"inference.W1"}
    inbox = Inbox()
    async with opened(server.url) as broker:
        with pytest.raises(ConfigError, match=r"subscribe to 'inference\.W1'"):
            await broker.subscribe("inference.W1", inbox)
        await broker.subscribe("inference", inbox)
        broker.publish(Message(subject="inference"))
        await inbox.wait()
        # The connection is as good as before, and the refusal is over once it is permitted.
        server.unpermitted.clear()
        await broker.subscribe("inference.W1", inbox)
        broker.publish(Message(subject="inference.W1"))
        await inbox.wait(2)
        with trio.move_on_after(1):
            await broker.wait_lost()
            raise AssertionError


async def test_a_permission_that_is_taken_back_is_told(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    async with opened(server.url) as broker:
        await broker.subscribe("inference.w1", Inbox())
        await (await broker.subscribe("other", Inbox())).drain()
        server.say("-ERR 'Permissions Violation for Subscription to \"other\"'")
        await trio.sleep(1)
        server.kill()
        server.unpermitted = {"inference.w1"}
        server.start()
        with trio.fail_after(2 * WAIT_S):
            reason = await broker.wait_lost()
        assert "'inference.w1'" in reason
        broker.publish(Message(subject="a", body=b"last words"))
    assert server.bodies == [b"last words"]
    assert any(line.startswith("ERROR") and "inference.w1" in line for line in log)


async def test_a_lame_duck_is_used_until_it_goes_and_nothing_is_lost(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    inbox = Inbox()
    async with opened(server.url) as broker:
        await broker.subscribe("a", inbox)
        server.say('INFO {"headers":true,"max_payload":1024,"ldm":true}')
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def go_away() -> None:
                await trio.sleep(10.5)
                server.kill()
                await trio.sleep(3)
                server.start()

            for number in range(20):
                broker.publish(Message(subject="a", body=b"%d" % number))
                await trio.sleep(1)
        assert inbox.bodies == [b"%d" % number for number in range(20)]
        assert broker.statistics().reconnects == 1
    assert sum("about to shut down" in line for line in log) == 1


async def test_what_is_too_large_is_refused_before_the_server_would_end_the_connection(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    server.max_payload = 1000
    async with opened(server.url) as broker:
        outlet = broker.open_outlet("a", headers={})
        with pytest.raises(MessageTooLarge):
            outlet.publish(bytes(980), {"Name": "value"})
        outlet.publish(bytes(975), {"N": "v"})
        await trio.sleep(1)
        assert [len(body) for body in server.bodies] == [975]
        server.kill()
        await trio.sleep(0.1)
        outlet.publish(bytes(490), {"Name": "value"})
        outlet.publish(b"small", {})
        server.max_payload = 500
        server.start()
        await trio.sleep(WAIT_S)
        assert server.bodies[1:] == [b"small"]
        assert broker.statistics().dropped == 1
        assert broker.statistics().reconnects == 1
        assert broker.max_payload == 500


async def test_an_error_of_the_server_that_ends_the_connection_is_told(
    server: VirtualServer,
    autojump_clock: MockClock,
) -> None:
    async with opened(server.url) as broker:
        server.say("-ERR 'User Authentication Expired'")
        with trio.fail_after(1):
            assert "authentication expired" in await broker.wait_lost()
        with assert_checkpoints():
            await broker.wait_lost()
        assert not broker.statistics().connected
        await trio.sleep(600)
        assert len(server.attempts_at) == 1, "nats-py has given up"


# --- what comes over the line ---------------------------------------------------------------


async def test_what_a_stalled_loop_did_not_take_is_counted_and_the_rest_is_in_order(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    inbox = Inbox()
    async with opened(server.url, subscription_limit=4) as broker:
        await broker.subscribe("a", inbox)
        (line,) = server.lines
        for burst in range(3):
            line.feed(b"".join(b"MSG a 1 1\r\n%d\r\n" % number for number in range(10)))
            await trio.sleep(1)
            assert broker.statistics().slow_consumers == 6 * (burst + 1)
        assert inbox.bodies == [b"0", b"1", b"2", b"3"] * 3
        assert broker.statistics().received == 12
        await trio.sleep(5)
        line.feed(b"".join(b"MSG a 1 1\r\n%d\r\n" % number for number in range(10)))
        await trio.sleep(1)
    said = [line.strip() for line in log if "thrown away" in line]
    assert said == [
        f"WARNING NATS at nats://virtual:4222: messages on 'a' were thrown away, unread{more}"
        for more in ("", " (and 17 like it before)")
    ]


# --- the defaults ---------------------------------------------------------------------------


async def test_the_times_and_bounds_of_a_worker_are_the_documented_ones(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with open_nats_broker(server.url, name="test") as broker:
        assert broker.new_inbox().startswith("_INBOX.")
        await trio.sleep(46)
        assert server.verbs("PING")[1:] == [15, 30, 45]
        server.hang()
        for _ in range(50):
            broker.publish(Message(subject="a", body=bytes(10_000)))
        await trio.sleep(1)
        began = trio.current_time()
    # Two seconds for the outbox, and a grace for what is left.
    assert 2.0 <= trio.current_time() - began <= 2.5
    server.is_up, server.is_hung = False, False
    began = trio.current_time()
    with pytest.raises(BrokerUnavailable, match="tried for 10 s"):
        async with open_nats_broker(server.url, name="test"):
            raise AssertionError
    assert trio.current_time() - began == pytest.approx(10)


async def test_a_worker_may_have_inboxes_of_its_own(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url, inbox_prefix="_INBOX_w1") as broker:
        first, second = broker.new_inbox(), broker.new_inbox()
    assert first.startswith("_INBOX_w1.")
    assert first != second


# --- what a reconnection must reset -----------------------------------------------------------


async def test_over_ten_outages_everything_is_there_once(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    inbox, other = Inbox(), Inbox()
    async with opened(server.url) as broker:
        await broker.subscribe("a", inbox)
        await broker.subscribe("b", other, group="g")
        for number in range(10):
            server.kill()
            await trio.sleep(0.1)
            broker.publish(Message(subject="a", body=b"%d" % number))
            broker.publish(Message(subject="b", body=b"%d" % number))
            server.start()
            await trio.sleep(2 * WAIT_S)
            (line,) = server.lines
            assert sorted(line.subscriptions.values()) == ["a", "b"]
            assert list(line.groups.values()) == ["g"]
        assert inbox.bodies == other.bodies == [b"%d" % number for number in range(10)]
        assert broker.statistics().reconnects == 10
        assert broker.statistics().dropped == 0


async def test_what_has_ended_is_kept_nowhere(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        loop = trio_asyncio.current_loop.get()

        async def come_and_go() -> tuple[int, ...]:
            await broker.flush()
            subscription = await broker.subscribe("a.*", Inbox())
            await subscription.drain()
            with trio.CancelScope() as scope:
                scope.cancel()
                await broker.subscribe("b", Inbox())
            await trio.sleep(1)
            (line,) = server.lines
            return (
                len(broker.connection.interests),
                len(broker.connection.client._subs),
                len(line.subscriptions),
                len(asyncio.all_tasks(loop)),
            )

        first = await come_and_go()
        assert first[:3] == (0, 0, 0)
        for _ in range(20):
            assert await come_and_go() == first
    assert not asyncio.all_tasks(loop)


async def test_an_outage_is_said_when_it_begins_and_ends_and_a_close_is_none(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    async with opened(server.url):
        server.kill()
        await trio.sleep(5 * WAIT_S)
        server.start()
        await trio.sleep(2 * WAIT_S)
    said = [line.strip() for line in log if "connected" in line]
    where = "NATS at nats://virtual:4222"
    assert said == [
        f"INFO connected to {where}",
        f"WARNING disconnected from {where}; reconnecting",
        f"INFO reconnected to {where}",
    ]
