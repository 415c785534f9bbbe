"""Who we are to the server: a login, what it comes to in nats-py's options, what a refusal means.

No message, log line or `repr` contains a secret.
"""

from __future__ import annotations

import base64
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nats import errors as nats_errors

from trio_worker.errors import ConfigError
from trio_worker.nats.address import NatsAddress
from trio_worker.nats.mended_client import PlainServer

_REFUSED = re.compile(r"authorization violation|authentication (?!timeout)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Who we are to the server, and how we know it. Every value is also a config key.

    The credentials file is read again at each connection, so it may be replaced meanwhile; the
    other files are read once.
    """

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    credentials_file: str | None = None
    nkey_seed_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class Identity:
    """What a login comes to in nats-py's options, and what to say when it is refused."""

    def __init__(self, address: NatsAddress, login: Login) -> None:
        """Read every file once, so that what is wrong with them is said before connecting."""
        self._login = login
        self._user, self._password, self._token = login.user, login.password, login.token
        self._from_url = address.user is not None and login.user is None and login.token is None
        if self._from_url and address.password is None:
            self._token = address.user
        elif self._from_url:
            self._user, self._password = address.user, address.password
        if (self._user is None) != (self._password is None):
            raise ConfigError("nats.user and nats.password: one of them is missing")
        self._seed: str | None = None
        if login.credentials_file is not None:
            _read_credentials(login.credentials_file)
        elif login.nkey_seed_file is not None:
            self._seed = _read_seed(login.nkey_seed_file)
        self.wants_tls = address.scheme == "tls" or any(
            (login.ca_file, login.cert_file, login.key_file)
        )
        self._tls = _tls_context(login) if self.wants_tls else None

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"tls": self._tls} if self._tls is not None else {}
        if self._user is not None:
            options |= {"user": self._user, "password": self._password}
        if self._token is not None:
            options["token"] = self._token
        if (file := self._login.credentials_file) is not None:
            # nats-py's own reader loops for ever over a file without the marks.
            options |= {
                "user_jwt_cb": lambda: bytearray(_reread_credentials(file)[0].encode()),
                "signature_cb": lambda nonce: _sign(_reread_credentials(file)[1], nonce),
            }
        elif self._seed is not None:
            options["nkeys_seed_str"] = self._seed
        return options

    def refusal(self, exc: Exception) -> ConfigError | None:
        """The end of all attempts if `exc` will not go away by itself."""
        if isinstance(exc, PlainServer):
            return ConfigError(
                "nats.url and nats.tls: the server does not offer TLS, so nothing was sent to it."
                " Configure TLS there, or use nats:// without nats.tls."
            )
        if isinstance(exc, ssl.SSLCertVerificationError):
            return ConfigError(
                f"nats.tls.ca_file: the server's certificate was not accepted:"
                f" {exc.verify_message or 'verification failed'}."
                " Name the file with the certificate of its authority."
            )
        if isinstance(exc, ssl.SSLError) and not isinstance(
            exc, ssl.SSLEOFError | ssl.SSLZeroReturnError
        ):
            return ConfigError(
                f"nats.tls.cert_file: TLS with the server failed ({exc.reason or 'no reason'})."
                " It may ask for a certificate of ours: nats.tls.cert_file, nats.tls.key_file."
            )
        if isinstance(exc, nats_errors.AuthorizationError) or (
            isinstance(exc, nats_errors.Error) and _REFUSED.search(str(exc))
        ):
            return ConfigError(f"{self._keys()}: the NATS server refused us.{self._advice()}")
        return None

    def _keys(self) -> str:
        if self._login.credentials_file is not None:
            return "nats.credentials_file"
        if self._login.nkey_seed_file is not None:
            return "nats.nkey_seed_file"
        if self._from_url:
            return "nats.url (the credentials in it)"
        if self._user is not None:
            return "nats.user and nats.password"
        if self._token is not None:
            return "nats.token"
        return "nats.user"

    def _advice(self) -> str:
        if self._keys() != "nats.user":
            return ""
        return (
            " It asks for credentials: set nats.user and nats.password, nats.token,"
            " nats.credentials_file or nats.nkey_seed_file."
        )


def _tls_context(login: Login) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=login.ca_file)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"nats.tls.ca_file: {login.ca_file!r} cannot be used: {exc}") from exc
    if login.cert_file is None:
        if login.key_file is not None:
            raise ConfigError("nats.tls.cert_file: nats.tls.key_file is of no use without it")
        return context
    try:
        # A password is never asked for on the terminal of a worker.
        context.load_cert_chain(login.cert_file, login.key_file, password=lambda: b"")
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"nats.tls.cert_file, nats.tls.key_file: {login.cert_file!r} and"
            f" {login.key_file!r} cannot be used: {exc}"
        ) from exc
    return context


def _read_credentials(file: str) -> tuple[str, str]:
    """The user's JWT and the seed in a credentials file."""
    lines = _read(file, "nats.credentials_file").splitlines()
    found = {}
    for part in ("NATS USER JWT", "USER NKEY SEED"):
        starts = [n for n, line in enumerate(lines) if f"BEGIN {part}" in line]
        value = lines[starts[0] + 1].strip() if starts and starts[0] + 1 < len(lines) else ""
        if not value:
            raise ConfigError(f"nats.credentials_file: {file!r} has no section {part!r}")
        found[part] = value
    _check_seed(found["USER NKEY SEED"], file, "nats.credentials_file")
    return found["NATS USER JWT"], found["USER NKEY SEED"]


def _read_seed(file: str) -> str:
    lines = [
        line.strip()
        for line in _read(file, "nats.nkey_seed_file").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    seed = lines[0] if lines else ""
    _check_seed(seed, file, "nats.nkey_seed_file")
    return seed


def _read(file: str, key: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigError(f"{key}: {file!r} cannot be read: {reason}") from exc


def _check_seed(seed: str, file: str, key: str) -> None:
    import nkeys  # noqa: PLC0415 - 25 ms that most workers need not spend

    try:
        nkeys.from_seed(bytearray(seed.encode())).wipe()
    except Exception:  # noqa: BLE001 - of four kinds from three packages
        # `from None`: the cause may quote the seed.
        raise ConfigError(f"{key}: the seed in {file!r} is not one") from None


def _sign(seed: str, nonce: str) -> bytes:
    import nkeys  # noqa: PLC0415 - as above

    return base64.b64encode(nkeys.from_seed(bytearray(seed.encode())).sign(nonce.encode()))


def _reread_credentials(file: str) -> tuple[str, str]:
    try:
        return _read_credentials(file)
    except ConfigError as exc:
        # An error after which nats-py tries again: the file may be in the middle of a change.
        raise nats_errors.Error(str(exc)) from exc
