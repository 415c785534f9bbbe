"""Addresses of NATS servers: every part, and none of it in a message."""

from __future__ import annotations

import pytest

from trio_worker.errors import ConfigError
from trio_worker.nats.address import NatsAddress, parse_nats_url


@pytest.mark.parametrize(
    ("url", "address", "bare", "is_loopback"),
    [
        (
            "nats://localhost",
            NatsAddress(scheme="nats", host="localhost", port=4222),
            "nats://localhost:4222",
            True,
        ),
        (
            "tls://me:p%40ss@Example.org:7/",
            NatsAddress(scheme="tls", host="example.org", port=7, user="me", password="p@ss"),
            "tls://example.org:7",
            False,
        ),
        (
            "nats://t%2Fken@127.0.0.2:4222",
            NatsAddress(scheme="nats", host="127.0.0.2", port=4222, user="t/ken"),
            "nats://127.0.0.2:4222",
            True,
        ),
        (
            "nats://[::1]:4333",
            NatsAddress(scheme="nats", host="::1", port=4333),
            "nats://[::1]:4333",
            True,
        ),
        (
            "nats://10.0.0.1",
            NatsAddress(scheme="nats", host="10.0.0.1", port=4222),
            "nats://10.0.0.1:4222",
            False,
        ),
        (
            "nats://:pw@host",
            NatsAddress(scheme="nats", host="host", port=4222, password="pw"),
            "nats://host:4222",
            False,
        ),
    ],
)
def test_an_address_in_its_parts(
    url: str, address: NatsAddress, bare: str, *, is_loopback: bool
) -> None:
    assert parse_nats_url(url) == address
    assert (address.bare, address.is_loopback) == (bare, is_loopback)


def test_the_credentials_are_not_shown() -> None:
    address = parse_nats_url("nats://somebody:secret@host")
    assert repr(address) == "NatsAddress(scheme='nats', host='host', port=4222)"


EXPECTED = "; expected something like nats://127.0.0.1:4222"


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "it does not begin with nats:// or tls://"),
        ("host:4222", "it does not begin with nats:// or tls://"),
        ("http://host", "only nats:// and tls:// are spoken here"),
        ("nats://host:port", "it cannot be read as an address"),
        ("nats://host:70000", "it cannot be read as an address"),
        ("nats://[::1", "it cannot be read as an address"),
        ("nats://", "it names no host or no port"),
        ("nats://:4222", "it names no host or no port"),
        ("nats://host:0", "it names no host or no port"),
        ("nats://host/path", "nothing may follow the port"),
        ("nats://host?a=b", "nothing may follow the port"),
        ("nats://host#a", "nothing may follow the port"),
    ],
)
def test_what_is_no_address_is_told_without_repeating_it(url: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_nats_url(url)
    assert str(caught.value) == f"nats.url: {fault}{EXPECTED}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
