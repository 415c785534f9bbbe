"""The address of a NATS server: taken apart once, and shown without its credentials."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from trio_worker.errors import ConfigError

DEFAULT_PORT = 4222


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsAddress:
    """Where a server is. Neither `repr` nor `bare` shows the credentials."""

    scheme: str
    host: str
    port: int
    user: str | None = field(default=None, repr=False)
    """A user's name, or a token where there is no password."""
    password: str | None = field(default=None, repr=False)

    @property
    def bare(self) -> str:
        """The URL without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_nats_url(url: str) -> NatsAddress:
    """Take `url` apart; the port may be left out. Raises `ConfigError` naming `nats.url`.

    What is wrong is said without repeating the URL: there may be a password in it.
    """
    expected = "expected something like nats://127.0.0.1:4222"
    if "://" not in url:
        raise ConfigError(f"nats.url: it does not begin with nats:// or tls://; {expected}")
    try:
        parts = urlsplit(url)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        # `from None`: the cause quotes the URL.
        raise ConfigError(f"nats.url: it cannot be read as an address; {expected}") from None
    if parts.scheme not in {"nats", "tls"}:
        raise ConfigError(f"nats.url: only nats:// and tls:// are spoken here; {expected}")
    if not parts.hostname or port == 0:
        raise ConfigError(f"nats.url: it names no host or no port; {expected}")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ConfigError(f"nats.url: nothing may follow the port; {expected}")
    return NatsAddress(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )
