"""This machine, as others on the network may know it."""

from __future__ import annotations

import socket

import psutil
import trio

from trio_worker.ports import Host

_LOOK_UP_S = 2.0
_LOOPBACK = "127.0.0.1"


async def find_host(peer: str, port: int) -> Host:
    """This machine's name, and the address by which it reaches `peer`; loopback if it does not.

    Returns within some seconds, whatever becomes of the names. Nothing is sent to `peer`.
    """
    address = _LOOPBACK
    with trio.move_on_after(_LOOK_UP_S):
        address = await _address_towards(peer, port)
    psutil.cpu_percent()  # the first reading says nothing: each is about the time since the last
    return Host(hostname=socket.gethostname(), address=address, cpu_percent=psutil.cpu_percent)


async def _address_towards(peer: str, port: int) -> str:
    try:
        found = await trio.socket.getaddrinfo(peer, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, sockaddr = found[0]
        with trio.socket.socket(family, kind, protocol) as probe:
            await probe.connect(sockaddr)
            return str(probe.getsockname()[0])
    except OSError:
        return _LOOPBACK
