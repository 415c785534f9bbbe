"""Who gets in to a NATS server, what a refusal is called, and what is sent to whom."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from pathlib import Path

import nkeys
import pytest
import trio
from support.broker_conformance import PATIENCE_S, Inbox
from support.nats_fixtures import (
    nats_url_fixture,  # noqa: F401
    private_server_fixture,  # noqa: F401
    running_server,
)
from support.nats_rig import SECRET, fake_server, log_fixture, quick, wait_until, works  # noqa: F401

from trio_worker.errors import ConfigError
from trio_worker.nats.login import Login
from trio_worker.ports import Message

pytestmark = pytest.mark.nats


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


async def test_credentials_that_are_taken_away_may_come_back() -> None:
    with running_server(config=USER) as server:
        async with quick(server.url, login=Login(user="ann", password=SECRET)) as broker:
            (server.folder / "nats.conf").write_text(USER.replace("ann", "ben"))
            server.send(signal.SIGHUP)
            await wait_until(lambda: not broker.statistics().connected)
            (server.folder / "nats.conf").write_text(USER)
            server.send(signal.SIGHUP)
            assert await works(broker)


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


async def test_a_server_that_hangs_behind_tls_holds_back_what_it_does_not_take(
    certificates: Certificates,
) -> None:
    inbox = Inbox()
    with running_server(config=certificates.config()) as server:
        async with quick(server.url, login=Login(ca_file=certificates.file("ca.pem"))) as broker:
            await broker.subscribe("a", inbox)
            server.send(signal.SIGSTOP)
            for number in range(40):
                broker.publish(Message(subject="a", body=b"%-500000d" % number))
            with trio.move_on_after(0.1):
                await broker.flush()
            assert broker.statistics().unpublished_bytes > 10_000_000
            server.send(signal.SIGCONT)
            await inbox.wait(40)
    assert [int(body) for body in inbox.bodies] == list(range(40))


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
