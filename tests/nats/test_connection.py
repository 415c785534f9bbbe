"""The NATS broker against real servers: what it reaches, and what it survives."""

from __future__ import annotations

import asyncio
import signal
import socket

import psutil
import pytest
import trio
import trio_asyncio
from support.broker_conformance import PATIENCE_S, Inbox
from support.nats_fixtures import (
    NatsServer,
    fresh_subject,
    nats_url_fixture,  # noqa: F401
    private_server_fixture,  # noqa: F401
    running_server,
)
from support.nats_rig import SECRET, fake_server, log_fixture, quick, wait_until, works  # noqa: F401

from trio_worker.errors import BrokerUnavailable, ConfigError, MessageTooLarge
from trio_worker.nats.login import Login
from trio_worker.nats.mended_client import MendedClient
from trio_worker.ports import Message

pytestmark = pytest.mark.nats


# --- reaching it --------------------------------------------------------------------------


async def test_an_unreachable_server_is_given_up_in_time(free_url: str) -> None:
    started = trio.current_time()
    url = free_url.replace("//", f"//ann:{SECRET}@")
    with pytest.raises(BrokerUnavailable) as caught:
        async with quick(url, connect_timeout_s=0.3):
            raise AssertionError
    assert 0.3 <= trio.current_time() - started < 2
    text = str(caught.value)
    assert free_url in text
    assert "0.3 s" in text
    assert "nats.url" in text
    assert SECRET not in text


@pytest.fixture(name="free_url")
def free_url_fixture() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"nats://127.0.0.1:{probe.getsockname()[1]}"


async def test_an_unknown_host_is_given_up_in_time() -> None:
    with pytest.raises(BrokerUnavailable):
        async with quick("nats://no-such-host.invalid", connect_timeout_s=0.3):
            raise AssertionError


async def test_a_server_that_comes_late_is_waited_for(private_server: NatsServer) -> None:
    private_server.end()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def start() -> None:
            await trio.sleep(0.1)
            private_server.start()

        async with quick(private_server.url) as broker:
            assert await works(broker)


async def test_connecting_can_be_cancelled(free_url: str) -> None:
    started = trio.current_time()
    with trio.move_on_after(0.1) as scope:
        async with quick(free_url, connect_timeout_s=60):
            raise AssertionError
    assert scope.cancelled_caught
    assert trio.current_time() - started < 1


# --- what it survives ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_it_reconnects_subscribes_again_and_sends_what_was_held(
    private_server: NatsServer, number: signal.Signals
) -> None:
    plain, group, control = Inbox(), Inbox(), Inbox()
    async with quick(private_server.url) as broker:
        await broker.subscribe("a", plain)
        await broker.subscribe("a", group, group="g")
        await broker.subscribe("ctl.*", control)
        private_server.end(number)
        await wait_until(lambda: not broker.statistics().connected)
        mine, gone = (broker.open_outlet("a", headers={}) for _ in range(2))
        unheard = broker.open_outlet("nobody", reply="ctl.r", headers={})
        for count in range(100):
            mine.publish(b"%d" % count, {})
            gone.publish(b"discarded", {})
        assert mine.unpublished_bytes == 290
        gone.discard()
        assert broker.statistics().unpublished_bytes == 290
        unheard.publish(b"", {})
        private_server.start()
        await plain.wait(100)
        await group.wait(100)
        await control.wait()
        statistics = broker.statistics()
    expected = [b"%d" % count for count in range(100)]
    assert plain.bodies == expected
    assert group.bodies == expected
    assert statistics.reconnects == 1
    assert statistics.connected
    assert statistics.dropped == 0


async def test_flush_and_subscribe_wait_for_the_connection(private_server: NatsServer) -> None:
    inbox = Inbox()
    async with quick(private_server.url) as broker:
        private_server.end()
        await wait_until(lambda: not broker.statistics().connected)
        with trio.move_on_after(0.05) as scope:
            await broker.flush()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.subscribe, "a", inbox)
            nursery.start_soon(broker.flush)
            private_server.start()
        broker.publish(Message(subject="a"))
        await inbox.wait()


async def test_drain_without_a_connection_returns(private_server: NatsServer) -> None:
    inbox = Inbox()
    async with quick(private_server.url) as broker:
        subscription = await broker.subscribe("a", inbox)
        private_server.end()
        with trio.fail_after(PATIENCE_S):
            await subscription.drain()
        private_server.start()
        await broker.flush()
        broker.publish(Message(subject="a"))
        await broker.flush()
    assert inbox.messages == []


async def test_messages_over_a_limit_that_shrank_are_dropped(private_server: NatsServer) -> None:
    """Sending one would end the connection for good."""
    inbox = Inbox()
    async with quick(private_server.url) as broker:
        await broker.subscribe("a", inbox)
        private_server.end()
        await wait_until(lambda: not broker.statistics().connected)
        outlet = broker.open_outlet("a", headers={})
        outlet.publish(bytes(2000), {})
        outlet.publish(b"small", {})
        (private_server.folder / "nats.conf").write_text("max_payload: 1000")
        private_server.start()
        await inbox.wait()
        assert broker.max_payload == 1000
        with pytest.raises(MessageTooLarge):
            outlet.publish(bytes(1001), {})
        assert broker.statistics().dropped == 1
    assert inbox.bodies == [b"small"]


@pytest.mark.parametrize("size", [10, 500_000])
async def test_leaving_is_bounded_while_the_server_hangs(
    private_server: NatsServer, size: int
) -> None:
    """Also with a message that fills every buffer."""
    async with quick(private_server.url, close_timeout_s=0.2) as broker:
        await broker.subscribe("a", Inbox())
        private_server.send(signal.SIGSTOP)
        for _ in range(40):
            broker.publish(Message(subject="b", body=bytes(size)))
        await trio.testing.wait_all_tasks_blocked()
        started = trio.current_time()
    assert trio.current_time() - started < 1.2


async def test_a_hung_server_holds_up_neither_flush_nor_drain(private_server: NatsServer) -> None:
    async with quick(private_server.url, close_timeout_s=0.1) as broker:
        subscription = await broker.subscribe("a", Inbox())
        private_server.send(signal.SIGSTOP)
        started = trio.current_time()
        for wait in (broker.flush, subscription.drain):
            with trio.move_on_after(0.1) as scope:
                await wait()
            assert scope.cancelled_caught
        assert trio.current_time() - started < 2


async def test_after_a_hang_it_goes_on(private_server: NatsServer) -> None:
    inbox = Inbox()
    async with quick(private_server.url) as broker:
        await broker.subscribe("a", inbox)
        private_server.send(signal.SIGSTOP)
        outlet = broker.open_outlet("a", headers={})
        for number in range(40):
            outlet.publish(b"%d" % number + bytes(500_000), {})
        with trio.move_on_after(0.1):
            await broker.flush()
        # What is past the outbox is bounded by the buffers, and the rest can be discarded.
        assert outlet.unpublished_bytes > 10_000_000
        outlet.discard()
        private_server.send(signal.SIGCONT)
        outlet.publish(b"end", {})
        with trio.fail_after(PATIENCE_S):
            while b"end" not in inbox.bodies:
                await inbox.wait(len(inbox.messages) + 1)
        assert broker.statistics().reconnects == 0
    assert 1 <= len(inbox.bodies) < 21


async def test_it_leaves_nothing_behind(nats_url: str) -> None:
    process = psutil.Process()
    before = process.num_fds(), process.num_threads()
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with quick(nats_url) as broker:
        await broker.subscribe("left.behind", Inbox())
    assert process.num_fds() == before[0]
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert process.num_threads() <= before[1] + 1  # a thread of Trio's cache, for a look-up


async def test_an_end_for_good_is_told(log: list[str]) -> None:
    """After most errors of the server nats-py closes, and never tries again."""

    async def fails(stream: trio.SocketStream) -> None:
        await stream.send_all(b'INFO {"headers":true,"max_payload":1024}\r\n')
        await stream.receive_some()
        await stream.send_all(b"PONG\r\n")
        await stream.receive_some()
        await stream.send_all(b"-ERR 'User Authentication Expired'\r\n")
        await trio.sleep_forever()

    async with fake_server(fails) as where:
        async with quick(f"nats://{where}") as broker:
            broker.publish(Message(subject="a"))
            with trio.fail_after(PATIENCE_S):
                reason = await broker.wait_lost()
            assert "authentication expired" in reason
            assert not broker.statistics().connected
            broker.publish(Message(subject="a"))
            subscribed = False
            with trio.move_on_after(0.05):
                await broker.subscribe("a", Inbox())
                subscribed = True
            assert not subscribed
        assert broker.statistics().dropped == 1
    assert any("ended for good" in line for line in log)


async def test_what_nats_py_leaves_behind_in_asyncio_does_not_end_the_worker(
    nats_url: str,
) -> None:
    """Trio-asyncio's own handler raises such exceptions into the nursery of the loop."""
    async with quick(nats_url) as broker:
        trio_asyncio.current_loop.get().call_exception_handler(
            {"message": "never retrieved", "exception": ConnectionResetError()}
        )
        assert await works(broker)


async def test_a_close_that_nats_py_cancels_itself_is_a_close_all_the_same(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does when the server ends the connection at the same moment."""
    close = MendedClient.close

    async def cancelled(self: MendedClient) -> None:
        await close(self)
        raise asyncio.CancelledError

    monkeypatch.setattr(MendedClient, "close", cancelled)
    async with quick(nats_url) as broker:
        assert broker.statistics().connected


async def test_a_lame_duck_is_logged(private_server: NatsServer, log: list[str]) -> None:
    async with quick(private_server.url):
        private_server.send(signal.SIGUSR2)
        await wait_until(lambda: any("about to shut down" in line for line in log))


async def test_a_server_that_takes_no_more_subscriptions_ends_it_for_good() -> None:
    """Of its own accord nats-py closes then; whoever waits to subscribe must not wait unheard."""
    with running_server(config="max_subscriptions: 2") as server:
        async with quick(server.url) as broker, trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(broker.subscribe, fresh_subject(), Inbox())
            with trio.fail_after(PATIENCE_S):
                assert "maximum subscriptions" in await broker.wait_lost()
            nursery.cancel_scope.cancel()


LOCKED = """
authorization { users: [ { user: ann, password: "s3cret-horse", permissions: {
    publish: { deny: ["secret"] }, subscribe: { deny: ["inference.W1"] } } } ] }
"""


async def test_a_denied_subject_costs_its_messages_only_and_is_said(log: list[str]) -> None:
    with running_server(config=LOCKED) as server:
        async with quick(server.url, login=Login(user="ann", password=SECRET)) as broker:
            broker.publish(Message(subject="secret"))
            with pytest.raises(ConfigError, match=r"subscribe to 'inference\.W1'"):
                await broker.subscribe("inference.W1", Inbox())
            assert await works(broker)
            assert broker.statistics().reconnects == 0
    assert any('permissions violation for publish to "secret"' in line for line in log)


async def test_a_permission_that_is_taken_back_ends_a_worker_that_would_be_deaf(
    log: list[str],
) -> None:
    free = LOCKED.replace('"inference.W1"', '"nothing"')
    with running_server(config=free) as server:
        async with quick(server.url, login=Login(user="ann", password=SECRET)) as broker:
            await broker.subscribe("inference.W1", Inbox())
            (server.folder / "nats.conf").write_text(LOCKED)
            server.end()
            server.start()
            with trio.fail_after(PATIENCE_S):
                assert "'inference.W1'" in await broker.wait_lost()
            assert await works(broker), "its requests get their last word"


async def test_messages_that_were_not_taken_in_time_are_counted(
    nats_url: str, log: list[str]
) -> None:
    subject, inbox = fresh_subject(), Inbox()
    async with quick(nats_url, subscription_limit=4) as broker, quick(nats_url) as sender:
        await broker.subscribe(subject, inbox)
        for _ in range(2000):
            sender.publish(Message(subject=subject))
        await sender.flush()
        await broker.flush()
        assert broker.statistics().slow_consumers > 0
        assert broker.statistics().slow_consumers + len(inbox.messages) == 2000
    assert 1 <= sum("thrown away" in line for line in log) < 5
