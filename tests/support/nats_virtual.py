"""A nats-server in the event loop, and the real NATS broker on it: for the mock clock.

The adapter and nats-py run unchanged over a transport without sockets, so that what depends on
time is exact and takes none. What the wire is really like, `test_connection.py` asks a real one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import trio
from nats.aio import client as nats_client
from nats.aio.transport import Transport

from trio_worker.nats.broker import open_nats_broker
from trio_worker.simulated.broker import subject_matches

WINDOW_BYTES = 64 * 1024
"""What a connection takes unread before its writer must wait."""


class VirtualServer:
    """Routes messages between its lines. Tests set what is wrong with it."""

    url = "nats://virtual:4222"

    def __init__(self) -> None:
        self.is_up = True
        self.is_black_hole = False
        """Connecting is neither taken nor refused until `refusal` is set."""
        self.refusal = asyncio.Event()
        self.on_refusal: Callable[[], object] = lambda: None
        """Called when an attempt has been refused and does not know it yet."""
        self.is_silent = False
        """Connections are taken and never greeted."""
        self.hangs_up_on = ""
        """The verb of a command; soon after it the line is broken."""
        self.max_payload = 1024 * 1024
        self.unpermitted: set[str] = set()
        """Subjects that can be neither published nor subscribed to."""
        self.attempts_at: list[float] = []
        self.commands: list[tuple[float, str]] = []
        """Verb and subject of everything that was read, and when."""
        self.bodies: list[bytes] = []
        """Of everything that was published, in order."""
        self.writes: list[int] = []
        """The bytes of every buffer that was written."""
        self.lines: list[Line] = []
        self._random = random.Random(5)
        """Chooses the member of a queue group."""
        self.is_hung = False

    def hang(self) -> None:
        """As a stopped process: the kernel takes connections and bytes, up to a window."""
        self.is_hung = True

    def go_on(self) -> None:
        self.is_hung = False
        for line in list(self.lines):
            line.read_backlog()

    def kill(self) -> None:
        self.is_up = False
        for line in list(self.lines):
            line.end()

    def start(self) -> None:
        self.is_up, self.is_hung = True, False

    def say(self, text: str) -> None:
        """Send a line of the protocol to every connection."""
        for line in self.lines:
            line.feed(text.encode() + b"\r\n")

    def verbs(self, verb: str) -> list[float]:
        return [at for at, command in self.commands if command.split()[0] == verb]

    def route(self, sender: Line, subject: str, reply: str, headers: bytes, body: bytes) -> None:
        self.bodies.append(body)
        takers: list[tuple[Line, int]] = []
        members: dict[str, list[tuple[Line, int]]] = {}
        for line in self.lines:
            for number in line.interested_in(subject):
                group = line.groups.get(number)
                (takers if group is None else members.setdefault(group, [])).append((line, number))
        takers += [self._random.choice(each) for each in members.values()]
        for line, number in takers:
            line.hand(subject, number, reply, headers, body)
        if not takers and reply:
            # As the real one: to the sender's own subscription on the reply subject, if any.
            status = f"NATS/1.0 503\r\nNats-Subject: {subject}\r\n\r\n".encode()
            for number in sender.interested_in(reply)[:1]:
                sender.hand(reply, number, "", status, b"")


class Line(Transport):  # type: ignore[misc]
    """One client's transport, over any number of connections one after the other."""

    def __init__(self, server: VirtualServer) -> None:
        self._server = server
        # The part of a TCP transport that the adapter reaches for.
        self._io_writer = SimpleNamespace(
            transport=SimpleNamespace(
                abort=self.end,
                is_closing=lambda: self._ended,
                get_write_buffer_size=lambda: len(self._unread),
                get_write_buffer_limits=lambda: (0, WINDOW_BYTES),
            )
        )
        self._start()

    def _start(self) -> None:
        self.subscriptions: dict[int, str] = {}
        self.groups: dict[int, str] = {}
        self._received = b""
        self._unread = b""
        self._ended = False
        self._moved = asyncio.Event()

    def __bool__(self) -> bool:
        return True  # nats-py would put another in its place

    async def connect(self, *_: Any, connect_timeout: float, **__: Any) -> None:
        server = self._server
        server.attempts_at.append(trio.current_time())
        if server.is_black_hole:
            loop = asyncio.get_running_loop()
            refused = loop.create_task(server.refusal.wait())
            refused.add_done_callback(lambda _: loop.call_soon(server.on_refusal))
            await asyncio.wait_for(refused, connect_timeout)
        if not server.is_up:
            raise ConnectionRefusedError(111, "connection refused")
        self._start()
        server.lines.append(self)
        if not (server.is_silent or server.is_hung):
            self.greet()

    def greet(self) -> None:
        info = f'{{"version":"2.12.0","headers":true,"max_payload":{self._server.max_payload}}}'
        self.feed(f"INFO {info}\r\n".encode())

    async def connect_tls(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    # --- the server's end -------------------------------------------------------------------

    def interested_in(self, subject: str) -> list[int]:
        """The numbers of the subscriptions that take `subject`."""
        return [
            number
            for number, pattern in self.subscriptions.items()
            if subject_matches(pattern, subject)
        ]

    def hand(self, subject: str, number: int, reply: str, headers: bytes, body: bytes) -> None:
        head = f"{subject} {number} {reply}".strip().encode()
        total = len(headers) + len(body)
        if headers:
            start = b"HMSG %s %d %d\r\n" % (head, len(headers), total)
        else:
            start = b"MSG %s %d\r\n" % (head, total)
        self.feed(start + headers + body + b"\r\n")

    def feed(self, data: bytes) -> None:
        self._received += data
        self._moved.set()

    def end(self) -> None:
        """Either side has closed; what was not read is lost."""
        self._ended = True
        self._unread = b""
        self._moved.set()
        if self in self._server.lines:
            self._server.lines.remove(self)

    def read_backlog(self) -> None:
        while (end := self._unread.find(b"\r\n")) >= 0:
            verb, _, rest = self._unread[:end].decode().partition(" ")
            words = rest.split()
            body_end = end + 2
            if verb in {"PUB", "HPUB"}:
                body_end += int(words[-1]) + 2
                if len(self._unread) < body_end:
                    break
            payload = self._unread[end + 2 : body_end - 2]
            self._unread = self._unread[body_end:]
            self._do(verb, words, payload)
        self._moved.set()

    def _do(self, verb: str, words: list[str], payload: bytes) -> None:
        server = self._server
        subject = words[0] if words else ""
        server.commands.append((trio.current_time(), f"{verb} {subject}".strip()))
        if verb == server.hangs_up_on:
            asyncio.get_running_loop().call_later(0.1, self.end)
            return
        if verb == "PING":
            self.feed(b"PONG\r\n")
        elif verb == "UNSUB":
            self.subscriptions.pop(int(subject), None)
        elif verb in {"PUB", "HPUB", "SUB"} and subject in server.unpermitted:
            what = "Subscription" if verb == "SUB" else "Publish"
            self.feed(f"-ERR 'Permissions Violation for {what} to \"{subject}\"'\r\n".encode())
        elif verb == "SUB":
            number = int(words[-1])
            self.subscriptions[number] = subject
            if len(words) > 2:
                self.groups[number] = words[1]
        elif verb in {"PUB", "HPUB"}:
            if len(payload) > server.max_payload:
                self.feed(b"-ERR 'Maximum Payload Violation'\r\n")
                self.end()
                return
            sizes = 2 if verb == "HPUB" else 1
            header_bytes = int(words[-2]) if verb == "HPUB" else 0
            reply = words[1] if len(words) > 1 + sizes else ""
            server.route(self, subject, reply, payload[:header_bytes], payload[header_bytes:])

    # --- nats-py's end ----------------------------------------------------------------------

    def write(self, payload: bytes) -> None:
        self._server.writes.append(len(payload))
        if not self._ended:
            self._unread += payload
            if not self._server.is_hung:
                self.read_backlog()

    def writelines(self, payload: list[bytes]) -> None:
        self.write(b"".join(payload))

    async def drain(self) -> None:
        while len(self._unread) > WINDOW_BYTES and not self._ended:
            await self._wait()
        if self._ended:
            raise ConnectionResetError

    async def read(self, buffer_size: int) -> bytes:
        while not self._received and not self._ended:
            await self._wait()
        data, self._received = self._received[:buffer_size], self._received[buffer_size:]
        return data

    async def readline(self) -> bytes:
        while b"\n" not in self._received and not self._ended:
            await self._wait()
        end = self._received.find(b"\n") + 1
        data, self._received = self._received[:end], self._received[end:]
        return data

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def close(self) -> None:
        self.end()

    async def wait_closed(self) -> None:
        pass

    def at_eof(self) -> bool:
        return self._ended and not self._received


WAIT_S = 2.0
"""nats-py asks the machine's own clock whether it has tried lately: far longer than a test."""

opened = partial(open_nats_broker, name="test", reconnect_wait_s=WAIT_S)


@contextmanager
def virtual_server() -> Iterator[VirtualServer]:
    """Inside, `open_nats_broker(server.url, …)` connects to the server that this yields."""
    server = VirtualServer()
    with mock.patch.object(nats_client, "TcpTransport", partial(Line, server)):
        yield server


@pytest.fixture(name="server")
def server_fixture() -> Iterator[VirtualServer]:
    with virtual_server() as server:
        yield server
