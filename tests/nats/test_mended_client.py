"""What is mended of nats-py: each of these, or of those its comments name, fails without a mend."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio_asyncio
from hypothesis import example, given
from hypothesis import strategies as st
from nats.aio.client import Client
from support.broker_conformance import PATIENCE_S, Inbox
from support.nats_fixtures import (
    NatsServer,
    fresh_subject,
    nats_url_fixture,  # noqa: F401
    private_server_fixture,  # noqa: F401
)
from support.nats_rig import SECRET, fake_server, log_fixture, quick, wait_until, works  # noqa: F401
from support.nats_virtual import WAIT_S, WINDOW_BYTES, VirtualServer, opened, server_fixture  # noqa: F401
from trio.testing import MockClock

from trio_worker.errors import BrokerUnavailable, ConfigError
from trio_worker.nats import mended_client
from trio_worker.nats.mended_client import MendedClient
from trio_worker.ports import Message


def test_every_test_that_a_mend_names_exists() -> None:
    named = set(re.findall(r"test_[a-z_]{10,}", Path(mended_client.__file__).read_text()))
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert named
    assert {name for name in named if f"async def {name}(" not in tests} == set()


# --- on the mock clock ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish",
    [
        pytest.param(b"MSG a.\xff 1 2\r\nhi\r\n", id="a subject that is not UTF-8"),
        pytest.param(b"MSG a 1 \xff\xfe 2\r\nhi\r\n", id="a reply that is not UTF-8"),
        pytest.param(b"MSG a 1 re\x0bply 2\r\nhi\r\n", id="a vertical tab in the reply"),
        pytest.param(b"MSG a\x0c5 1 2\r\nhi\r\n", id="a form feed in the subject"),
        pytest.param(b"HMSG a 1 r 3 5\r\nabchi\r\n", id="no header block"),
        pytest.param(b"HMSG a 1 r 8 10\r\nNATS/1.0hi\r\n", id="half a header block"),
        pytest.param(b"HMSG a 1 r 15 17\r\nNATS/1.0 \xff\xff\r\n\r\nhi\r\n", id="no status"),
        pytest.param(b"MSG a 99 2\r\nhi\r\n", id="a subscription that has gone"),
        pytest.param(b"MSG a 1 26\r\n-ERR 'Stale Connection'\r\n+\r\n", id="protocol in a body"),
        pytest.param(b"+OK\r\nPONG\r\nPING\r\n", id="answers that nobody asked for"),
        pytest.param(b"", id="nothing"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_what_another_client_sends_costs_that_message_at_most(
    server: VirtualServer,
    autojump_clock: MockClock,
    rubbish: bytes,
    at_once: bool,  # noqa: FBT001
) -> None:
    inbox = Inbox()
    async with opened(server.url) as broker:
        await broker.subscribe("a", inbox)
        (line,) = server.lines
        parts = [rubbish] if at_once else [rubbish[n : n + 1] for n in range(len(rubbish))]
        for part in parts:
            line.feed(part)
            await trio.sleep(0.001)
        broker.publish(Message(subject="a", body=b"and on"))
        await broker.flush()
        assert inbox.bodies[-1] == b"and on"
        assert broker.statistics().reconnects == 0
        assert server.lines == [line]


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=12),
            st.text(alphabet=": \t\x0b\x1c\xa0\u2003AZaz-é\r\n\0", max_size=12).map(str.encode),
        ),
        max_size=6,
    )
)
@example([b"Worker-Id: w-1", b"Sequence:12", b" Note \t:\x0b a: b\x0c", b"", b"no colon"])
@example([b"two words: 1", b"\xc3\xa9: 1", b"a\x1fb: 1", b"cut: \xe2\x82", b"kept: \xc2\xa0x\x1c"])
async def test_headers_are_read_as_nats_py_reads_them(lines: list[bytes]) -> None:
    raw = b"\r\n".join(lines)
    expected = {name: value for name, value in Client._parse_header_lines(raw).items() if name}
    assert MendedClient._parse_header_lines(raw) == expected


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param(b"HELLO\r\n", id="an unknown verb"),
        pytest.param(b"MSG a\r\n", id="too few words"),
        pytest.param(b"MSG a 1 x\r\n", id="a length that is none"),
        pytest.param(b"MSG a x 2\r\nhi\r\n", id="a number that is none"),
        pytest.param(b"HMSG a 1 2\r\nhi\r\n", id="one length of two"),
        pytest.param(b"INFO [\r\n", id="half an INFO"),
        pytest.param(b"INFO 7\r\n", id="an INFO that is no object"),
        pytest.param(b"x" * (64 * 1024 + 1), id="a line without an end"),
    ],
)
async def test_what_no_server_says_costs_the_connection_and_the_next_one_is_as_good(
    server: VirtualServer, autojump_clock: MockClock, nonsense: bytes
) -> None:
    inbox = Inbox()
    async with opened(server.url) as broker:
        await broker.subscribe("a", inbox)
        (line,) = server.lines
        line.feed(nonsense)
        await trio.sleep(0.1)
        assert not broker.statistics().connected
        await trio.sleep(2 * WAIT_S)
        assert broker.statistics().reconnects == 1
        broker.publish(Message(subject="a", body=b"and on"))
        await broker.flush()
        assert inbox.bodies == [b"and on"]


async def test_a_line_of_a_large_cluster_still_fits(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        (line,) = server.lines
        hosts = ",".join(f'"10.0.{n // 250}.{n % 250}:4222"' for n in range(3450))
        info = f'INFO {{"headers":true,"max_payload":500,"connect_urls":[{hosts}]}}\r\n'.encode()
        assert 60_000 < len(info) < 64 * 1024
        for start in range(0, len(info), 1000):
            line.feed(info[start : start + 1000])
            await trio.sleep(0.001)
        await broker.flush()
        assert broker.statistics().reconnects == 0


async def test_messages_come_whole_however_the_line_cuts_them(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    """The protocol inside of a body is a body."""
    inbox = Inbox()
    bodies = [b"\r\nMSG a 1 5\r\n" * 9, b"", b"\r\n", b"PING\r\n", bytes(range(256))]
    async with opened(server.url) as broker:
        await broker.subscribe("a", inbox)
        (line,) = server.lines
        sent = b"".join(b"MSG a 1 r %d\r\n%s\r\n" % (len(body), body) for body in bodies)
        for index in range(len(sent)):
            line.feed(sent[index : index + 1])
            await trio.sleep(0.0001)
        await inbox.wait(len(bodies))
        assert inbox.bodies == bodies
        assert {message.reply for message in inbox.messages} == {"r"}
        assert broker.statistics().received == len(bodies)


async def test_connecting_ends_when_it_is_cancelled_as_an_attempt_fails(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    server.is_up, server.is_black_hole = False, True
    client = MendedClient(wants_tls=False, on_ended=lambda _error: None)

    async def connect_and_cancel() -> None:
        task = asyncio.create_task(client.connect(server.url, max_reconnect_attempts=-1))
        await asyncio.sleep(1)
        server.on_refusal = task.cancel
        server.refusal.set()
        await asyncio.sleep(1)
        # Whoever tries once more gets in.
        server.is_up, server.is_black_hole = True, False
        await asyncio.wait({task})
        assert task.cancelled()

    async with trio_asyncio.open_loop():
        await trio_asyncio.aio_as_trio(connect_and_cancel)()
    assert len(server.attempts_at) == 1


async def test_a_server_that_hangs_up_while_it_greets_is_no_connection(
    server: VirtualServer, autojump_clock: MockClock, log: list[str]
) -> None:
    async with opened(server.url) as broker:
        server.hangs_up_on = "PING"
        server.kill()
        server.start()
        await trio.sleep(10 * WAIT_S)
        assert len(server.attempts_at) > 5
        assert broker.statistics().reconnects == 0
        server.hangs_up_on = ""
        await trio.sleep(2 * WAIT_S)
        assert broker.statistics().connected
        assert broker.statistics().reconnects == 1
        before = len(server.verbs("PING"))
        await trio.sleep(10 * 15)
        assert len(server.verbs("PING")) - before == 10, "and one task keeps it alive"
    assert sum("reconnecting" in line for line in log) == 1


async def test_a_ping_does_not_overtake_what_it_is_to_confirm(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    """Otherwise its answer says nothing: `subscribe` would return before the server knows."""
    async with opened(server.url) as broker:
        server.hang()
        broker.publish(Message(subject="a", body=bytes(2 * WINDOW_BYTES)))
        await trio.sleep(0.1)
        async with trio.open_nursery() as nursery:
            # The first one's command is being written; the second one's waits behind it.
            nursery.start_soon(broker.subscribe, "b", Inbox())
            await trio.sleep(0.1)
            nursery.start_soon(broker.subscribe, "c", Inbox())
            await trio.sleep(0.1)
            server.go_on()
    commands = [command for _, command in server.commands]
    assert commands[2:6] == ["PUB a", "SUB b", "SUB c", "PING"]


async def test_what_is_written_goes_behind_the_commands_that_wait(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    """And these are not written again by nats-py, which had been told that they wait."""
    async with opened(server.url) as broker:
        subscription = await broker.subscribe("a", Inbox())
        server.commands.clear()
        subscription.forget()
        broker.connection.client.write(b"PUB b 0\r\n\r\n")
        await broker.flush()
        assert [command for _, command in server.commands] == ["UNSUB 1", "PUB b", "PING"]


async def test_what_is_not_or_no_longer_connected_cannot_be_written_to(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    """From the moment at which it is closed, and not only when nats-py has noticed."""
    assert not MendedClient(wants_tls=False, on_ended=lambda _error: None).is_writable
    async with opened(server.url) as broker:
        client = broker.connection.client
        before = (client.is_connected, client.is_writable)
        client.abort()
        assert [before, (client.is_connected, client.is_writable)] == [(True, True), (True, False)]
        broker.publish(Message(subject="a", body=b"held"))
        await trio.sleep(0.1)
        assert broker.statistics().unpublished_bytes == 5
        await broker.flush()
    assert server.bodies == [b"held"]


async def test_a_drain_that_waits_to_be_written_ends_when_the_line_breaks(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        subscription = await broker.subscribe("a", Inbox())
        server.hang()
        broker.publish(Message(subject="a", body=bytes(2 * WINDOW_BYTES)))
        await trio.sleep(0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(subscription.drain)
            await trio.sleep(0.9)
            server.kill()
        assert trio.current_time() == pytest.approx(1.0)


async def test_a_drain_under_way_ends_with_the_connection(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        subscription = await broker.subscribe("a", Inbox())
        server.hang()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(subscription.drain)
            await trio.sleep(1)
            server.say("-ERR 'User Authentication Expired'")
        assert trio.current_time() == pytest.approx(1.0)


async def test_a_subscription_that_is_cancelled_while_it_is_sent_leaves_nothing(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        server.hang()
        # It is more than nats-py may hold of commands, and the line is full.
        broker.publish(Message(subject="a", body=bytes(2 * WINDOW_BYTES)))
        await trio.sleep(0.1)
        with trio.move_on_after(1) as scope:
            await broker.subscribe("b" * 300_000, Inbox())
        assert scope.cancelled_caught
        server.go_on()
        await broker.flush()
        assert not server.lines[0].subscriptions
        server.kill()
        server.start()
        await trio.sleep(2 * WAIT_S)
        assert broker.statistics().reconnects == 1
        assert not server.lines[0].subscriptions


async def test_a_socket_that_was_not_greeted_is_closed(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url):
        server.kill()
        server.is_silent = True
        server.start()
        await trio.sleep(20 * WAIT_S)
        assert len(server.attempts_at) > 5
        assert len(server.lines) <= 1


async def test_a_fault_while_reconnecting_is_told(
    server: VirtualServer, autojump_clock: MockClock
) -> None:
    async with opened(server.url) as broker:
        server.kill()
        server.is_silent = True
        server.start()
        await trio.sleep(1.5 * WAIT_S)
        server.say('INFO {"connect_urls":5}')
        with trio.fail_after(WAIT_S):
            assert "not iterable" in await broker.wait_lost()


# --- on real sockets --------------------------------------------------------------------------


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def hangs_up(stream: trio.SocketStream) -> None:
    await stream.send_all(b'INFO {"headers":true,"max_payload":1024}\r\n')
    await stream.receive_some()
    await stream.aclose()


async def babbles(stream: trio.SocketStream) -> None:
    await stream.send_all(b"x" * 100_000)
    await trio.sleep_forever()


async def greets_wrongly(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("handler", [silent, hangs_up, babbles, greets_wrongly])
async def test_what_is_not_a_nats_server_is_given_up_in_time(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with fake_server(handler) as where:
            with pytest.raises(BrokerUnavailable):
                async with quick(f"nats://{where}", connect_timeout_s=0.3):
                    raise AssertionError


@pytest.mark.nats
async def test_a_server_that_hangs_for_long_is_given_up(private_server: NatsServer) -> None:
    """Also with full buffers, which nats-py would first wait to have read."""
    inbox = Inbox()
    async with quick(private_server.url, ping_interval_s=0.05, connect_timeout_s=0.2) as broker:
        await broker.subscribe("a", inbox)
        outlet = broker.open_outlet("b", headers={})
        private_server.send(signal.SIGSTOP)
        for _ in range(40):
            outlet.publish(bytes(500_000), {})
        await wait_until(lambda: not broker.statistics().connected)
        outlet.discard()
        private_server.send(signal.SIGCONT)
        broker.publish(Message(subject="a"))
        await inbox.wait()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(b"Authorization Violation", ConfigError), (b"Invalid Something", BrokerUnavailable)],
)
async def test_an_error_right_after_the_greeting_ends_it_at_once(
    error: bytes, expected: type[Exception]
) -> None:
    async def fails(stream: trio.SocketStream) -> None:
        await stream.send_all(b'INFO {"headers":true,"max_payload":1024}\r\n')
        await stream.receive_some()
        await stream.send_all(b"PONG\r\n-ERR '" + error + b"'\r\n")
        await trio.sleep_forever()

    with trio.fail_after(PATIENCE_S):
        async with fake_server(fails) as where:
            try:
                async with quick(f"nats://{where}", connect_timeout_s=60) as broker:
                    # Which side of the first connection it falls on is a matter of timing.
                    await broker.wait_lost()
            except expected:
                pass


async def test_a_ping_is_written_behind_what_it_is_to_confirm() -> None:
    """Otherwise its answer says nothing: `subscribe` would return before the server knows."""
    written = bytearray()

    async def records(stream: trio.SocketStream) -> None:
        await stream.send_all(b'INFO {"headers":true,"max_payload":1024}\r\n')
        async for chunk in stream:
            written.extend(chunk)
            await stream.send_all(b"PONG\r\n" * chunk.count(b"PING"))

    async with fake_server(records) as where:
        async with quick(f"nats://{where}") as broker:
            with trio.fail_after(PATIENCE_S):
                subscription = await broker.subscribe("a", Inbox())
                broker.publish(Message(subject="b"))
                await broker.flush()
                await subscription.drain()
    verbs = [line.split()[0] for line in bytes(written).split(b"\r\n") if line.strip()]
    assert verbs[:8] == [b"CONNECT", b"PING", b"SUB", b"PING", b"PUB", b"PING", b"UNSUB", b"PING"]


HOSTILE = {
    "a vertical tab in the reply": b"PUB {} re\x0bply 2\r\nhi\r\n",
    "a vertical tab and a number": b"PUB {} re\x0b5 2\r\nhi\r\n",
    "a form feed in the subject": b"PUB {}.\x0c5 2\r\nhi\r\n",
    "not UTF-8": b"PUB {} \xff\xfe 2\r\nhi\r\n",
    "a subject that is not UTF-8": b"PUB {}.\xff 2\r\nhi\r\n",
    "no header block": b"HPUB {} r 3 5\r\nabchi\r\n",
    "half a header block": b"HPUB {} r 8 10\r\nNATS/1.0hi\r\n",
    "a status that is not one": b"HPUB {} r 15 17\r\nNATS/1.0 \xff\xff\r\n\r\nhi\r\n",
    "a description that is not UTF-8": b"HPUB {} r 19 21\r\nNATS/1.0 503 \xff\xff\r\n\r\nhi\r\n",
    "a header that is none": b"HPUB {} r 17 19\r\nNATS/1.0\r\n\xff\xff\xff\r\n\r\nhi\r\n",
    "protocol in the body": b"PUB {} r 23\r\n-ERR 'Stale Connection'\r\n",
    "a long reply": b"PUB {} " + b"r" * 4000 + b" 2\r\nhi\r\n",
}


@pytest.mark.nats
@pytest.mark.parametrize("bytes_sent", HOSTILE.values(), ids=HOSTILE.keys())
async def test_nothing_a_client_sends_breaks_the_connection(
    nats_url: str, bytes_sent: bytes
) -> None:
    """A server passes all of these on; each of the first ones ends nats-py's read loop."""
    subject, inbox = fresh_subject(), Inbox()
    async with quick(nats_url) as broker:
        await broker.subscribe(subject, inbox)
        await broker.subscribe(f"{subject}.>", inbox)
        port = int(nats_url.rpartition(":")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            head = b'CONNECT {"headers":true,"no_responders":true,"verbose":false}\r\n'
            name = subject.encode()
            await client.send_all(head + bytes_sent.replace(b"{}", name, 1) + b"PING\r\n")
            with trio.fail_after(PATIENCE_S):
                answer = b""
                while b"PONG" not in answer:
                    answer += await client.receive_some()
            assert b"-ERR" not in answer
        broker.publish(Message(subject=subject, body=b"and on"))
        with trio.fail_after(PATIENCE_S):
            while b"and on" not in inbox.bodies:
                await inbox.wait(len(inbox.messages) + 1)
        assert broker.statistics().reconnects == 0


@pytest.mark.nats
async def test_a_large_message_in_many_pieces_arrives(nats_url: str) -> None:
    subject, inbox = fresh_subject(), Inbox()
    body = b"\r\nMSG a 1 5\r\n" * 40_000
    async with quick(nats_url) as broker, quick(nats_url) as sender:
        await broker.subscribe(subject, inbox)
        sender.publish(Message(subject=subject, body=body, headers={"A": "b"}))
        sender.publish(Message(subject=subject, body=body))
        await inbox.wait(2)
    assert inbox.bodies == [body, body]
    assert inbox.messages[0].headers == {"A": "b"}
