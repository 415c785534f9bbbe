"""A line to the engine process: strictly one question, one answer, in whole frames.

Who asks may give up at any time: the question is still sent whole and its answer awaited, so no
half frame is left behind, and a hung engine is noticed all the same.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import trio

from trio_worker.protocol.frames import FromEngine
from trio_worker.supervisor.frame_stream import FrameStream


class NeverAsked(Exception):
    """The line was closed before the question could be sent."""


class NoAnswer(Exception):
    """The line was closed after the question had been taken: the engine may have seen it."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A frame, and where its answer goes: a channel of one, closed if there will be none."""

    frame: bytes
    answer: trio.MemorySendChannel[FromEngine]


class Line:
    """Takes questions from any task to the one task that asks them. Its state: two channel ends."""

    def __init__(self) -> None:
        # Without a buffer: a question that nobody has taken yet can be taken back.
        self._send, self._receive = trio.open_memory_channel[_Question](0)

    async def ask(self, frame: bytes) -> FromEngine:
        """The answer to one question. Raises `NeverAsked` and `NoAnswer`.

        Cancelled: the question has not been asked, or its answer is thrown away.
        """
        answer, receive = trio.open_memory_channel[FromEngine](1)
        with receive:
            try:
                await self._send.send(_Question(frame, answer))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                answer.close()
                raise NeverAsked from None
            except trio.Cancelled:
                answer.close()
                raise
            try:
                return await receive.receive()
            except trio.EndOfChannel:
                raise NoAnswer from None

    async def serve(self, stream: FrameStream, *, answer_within_s: float) -> NoReturn:
        """Ask what is asked until cancelled; the line is closed then, and after every error.

        Raises `HungUp`, `FrameError`, and `trio.TooSlowError` for an answer that takes longer
        than `answer_within_s`. Whoever awaits an answer gets to know of the error's consequences
        first: no checkpoint lies between the error and its being caught around `serve`.
        """
        with self._receive:
            while True:
                question = await self._receive.receive()
                with question.answer:
                    with trio.fail_after(answer_within_s):
                        await stream.send(question.frame)
                        answer = await stream.receive()
                    with suppress(trio.BrokenResourceError):
                        question.answer.send_nowait(answer)

    def close(self) -> None:
        """Whoever waits to ask is told `NeverAsked`, and so is whoever comes later."""
        self._send.close()
        self._receive.close()
