"""The NATS broker against real servers: who gets in, and what it survives."""

# ruff: noqa: ASYNC240 - these files are tiny

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import nkeys
import psutil
import pytest
import trio
import trio_asyncio
from loguru import logger
from support.broker_conformance import PATIENCE_S, Inbox
from support.nats_fixtures import (
    NatsServer,
    fresh_subject,
    nats_url_fixture,  # noqa: F401
    private_server_fixture,  # noqa: F401
    running_server,
)

from trio_worker.errors import BrokerUnavailable, ConfigError, MessageTooLarge
from trio_worker.nats.broker import NatsBroker, open_nats_broker
from trio_worker.nats.login import Login
from trio_worker.ports import Message

pytestmark = pytest.mark.nats

SECRET = "s3cret-horse"


@pytest.fixture(name="log")
def log_fixture() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lambda line: lines.append(str(line)), level=0, format="{level} {message}")
    yield lines
    logger.remove(number)


async def wait_until(condition: Callable[[], bool]) -> None:
    """For what the server does in its own time, and the port has no event for."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def works(broker: NatsBroker) -> bool:
    subject, inbox = fresh_subject(), Inbox()
    subscription = await broker.subscribe(subject, inbox)
    broker.publish(Message(subject=subject))
    await inbox.wait()
    await subscription.drain()
    return True


quick = partial(open_nats_broker, name="test", reconnect_wait_s=0.05)


# --- who gets in --------------------------------------------------------------------------


def new_key(prefix: int) -> tuple[str, nkeys.KeyPair]:
    """A seed and its key pair."""
    seed = nkeys.encode_seed(os.urandom(32), prefix)
    return seed.decode(), nkeys.from_seed(bytearray(seed))


def jwt(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, claims: dict[str, object]) -> str:
    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    body = {
        "jti": "test",
        "iat": 1700000000,
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": "test",
        "nats": {"version": 2} | claims,
    }
    text = ".".join(
        part(json.dumps(value).encode()) for value in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)
    )
    return f"{text}.{part(issuer.sign(text.encode()))}"


def decentralised(folder: Path) -> tuple[str, str]:
    """A configuration with an operator and an account, and a user's credentials file for it."""
    _, operator = new_key(nkeys.PREFIX_BYTE_OPERATOR)
    _, account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
    seed, user = new_key(nkeys.PREFIX_BYTE_USER)
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    account_jwt = jwt(
        operator, account, {"type": "account", "limits": unlimited | {"wildcards": True}}
    )
    user_jwt = jwt(
        account,
        user,
        {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1},
    )
    file = folder / "user.creds"
    file.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    config = (
        f"operator: {jwt(operator, operator, {'type': 'operator'})}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {account.public_key.decode()}: {account_jwt} }}\n"
    )
    return config, str(file)


USER = f'authorization {{ user: ann, password: "{SECRET}" }}'
TOKEN = f'authorization {{ token: "{SECRET}" }}'


async def test_a_user_and_a_password_get_in() -> None:
    with running_server(config=USER) as server:
        async with quick(server.url, login=Login(user="ann", password=SECRET)) as broker:
            assert await works(broker)


async def test_a_token_gets_in() -> None:
    with running_server(config=TOKEN) as server:
        async with quick(server.url, login=Login(token=SECRET)) as broker:
            assert await works(broker)


@pytest.mark.parametrize("config", [USER, TOKEN])
async def test_credentials_in_the_url_get_in_and_are_not_shown(config: str, log: list[str]) -> None:
    who = f"ann:{SECRET.replace('-', '%2D')}" if config == USER else SECRET
    with running_server(config=config) as server:
        url = f"nats://{who}@127.0.0.1:{server.port}"
        async with quick(url) as broker:
            assert await works(broker)
            assert broker.statistics().url == server.url
    assert SECRET not in "".join(log)


async def test_an_nkey_gets_in(tmp_path: Path) -> None:
    seed, user = new_key(nkeys.PREFIX_BYTE_USER)
    file = tmp_path / "user.nk"
    file.write_text(f"# a comment\n{seed}\n")
    config = f"authorization {{ users: [ {{ nkey: {user.public_key.decode()} }} ] }}"
    with running_server(config=config) as server:
        async with quick(server.url, login=Login(nkey_seed_file=str(file))) as broker:
            assert await works(broker)


async def test_a_credentials_file_gets_in_and_is_read_again_at_each_connection(
    tmp_path: Path,
) -> None:
    config, file = decentralised(tmp_path)
    with running_server(config=config) as server:
        async with quick(server.url, login=Login(credentials_file=file)) as broker:
            assert await works(broker)
            text = Path(file).read_text()
            Path(file).write_text("in the middle of a change")
            server.end()
            server.start()
            await wait_until(lambda: not broker.statistics().connected)
            Path(file).write_text(text)
            assert await works(broker)


@pytest.mark.parametrize(
    ("config", "login", "key"),
    [
        (USER, Login(user="ann", password=f"not-{SECRET}"), "nats.user and nats.password"),
        (TOKEN, Login(token=f"not-{SECRET}"), "nats.token"),
        (USER, Login(), "set nats.user and nats.password"),
    ],
)
async def test_refused_credentials_end_it_at_once(
    config: str, login: Login, key: str, log: list[str]
) -> None:
    with running_server(config=config) as server, trio.fail_after(PATIENCE_S):
        with pytest.raises(ConfigError) as caught:
            async with quick(server.url, login=login, connect_timeout_s=60):
                raise AssertionError
    assert key in str(caught.value)
    everything = "".join((str(caught.value), repr(caught.value), repr(login), *log))
    assert SECRET not in everything


async def test_refused_credentials_in_the_url_are_called_that(log: list[str]) -> None:
    with running_server(config=USER) as server, trio.fail_after(PATIENCE_S):
        with pytest.raises(ConfigError, match=r"nats\.url \(the credentials") as caught:
            async with quick(f"nats://ann:{SECRET}x@127.0.0.1:{server.port}"):
                raise AssertionError
    assert SECRET not in "".join((repr(caught.value), *log))


async def test_a_refused_nkey_is_called_that(tmp_path: Path) -> None:
    seed, _ = new_key(nkeys.PREFIX_BYTE_USER)
    _, other = new_key(nkeys.PREFIX_BYTE_USER)
    (tmp_path / "seed").write_text(seed)
    config = f"authorization {{ users: [ {{ nkey: {other.public_key.decode()} }} ] }}"
    with running_server(config=config) as server, trio.fail_after(PATIENCE_S):
        with pytest.raises(ConfigError, match=r"nats\.nkey_seed_file"):
            async with quick(server.url, login=Login(nkey_seed_file=str(tmp_path / "seed"))):
                raise AssertionError


@pytest.mark.parametrize(
    ("key", "content", "login"),
    [
        ("nats.credentials_file", None, "credentials_file"),
        ("nats.credentials_file", "nothing of the kind", "credentials_file"),
        ("nats.credentials_file", "-----BEGIN NATS USER JWT-----", "credentials_file"),
        ("nats.nkey_seed_file", None, "nkey_seed_file"),
        ("nats.nkey_seed_file", "", "nkey_seed_file"),
        ("nats.nkey_seed_file", "SUACLEARLYNOTASEED", "nkey_seed_file"),
        ("nats.nkey_seed_file", "ä", "nkey_seed_file"),
        ("nats.tls.ca_file", None, "ca_file"),
        ("nats.tls.ca_file", "of another kind", "ca_file"),
        ("nats.tls.cert_file", None, "cert_file"),
        ("nats.tls.cert_file", "of another kind", "cert_file"),
        ("nats.tls.cert_file", "", "key_file"),
    ],
)
async def test_a_bad_file_is_named_with_its_key(
    tmp_path: Path, key: str, content: str | None, login: str
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        async with quick("nats://127.0.0.1:1", login=Login(**{login: str(file)})):
            raise AssertionError
    assert key in str(caught.value)
    assert not content or content not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:4222",
        f"http://ann:{SECRET}@127.0.0.1",
        f"nats://ann:{SECRET}@127.0.0.1:port",
        f"nats://ann:{SECRET}@:4222",
        f"nats://ann:{SECRET}@127.0.0.1:4222/path",
        f"nats://ann:{SECRET}@[::1",
        f"nats://ann:{SECRET}@127.0.0.1:0",
    ],
)
async def test_a_bad_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"nats\.url") as caught:
        async with quick(url):
            raise AssertionError
    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# --- TLS ----------------------------------------------------------------------------------


class Certificates:
    """An authority, and what it has signed: a server for 127.0.0.1, and a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._openssl("req -x509 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca")
        for name in ("server", "client"):
            self._openssl(f"req -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}")
            (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
            self._openssl(
                f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial"
                f" -out {name}.pem -days 2 -extfile san"
            )

    def _openssl(self, command: str) -> None:
        new_key = " -newkey ec -pkeyopt ec_paramgen_curve:P-256" if "req -" in command else ""
        if command.startswith("x509"):
            new_key = ""
        subprocess.run(
            ["openssl", *command.split(), *new_key.split()],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def config(self, *, verify: bool = False) -> str:
        return (
            f'tls {{ cert_file: "{self.file("server.pem")}", key_file: "{self.file("server.key")}",'
            f' ca_file: "{self.file("ca.pem")}", verify: {str(verify).lower()} }}'
        )


@pytest.fixture(name="certificates", scope="session")
def certificates_fixture(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_tls_with_an_own_authority(certificates: Certificates, scheme: str) -> None:
    with running_server(config=certificates.config()) as server:
        url = f"{scheme}://127.0.0.1:{server.port}"
        async with quick(url, login=Login(ca_file=certificates.file("ca.pem"))) as broker:
            assert await works(broker)
            server.end()
            server.start()
            assert await works(broker)


async def test_tls_with_certificates_on_both_sides(certificates: Certificates) -> None:
    login = Login(
        ca_file=certificates.file("ca.pem"),
        cert_file=certificates.file("client.pem"),
        key_file=certificates.file("client.key"),
    )
    with running_server(config=certificates.config(verify=True)) as server:
        async with quick(server.url, login=login) as broker:
            assert await works(broker)


async def test_an_unknown_authority_ends_it_at_once(certificates: Certificates) -> None:
    with running_server(config=certificates.config()) as server, trio.fail_after(PATIENCE_S):
        with pytest.raises(ConfigError, match=r"nats\.tls\.ca_file"):
            async with quick(server.url, connect_timeout_s=60):
                raise AssertionError


async def test_a_missing_client_certificate_ends_it_at_once(certificates: Certificates) -> None:
    login = Login(ca_file=certificates.file("ca.pem"))
    with running_server(config=certificates.config(verify=True)) as server:
        with trio.fail_after(PATIENCE_S), pytest.raises(ConfigError, match="cert_file"):
            async with quick(server.url, login=login, connect_timeout_s=60):
                raise AssertionError


@asynccontextmanager
async def fake_server(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
) -> AsyncIterator[str]:
    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await handler(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, serve, [listener]))
        yield f"127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_nothing_is_sent_to_a_server_without_the_tls_that_was_configured(
    certificates: Certificates, scheme: str
) -> None:
    """nats-py would go on in the clear, with the password."""
    got = bytearray()

    async def plain(stream: trio.SocketStream) -> None:
        await stream.send_all(b'INFO {"version":"2.12.0","headers":true,"max_payload":1024}\r\n')
        async for chunk in stream:
            got.extend(chunk)

    ca_file = certificates.file("ca.pem") if scheme == "nats" else None
    login = Login(user="ann", password=SECRET, ca_file=ca_file)
    with trio.fail_after(PATIENCE_S):
        async with fake_server(plain) as where:
            with pytest.raises(ConfigError, match="does not offer TLS"):
                async with quick(f"{scheme}://{where}", login=login):
                    raise AssertionError
    assert got == b""


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
        mine, gone = broker.open_outlet(), broker.open_outlet()
        for count in range(100):
            mine.publish(Message(subject="a", body=b"%d" % count))
            gone.publish(Message(subject="a", body=b"discarded"))
        assert mine.unpublished_bytes == 290
        gone.discard()
        assert broker.statistics().unpublished_bytes == 290
        mine.publish(Message(subject="nobody", reply="ctl.r"))
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
        outlet = broker.open_outlet()
        outlet.publish(Message(subject="a", body=bytes(2000)))
        outlet.publish(Message(subject="a", body=b"small"))
        (private_server.folder / "nats.conf").write_text("max_payload: 1000")
        private_server.start()
        await inbox.wait()
        assert broker.max_payload == 1000
        with pytest.raises(MessageTooLarge):
            outlet.publish(Message(subject="a", body=bytes(1001)))
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


async def test_a_server_that_hangs_for_long_is_given_up(private_server: NatsServer) -> None:
    """Also with full buffers, which nats-py would first wait to have read."""
    inbox = Inbox()
    async with quick(private_server.url, ping_interval_s=0.05, connect_timeout_s=0.2) as broker:
        await broker.subscribe("a", inbox)
        outlet = broker.open_outlet()
        private_server.send(signal.SIGSTOP)
        for _ in range(40):
            outlet.publish(Message(subject="b", body=bytes(500_000)))
        await wait_until(lambda: not broker.statistics().connected)
        outlet.discard()
        private_server.send(signal.SIGCONT)
        outlet.publish(Message(subject="a"))
        await inbox.wait()


async def test_after_a_hang_it_goes_on(private_server: NatsServer) -> None:
    inbox = Inbox()
    async with quick(private_server.url) as broker:
        await broker.subscribe("a", inbox)
        private_server.send(signal.SIGSTOP)
        outlet = broker.open_outlet()
        for number in range(40):
            outlet.publish(Message(subject="a", body=b"%d" % number + bytes(500_000)))
        with trio.move_on_after(0.1):
            await broker.flush()
        # What is past the outbox is bounded by the buffers, and the rest can be discarded.
        assert outlet.unpublished_bytes > 10_000_000
        outlet.discard()
        private_server.send(signal.SIGCONT)
        outlet.publish(Message(subject="a", body=b"end"))
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


async def test_what_nats_py_leaves_behind_in_asyncio_does_not_end_the_worker(
    nats_url: str,
) -> None:
    """Trio-asyncio's own handler raises such exceptions into the nursery of the loop."""
    async with quick(nats_url) as broker:
        trio_asyncio.current_loop.get().call_exception_handler(
            {"message": "never retrieved", "exception": ConnectionResetError()}
        )
        assert await works(broker)


async def test_credentials_that_are_taken_away_may_come_back() -> None:
    with running_server(config=USER) as server:
        async with quick(server.url, login=Login(user="ann", password=SECRET)) as broker:
            (server.folder / "nats.conf").write_text(USER.replace("ann", "ben"))
            server.send(signal.SIGHUP)
            await wait_until(lambda: not broker.statistics().connected)
            (server.folder / "nats.conf").write_text(USER)
            server.send(signal.SIGHUP)
            assert await works(broker)


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
