"""Callers of a worker in a process of their own: many requests on one raw connection to NATS.

What is measured shares its cores with whoever calls it, so this takes as little of them as Python
can: no library but for the numbers at both ends, one subscription, and of a message only its
first line and what is counted. It is asked for one `Load` on standard input, and writes two lines
of JSON: an empty object when it begins to measure, and a `Measured` when it is done. It ends once
its last request has.
"""

from __future__ import annotations

import itertools
import re
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

SILENT_S = 30.0
"""Nothing for so long, and it gives up."""
RECEIVE_BYTES = 2**18
CONNECT = b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n'
INBOX = b"_INBOX.load"
NO_RESPONDERS = b"NATS/1.0 503"
TERMINAL = b"\nTerminal: "
ERROR = b"\nNats-Service-Error: "
CONTENT = b'"content":"'
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for, and for how long."""

    url: str
    subject: str
    request: Mapping[str, Any]
    """The fields of a request but for its messages."""
    prompts: tuple[str, ...]
    """Asked in turn."""
    concurrent: int
    token_text: str = ""
    """Of every token, where all are the same: then tokens are counted as they come."""
    warmup_s: float = 0.0
    """From the first token of the last of the first requests."""
    seconds: float | None = None
    """For how long to measure; None: as many answers as there are prompts, from the first request
    to the end of the last answer."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What has come while it was measured."""

    seconds: float
    cpu_seconds: float
    """Of this process."""
    tokens: int
    messages: int
    """Of which one may hold several tokens."""
    answers: int
    first_token_s: tuple[float, ...]
    """From a request to its first token, or its answer: of all that have had one."""


class Reading(NamedTuple):
    """What has come by then."""

    at: float
    cpu_seconds: float
    tokens: int
    messages: int
    answers: int

    def until(self, then: Reading, first_token_s: Sequence[float]) -> Measured:
        """What has come between the two."""
        return Measured(
            seconds=then.at - self.at,
            cpu_seconds=then.cpu_seconds - self.cpu_seconds,
            tokens=then.tokens - self.tokens,
            messages=then.messages - self.messages,
            answers=then.answers - self.answers,
            first_token_s=tuple(first_token_s),
        )


class MeasuredCallers(ABC):
    """Callers whatever they call through. Its state: what has come so far."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._token = load.token_text.encode()
        self._first_token_s: list[float] = []
        self._tokens = self._messages = self._answers = 0

    def measure(self, began: Callable[[], None]) -> Measured:
        """Ask, wait until all are under way, and measure; `began` is called when that begins."""
        seconds = self._load.seconds
        if seconds is None:
            began()
        before = self._reading()
        for _ in range(self._load.concurrent):
            self._begin()
        if seconds is None:
            while self._is_waiting():
                self._receive()
        else:
            while len(self._first_token_s) < self._load.concurrent:
                self._receive()
            self._receive_for(self._load.warmup_s)
            began()
            before = self._reading()
            self._receive_for(seconds)
        return before.until(self._reading(), self._first_token_s)

    def _reading(self) -> Reading:
        return Reading(
            at=time.perf_counter(),
            cpu_seconds=time.process_time(),
            tokens=self._tokens,
            messages=self._messages,
            answers=self._answers,
        )

    def _receive_for(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self._receive()

    @abstractmethod
    def _begin(self) -> None:
        """One more caller asks for the next prompt, if there is one left."""

    @abstractmethod
    def _is_waiting(self) -> bool:
        """Whether a request is under way."""

    @abstractmethod
    def _receive(self) -> None:
        """Take what has come, waiting for something."""


class Callers(MeasuredCallers):
    """Keeps so many requests going. Its state: those under way, and what has come so far."""

    def __init__(self, load: Load, connection: socket.socket) -> None:
        super().__init__(load)
        self._streams = bool(load.request.get("stream"))
        self._connection = connection
        self._to_send: list[bytes] = [CONNECT, b"SUB %b.* 1\r\n" % INBOX]
        """At most what the requests under way ask for."""
        self._received = b""
        """The beginning of a message."""
        self._numbers = itertools.count()
        self._is_asking = True
        self._controls: dict[bytes, bytes] = {}
        """Of the requests under way, by reply subject: the control subject, once it is known."""
        self._asked_at: dict[bytes, float] = {}
        """Of those without a token, by reply subject."""

    def leave(self) -> None:
        """Cancel what is under way, and wait for its end."""
        self._is_asking = False
        for control in self._controls.values():
            if control:
                self._publish(control, b"", b"cancel")
        while self._controls:
            self._receive()

    def _is_waiting(self) -> bool:
        return bool(self._controls)

    def _begin(self) -> None:
        number, prompts = next(self._numbers), self._load.prompts
        if self._load.seconds is None and number >= len(prompts):
            return
        message = {"role": "user", "content": prompts[number % len(prompts)]}
        reply = b"%b.%d" % (INBOX, number)
        self._controls[reply] = b""
        self._asked_at[reply] = time.perf_counter()
        body = msgspec.json.encode({"messages": [message], **self._load.request})
        self._publish(self._load.subject.encode(), reply, body)

    def _publish(self, subject: bytes, reply: bytes, body: bytes) -> None:
        self._to_send.append(b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(body), body))

    def _receive(self) -> None:
        """Send what there is to send, and take what has come, waiting for something."""
        if self._to_send:
            self._connection.sendall(b"".join(self._to_send))
            self._to_send.clear()
        try:
            received = self._connection.recv(RECEIVE_BYTES)
        except TimeoutError:
            sys.exit(f"nothing has come for {SILENT_S:g} s")
        if not received:
            sys.exit("the NATS server has closed the connection")
        data = self._received + received
        at = 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            words = data[at:line_end].split()
            body_at = end = line_end + 2
            if words[0] in (b"HMSG", b"MSG"):
                end = body_at + int(words[-1]) + 2
                if end > len(data):
                    break
                self._take(words, data[body_at : end - 2])
            elif words[0] == b"PING":
                self._to_send.append(b"PONG\r\n")
            elif words[0] == b"-ERR":
                sys.exit(data[at:line_end].decode())
            at = end
        self._received = data[at:]

    def _take(self, words: list[bytes], message: bytes) -> None:
        """One message; `words` are those of its line, of which the reply subject may be missing."""
        reply, has_headers = words[1], words[0] == b"HMSG"
        self._messages += 1
        body_at = int(words[-2]) if has_headers else 0
        ends = (
            not self._streams
            or message.find(TERMINAL, 0, body_at) > 0
            or message.startswith(NO_RESPONDERS)
        )
        if not self._controls[reply] and len(words) == 5 + has_headers:
            self._controls[reply] = words[3]
        if self._token:
            self._tokens += message.count(self._token, body_at)
        if reply in self._asked_at and (ends or CONTENT in message):
            self._first_token_s.append(time.perf_counter() - self._asked_at.pop(reply))
        if ends:
            self._end(reply, message)

    def _end(self, reply: bytes, message: bytes) -> None:
        del self._controls[reply]
        if not self._is_asking:
            return
        if ERROR in message or message.startswith(NO_RESPONDERS):
            sys.exit(f"not an answer: {message.decode(errors='replace')}")
        if not self._token and (usage := COMPLETION_TOKENS.search(message)) is not None:
            self._tokens += int(usage[1])
        self._answers += 1
        self._begin()


def main() -> None:
    load = msgspec.json.decode(sys.stdin.readline(), type=Load)
    address = urlsplit(load.url)
    assert address.hostname is not None
    assert address.port is not None

    def say(line: bytes) -> None:
        sys.stdout.write(line.decode() + "\n")
        sys.stdout.flush()

    with socket.create_connection((address.hostname, address.port), SILENT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        callers = Callers(load, connection)
        say(msgspec.json.encode(callers.measure(lambda: say(b"{}"))))
        callers.leave()


if __name__ == "__main__":
    main()
