"""Renders chat templates in a process of its own, for they are programs that came with a model.

A template can loop or take memory without end, and a thread cannot be killed. So it runs here,
without mlx, one question and one answer at a time over the socket that is standard input:
`templates.py` is the other end, and kills this process when an answer is late.

1. Nothing of a template is kept but what transformers keeps of it, compiled.
2. The process ends when the other end hangs up; also in the middle of a template, a second after
   the answer was due.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

MEMORY_BYTES = 512 * 2**20
"""What the process may hold, some 100 MB of libraries included; on Linux only."""
TEXT_FACTOR, TEXT_BYTES = 4, 4 * 2**20
"""A text may have so many times the bytes of the messages, and as many more."""
ALARM_S = 1.0

_LENGTH = struct.Struct(">I")


class Question(msgspec.Struct, frozen=True):
    """What transformers' `render_jinja_template` is called with."""

    messages: list[dict[str, str]]
    template: str
    variables: dict[str, Any]
    within_s: float


class Rendered(msgspec.Struct, frozen=True, tag=True):
    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The template, or the library, does not take these messages."""

    message: str


class Excess(msgspec.Struct, frozen=True, tag=True):
    """The template wanted more than it may have."""

    message: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message: what takes its time has been imported."""


Answer: TypeAlias = Rendered | Refused | Excess | Ready


class HungUp(Exception):
    """The other end is gone."""


def send(to: socket.socket, message: Question | Answer) -> None:
    """Send one message. Raises `OSError`, which `TimeoutError` is."""
    body = msgspec.msgpack.encode(message)
    to.sendall(_LENGTH.pack(len(body)) + body)


def receive(origin: socket.socket) -> bytes:
    """The next message's body. Raises `HungUp`, and `OSError` as the socket does."""
    (length,) = _LENGTH.unpack(_exactly(origin, _LENGTH.size))
    return _exactly(origin, length)


def _exactly(origin: socket.socket, count: int) -> bytes:
    held = bytearray()
    while len(held) < count:
        data = origin.recv(min(count - len(held), 2**18))
        if not data:
            raise HungUp
        held += data
    return bytes(held)


def main() -> None:
    """Answer until the other end hangs up."""
    asked = socket.socket(fileno=os.dup(0))
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

    # Where the system knows no such limit, time is what bounds it.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(HungUp, OSError):
        send(asked, Ready())
        while True:
            question = msgspec.msgpack.decode(receive(asked), type=Question)
            signal.setitimer(signal.ITIMER_REAL, question.within_s + ALARM_S)
            answer = render(render_jinja_template, question)
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(asked, answer)


def render(render_jinja_template: Any, question: Question) -> Rendered | Refused | Excess:
    limit = TEXT_BYTES + TEXT_FACTOR * sum(
        len(text) for message in question.messages for text in message.values()
    )
    try:
        (text,), _ = render_jinja_template(
            conversations=[question.messages],
            chat_template=question.template,
            **question.variables,
        )
    except MemoryError:
        return Excess(f"it wanted more than {MEMORY_BYTES // 2**20} MB of memory")
    except Exception as exc:  # noqa: BLE001 - a template is the model's own program
        return Refused(f"{type(exc).__name__}: {exc}"[:1000])
    if len(text) > limit:
        return Excess(f"it made {len(text)} characters of a few; the limit is {limit} for these")
    return Rendered(text)


if __name__ == "__main__":
    main()
