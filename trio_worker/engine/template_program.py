"""Renders chat templates in a process of its own, for they are programs that came with a model.

A template can loop or take memory without end, and a thread cannot be killed. So it runs here,
without mlx, one question and one answer at a time over the socket that is standard input:
`template_renderer.py` is the other end, and kills this process when an answer is late.

1. Nothing of a template is kept but what transformers keeps of it, compiled.
2. The process ends when the other end hangs up; also in the middle of a template, a second after
   the answer was due.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

from trio_worker.engine.frame_socket import FrameSocket
from trio_worker.protocol.framing import HungUp

MEMORY_BYTES = 512 * 2**20
"""What the process may hold, some 100 MB of libraries included; on Linux only."""
TEXT_FACTOR, TEXT_BYTES = 4, 4 * 2**20
"""A text may have this many times the bytes of messages, tools and variables, as JSON, and this
many bytes more."""
ALARM_S = 1.0

MOST_BYTES = 2**32 - 1
"""Of a frame: any text is let through whose messages were."""


class Question(msgspec.Struct, frozen=True):
    """What transformers' `render_jinja_template` is called with."""

    messages: list[dict[str, Any]]
    template: str
    variables: dict[str, Any]
    within_s: float
    tools: list[dict[str, Any]] | None = None


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


def main() -> None:
    """Answer until the other end hangs up."""
    asked = FrameSocket(socket.socket(fileno=os.dup(0)), most_bytes=MOST_BYTES)
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

    # Where the system knows no such limit, time is what bounds it.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(HungUp, OSError):
        asked.send(msgspec.msgpack.encode(Ready()))
        while True:
            question = msgspec.msgpack.decode(asked.receive(), type=Question)
            signal.setitimer(signal.ITIMER_REAL, question.within_s + ALARM_S)
            answer = render(render_jinja_template, question)
            signal.setitimer(signal.ITIMER_REAL, 0)
            asked.send(msgspec.msgpack.encode(answer))


def render(render_jinja_template: Any, question: Question) -> Rendered | Refused | Excess:
    asked = msgspec.json.encode([question.messages, question.tools, question.variables])
    limit = TEXT_BYTES + TEXT_FACTOR * len(asked)
    try:
        (text,), _ = render_jinja_template(
            conversations=[question.messages],
            tools=question.tools,
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
