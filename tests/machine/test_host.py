"""This machine, as others on the network may know it."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import trio

from trio_worker.machine.host import find_host


async def test_a_machine_is_known_by_the_address_that_it_reaches_its_peer_from() -> None:
    host = await find_host("127.0.0.1", 4222)
    assert host.address == "127.0.0.1"
    assert host.hostname == socket.gethostname()
    assert host.cpu_percent() >= 0


async def test_who_cannot_reach_it_still_has_an_address(autojump_clock: trio.abc.Clock) -> None:
    class NoNames(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *_args: Any, **_options: Any) -> Any:
            raise socket.gaierror

        async def getnameinfo(self, *_args: Any, **_options: Any) -> Any:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(NoNames())
    assert ipaddress.ip_address((await find_host("nats.example", 4222)).address).is_loopback


async def test_a_name_that_nobody_answers_for_holds_nothing_up(
    autojump_clock: trio.abc.Clock,
) -> None:
    class Silence(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *_args: Any, **_options: Any) -> Any:
            await trio.sleep_forever()

        async def getnameinfo(self, *_args: Any, **_options: Any) -> Any:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Silence())
    with trio.fail_after(5):
        host = await find_host("nats.example", 4222)
    assert ipaddress.ip_address(host.address).is_loopback
