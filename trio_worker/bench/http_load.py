"""Callers of an HTTP server in a process of their own, as `load.py` is of a worker.

A connection is used again where the server lets it: one that closes them gets a new one for each
request.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from trio_worker.bench.load import RECEIVE_BYTES, SILENT_S, Load, Measured, MeasuredCallers

STARTED_S = 60.0
"""For the server to load its model."""
RETRY_S = 0.05
"""How often it is looked whether it has: nobody tells."""
CONTENT = re.compile(rb'"content": ?"')
CONTENT_BYTES = 12
"""At most, of which a part may have come before."""
COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked\r\n", re.IGNORECASE)
LAST_CHUNK = b"\r\n0\r\n\r\n"
EVENT = b"data: {"
TAIL_BYTES = 1024
"""Of the end of an answer, in which its usage stands."""


@dataclass(slots=True)
class _Answer:
    asked_at: float
    first_token_s: float | None = None
    head: bytes | None = b""
    """What has come of it; None once it is read."""
    is_chunked: bool = False
    left_bytes: int | None = None
    """Of a body whose length was told."""
    tail: bytes = b""
    """The last that has come."""

    @property
    def is_whole(self) -> bool:
        """As far as anything but the end of the connection can say so."""
        if self.head is not None:
            return False
        return self.left_bytes == 0 or (self.is_chunked and self.tail.endswith(LAST_CHUNK))


class Callers(MeasuredCallers):
    """Keeps so many requests going. Its state: those under way, and what has come so far."""

    def __init__(self, load: Load, selector: selectors.BaseSelector) -> None:
        url = urlsplit(load.url)
        assert url.hostname is not None
        assert url.port is not None
        super().__init__(load)
        self._address = url.hostname, url.port
        self._path = url.path
        self._selector = selector
        self._asked = 0

    def _begin(self) -> None:
        self._ask(None)

    def _is_waiting(self) -> bool:
        return bool(self._selector.get_map())

    def _receive(self) -> None:
        ready = self._selector.select(SILENT_S)
        if not ready:
            sys.exit("the server has fallen silent")
        for key, _ in ready:
            connection, answer = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            data = connection.recv(RECEIVE_BYTES)
            self._take(answer, data)
            if data and not answer.is_whole:
                continue
            self._end(answer)
            self._selector.unregister(connection)
            if not data:
                connection.close()
            self._ask(connection if data else None)

    def _ask(self, connection: socket.socket | None) -> None:
        """Ask for the next prompt, over a connection if there is one."""
        prompts = self._load.prompts
        if self._load.seconds is None and self._asked >= len(prompts):
            if connection is not None:
                connection.close()
            return
        prompt = prompts[self._asked % len(prompts)]
        self._asked += 1
        if connection is None:
            connection = socket.create_connection(self._address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer = _Answer(asked_at=time.perf_counter())
        connection.sendall(self._request(prompt))
        self._selector.register(connection, selectors.EVENT_READ, answer)

    def _request(self, prompt: str) -> bytes:
        fields = {"messages": [{"role": "user", "content": prompt}], **self._load.request}
        if fields.get("stream"):
            fields["stream_options"] = {"include_usage": True}
        body = msgspec.json.encode(fields)
        host, port = self._address
        lines = (
            f"POST {self._path} HTTP/1.1",
            f"Host: {host}:{port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join((*lines, "", "")).encode() + body

    def _take(self, answer: _Answer, data: bytes) -> None:
        if answer.head is not None:
            head, end, rest = (answer.head + data).partition(b"\r\n\r\n")
            if not end:
                answer.head = head
                return
            answer.head, data = None, rest
            answer.is_chunked = CHUNKED.search(head + b"\r\n") is not None
            if (length := CONTENT_LENGTH.search(head + b"\r\n")) is not None:
                answer.left_bytes = int(length[1])
        if answer.left_bytes is not None:
            answer.left_bytes -= len(data)
        self._tokens += _count(self._token, answer.tail, data) if self._token else 0
        self._messages += _count(EVENT, answer.tail, data)
        if answer.first_token_s is None and CONTENT.search(answer.tail[-CONTENT_BYTES:] + data):
            answer.first_token_s = time.perf_counter() - answer.asked_at
            self._first_token_s.append(answer.first_token_s)
        answer.tail = (answer.tail + data)[-TAIL_BYTES:]

    def _end(self, answer: _Answer) -> None:
        usage = COMPLETION_TOKENS.search(answer.tail)
        if usage is None:
            sys.exit(f"not an answer: {answer.tail.decode(errors='replace')}")
        if not self._token:
            self._tokens += int(usage[1])
        self._answers += 1


def _count(what: bytes, before: bytes, data: bytes) -> int:
    """How often it is in `data`, also where it begins in what came `before`."""
    return (before[len(before) - len(what) + 1 :] + data).count(what)


def _wait_for_server(load: Load) -> None:
    url = urlsplit(load.url)
    give_up_at = time.monotonic() + STARTED_S
    while True:
        try:
            socket.create_connection((url.hostname or "", url.port or 0)).close()
        except OSError:
            if time.monotonic() > give_up_at:
                sys.exit("the server does not start")
            time.sleep(RETRY_S)
        else:
            return


def measure(load: Load, began: Callable[[], None]) -> Measured:
    """Do as the load says; `began` is called when measuring begins."""
    with selectors.DefaultSelector() as selector:
        try:
            return Callers(load, selector).measure(began)
        finally:
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()


def main() -> None:
    load = msgspec.json.decode(sys.stdin.readline(), type=Load)
    _wait_for_server(load)

    def say(line: bytes) -> None:
        sys.stdout.write(line.decode() + "\n")
        sys.stdout.flush()

    say(msgspec.json.encode(measure(load, lambda: say(b"{}"))))


if __name__ == "__main__":
    main()
