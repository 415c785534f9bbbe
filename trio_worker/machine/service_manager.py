"""Telling systemd how things are: datagrams to the socket that it names, as in sd_notify(3).

Rules:

1. Nothing here waits or raises: a notice that the socket does not take at once is dropped.
2. The variables that name the socket and the watchdog are taken out of the environment, so that
   no child process inherits them and speaks for the worker.
3. Where they are absent, as under launchd or in a terminal, nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from loguru import logger

from trio_worker.ports import Notice

STATUS_BYTES_MAX = 1024
"""systemd reads at most 4096 bytes of one datagram."""


class NotifySocket:
    """The `ServiceManager` of a process that systemd, or something like it, has started."""

    def __init__(
        self, address: str | None = None, *, sock: socket.socket | None, watchdog_s: float | None
    ) -> None:
        self._address = address
        self._socket = sock
        self._watchdog_s = watchdog_s
        self._is_lossy = False

    @property
    def watchdog_s(self) -> float | None:
        return self._watchdog_s

    def notify(self, notice: Notice) -> None:
        if lines := _words(notice):
            self._send("\n".join(lines).encode())

    def _send(self, datagram: bytes) -> None:
        if self._socket is None or self._address is None:
            return
        try:
            # Not connected: the manager may have replaced the socket since the last notice.
            self._socket.sendto(datagram, self._address)
        except OSError as error:
            if not self._is_lossy:
                logger.warning("The service manager does not take notices: {}", error)
            self._is_lossy = True
        else:
            self._is_lossy = False


@contextmanager
def open_service_manager(environ: MutableMapping[str, str]) -> Iterator[NotifySocket]:
    """The service manager that `environ` names, if any; takes its variables out of `environ`."""
    address = environ.pop("NOTIFY_SOCKET", None)
    watchdog_us = environ.pop("WATCHDOG_USEC", None)
    watched_pid = environ.pop("WATCHDOG_PID", None)
    if not address:
        yield NotifySocket(sock=None, watchdog_s=None)
        return
    if address[0] not in "/@":
        logger.warning("NOTIFY_SOCKET names an address of a kind that is not known here")
        yield NotifySocket(sock=None, watchdog_s=None)
        return
    if address[0] == "@":  # Linux's abstract names
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        watchdog_s = _watchdog_s(watchdog_us, watched_pid)
        yield NotifySocket(address, sock=sock, watchdog_s=watchdog_s)


def _watchdog_s(microseconds: str | None, watched_pid: str | None) -> float | None:
    """None as well if another process is the one that is watched."""
    if microseconds is None or not microseconds.isdecimal() or not int(microseconds):
        return None
    if watched_pid is not None and watched_pid != str(os.getpid()):
        return None
    return int(microseconds) / 1_000_000


def _words(notice: Notice) -> list[str]:
    """The notice, as sd_notify(3) has it."""
    lines = []
    if notice.ready:
        lines.append("READY=1")
    if notice.stopping:
        lines.append("STOPPING=1")
    if notice.alive:
        lines.append("WATCHDOG=1")
    if notice.extend_timeout_s is not None:
        lines.append(f"EXTEND_TIMEOUT_USEC={round(notice.extend_timeout_s * 1_000_000)}")
    if notice.status is not None:
        lines.append(f"STATUS={_one_line(notice.status)}")
    return lines


def _one_line(status: str) -> str:
    text = " ".join(status.split())
    return text.encode(errors="replace")[:STATUS_BYTES_MAX].decode(errors="ignore")
