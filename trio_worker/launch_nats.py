"""From a configuration to a connection with NATS."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from trio_worker.config import NatsConfig
from trio_worker.nats.broker import SUBSCRIPTION_MESSAGES, NatsBroker, open_nats_broker
from trio_worker.nats.login import Login


def connect(
    nats: NatsConfig,
    *,
    name: str,
    inbox_prefix: str = "_INBOX",
    subscription_limit: int = SUBSCRIPTION_MESSAGES,
) -> AbstractAsyncContextManager[NatsBroker, bool | None]:
    """A connection that is known to the server as `name`. Raises as `open_nats_broker` does."""
    return open_nats_broker(
        nats.url,
        name=name,
        login=login_of(nats),
        connect_timeout_s=nats.connect_timeout_ms / 1000,
        inbox_prefix=inbox_prefix,
        subscription_limit=subscription_limit,
    )


def login_of(nats: NatsConfig) -> Login:
    """What identifies this worker, or a caller, to the server."""
    tls = nats.tls
    return Login(
        user=nats.user,
        password=nats.password,
        token=nats.token,
        credentials_file=nats.credentials_file,
        nkey_seed_file=nats.nkey_seed_file,
        ca_file=tls.ca_file if tls else None,
        cert_file=tls.cert_file if tls else None,
        key_file=tls.key_file if tls else None,
    )
