"""Ports for servers of tests, of which no two tests get the same one."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _EACH = 20_000, 1_000
"""Below what systems give to outgoing connections, and a range for each process of a run."""

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_offsets = itertools.count(os.getpid())
"""Another run on this machine begins elsewhere."""


def free_port() -> int:
    """A port on which nobody listens; for a second one to get it takes a thousand more calls."""
    for offset in itertools.islice(_offsets, _EACH):
        port = _FIRST + _worker * _EACH + offset % _EACH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
