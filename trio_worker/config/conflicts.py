"""What is wrong with values that are each allowed: pairs, logins, addresses, reserved names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from msgspec import Struct

from trio_worker.config.hosts import is_loopback
from trio_worker.config.keys import shown
from trio_worker.config.sections import (
    Config,
    FleetConfig,
    GatewayConfig,
    JetStreamConfig,
    NatsConfig,
)
from trio_worker.errors import ConfigError
from trio_worker.nats.address import parse_nats_url

RESERVED_IDS = ("model", "cancel", "by")
"""Subjects of their own stand where a worker's id would."""

Conflict: TypeAlias = tuple[tuple[str, ...], str]
"""The keys concerned, the first of which shows the problem, and a sentence."""


def conflicts(config: Config) -> Iterator[Conflict]:
    """What is wrong with values that are each allowed."""
    yield from _pairs(config)
    yield from _dialect_conflicts(config)
    yield from _nats_conflicts(config.nats)
    yield from _gateway_conflicts(config.gateway)
    yield from _fleet_conflicts(config.fleet)
    if config.worker.id in RESERVED_IDS:
        yield (
            ("worker.id",),
            f"{shown(config.worker.id)} is a subject of its own; expected another name",
        )


def _pairs(config: Config) -> Iterator[Conflict]:
    """Keys whose value may not be above that of another one."""
    for low, high in (
        ("continuous_batching.min_batch_size", "continuous_batching.max_batch_size"),
        ("engine.token_gap_target_ms", "continuous_batching.turn_timeout_ms"),
        ("simulated.turn_ms", "continuous_batching.turn_timeout_ms"),
        ("resource_limits.max_memory_mb", "resource_limits.critical_memory_mb"),
        ("requests.default_max_tokens", "requests.max_tokens_limit"),
        ("requests.default_timeout_ms", "requests.timeout_limit_ms"),
    ):
        lower, upper = _value_at(config.worker, low), _value_at(config.worker, high)
        if lower > upper:
            yield (
                (f"worker.{low}", f"worker.{high}"),
                f"{shown(lower)} is above cluster.worker.{high}, which is {shown(upper)}",
            )


def _dialect_conflicts(config: Config) -> Iterator[Conflict]:
    if config.gateway.port is not None and "native" not in config.nats.dialects:
        yield (
            ("gateway.port", "nats.dialects"),
            "a gateway asks in the native dialect; expected null, or native among the dialects",
        )


def _value_at(config: Struct, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _nats_conflicts(nats: NatsConfig) -> Iterator[Conflict]:
    yield from _address_conflicts(nats)
    yield from _login_conflicts(nats)
    yield from _reply_conflicts(nats.reply_prefixes)
    if nats.tls is not None and nats.tls.cert_file is not None and nats.tls.key_file is None:
        yield ("nats.tls.cert_file", "nats.tls.key_file"), "needs cluster.nats.tls.key_file, too"
    if nats.tls is not None and nats.tls.key_file is not None and nats.tls.cert_file is None:
        yield ("nats.tls.key_file", "nats.tls.cert_file"), "needs cluster.nats.tls.cert_file, too"
    yield from _jetstream_conflicts(nats.jetstream)


def _jetstream_conflicts(jetstream: JetStreamConfig) -> Iterator[Conflict]:
    names = ("stream", "results", "dead")
    for number, name in enumerate(names):
        for other in names[:number]:
            if getattr(jetstream, name) == getattr(jetstream, other):
                what = f"{shown(getattr(jetstream, name))} is cluster.nats.jetstream.{other}, too"
                keys = (f"nats.jetstream.{name}", f"nats.jetstream.{other}")
                yield keys, f"{what}; expected a stream of its own"


def _gateway_conflicts(gateway: GatewayConfig) -> Iterator[Conflict]:
    if gateway.keys_file is None and not is_loopback(gateway.host):
        reach = f"{shown(gateway.host)} can be reached from other machines by everybody"
        expected = "such as 127.0.0.1, or a file with keys in cluster.gateway.keys_file"
        yield (
            ("gateway.host", "gateway.keys_file"),
            f"{reach}; expected an address of this machine alone, {expected}",
        )


def _fleet_conflicts(fleet: FleetConfig) -> Iterator[Conflict]:
    if fleet.forget_after_ms < 2 * fleet.beat_interval_ms:
        twice = f"twice cluster.fleet.beat_interval_ms, which is {shown(fleet.beat_interval_ms)}"
        yield (
            ("fleet.forget_after_ms", "fleet.beat_interval_ms"),
            f"{shown(fleet.forget_after_ms)} is less than {twice}",
        )


def _address_conflicts(nats: NatsConfig) -> Iterator[Conflict]:
    if not nats.url.isprintable() or set(nats.url) & set(" ,"):
        yield ("nats.url",), "it holds a blank or a comma; expected the address of one server"
        return
    try:
        address = parse_nats_url(nats.url)
    except ConfigError as error:
        yield ("nats.url",), str(error).removeprefix("nats.url: ")
        return
    if nats.embedded == "always" and not address.is_loopback:
        yield (
            ("nats.embedded", "nats.url"),
            "always needs a `url` on this machine, such as nats://127.0.0.1:4222",
        )


def _reply_conflicts(prefixes: tuple[str, ...]) -> Iterator[Conflict]:
    for prefix in prefixes:
        for own in ("inference", "worker.", "$"):
            if prefix.startswith(own) or own.startswith(prefix):
                allowed = f"{shown(prefix)} allows replies to subjects that begin with {own}"
                yield ("nats.reply_prefixes",), f"{allowed}; expected the beginning of inboxes"


def _login_conflicts(nats: NatsConfig) -> Iterator[Conflict]:
    passwords = [name for name in ("password", "password_file") if getattr(nats, name) is not None]
    if nats.user is not None and not passwords:
        yield (
            ("nats.user", "nats.password", "nats.password_file"),
            "needs cluster.nats.password or cluster.nats.password_file, too",
        )
    if passwords and nats.user is None:
        yield (f"nats.{passwords[0]}", "nats.user"), "needs cluster.nats.user, too"
    for name in ("password", "token"):
        if getattr(nats, name) is not None and getattr(nats, f"{name}_file") is not None:
            yield (
                (f"nats.{name}_file", f"nats.{name}"),
                f"cluster.nats.{name} is given, too; expected one of them",
            )
    logins = (("user",), ("token", "token_file"), ("credentials_file",), ("nkey_seed_file",))
    given = [
        f"nats.{names[0]}"
        for kind in logins
        if (names := [name for name in kind if getattr(nats, name) is not None])
    ]
    if "@" in nats.url:
        given.insert(0, "nats.url")
    if len(given) > 1:
        others = ", ".join(f"cluster.{path}" for path in given[1:])
        yield tuple(given), f"is a login, and so is {others}; expected one kind of login"
