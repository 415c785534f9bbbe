"""A line to the engine process on which questions are answered, in whole frames and in order.

Questions that have come while an answer was awaited go out together, so a busy engine finds the
next one there. Who asks may give up at any time: a question that has gone out is answered all the
same, so a hung engine is noticed, and its answer is thrown away.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NoReturn

import trio

from trio_worker.protocol.frames import FromEngine
from trio_worker.supervisor.frame_stream import FrameStream

UNDER_WAY_MAX = 32
"""Questions that have gone out and are not answered; as many more wait to, and the rest to wait."""


class NeverAsked(Exception):
    """The line was closed before the engine came to the question."""


class NoAnswer(Exception):
    """The line was closed while this question was the one to be answered next."""


class _Question:
    """A frame, and what it came to."""

    __slots__ = ("_is_settled", "_outcome", "frame")

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self._is_settled = trio.Event()
        self._outcome: FromEngine | NeverAsked | NoAnswer | None = None

    def settle(self, outcome: FromEngine | NeverAsked | NoAnswer) -> None:
        self._outcome = outcome
        self._is_settled.set()

    async def wait_answer(self) -> FromEngine:
        await self._is_settled.wait()
        assert self._outcome is not None
        if isinstance(self._outcome, NeverAsked | NoAnswer):
            raise self._outcome
        return self._outcome


class Line:
    """Takes questions from any task to the one task that asks them. Its state: two channel ends."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[_Question](UNDER_WAY_MAX)

    async def ask(self, frame: bytes) -> FromEngine:
        """The answer to one question. Raises `NeverAsked` and `NoAnswer`.

        Cancelled: the question has not been asked, or its answer is thrown away.
        """
        question = _Question(frame)
        try:
            try:
                self._send.send_nowait(question)
            except trio.WouldBlock:
                await self._send.send(question)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            question.settle(NeverAsked())
        return await question.wait_answer()

    async def serve(self, stream: FrameStream, *, answer_within_s: float) -> NoReturn:
        """Ask what is asked until cancelled; the line is closed then, and after every error.

        Raises as `FrameStream.receive`, and `trio.TooSlowError` for an answer that takes longer
        than `answer_within_s`. Whoever awaits an answer gets to know of the error's consequences
        first: no checkpoint lies between the error and its being caught around `serve`.
        """
        under_way: deque[_Question] = deque()
        try:
            with trio.fail_at(math.inf) as patience:
                while True:
                    patience.deadline = math.inf
                    asked = [] if under_way else [await self._receive.receive()]
                    asked += self._waiting(UNDER_WAY_MAX - len(under_way) - len(asked))
                    under_way += asked
                    patience.deadline = trio.current_time() + answer_within_s
                    if asked:
                        stream.send_now(b"".join(question.frame for question in asked))
                    answer: FromEngine | None = await stream.receive()
                    while answer is not None:
                        under_way.popleft().settle(answer)
                        answer = stream.receive_nowait() if under_way else None
        finally:
            self.close()
            for question in under_way:
                question.settle(NoAnswer() if question is under_way[0] else NeverAsked())

    def close(self) -> None:
        """Whoever waits to ask is told `NeverAsked`, and so is whoever comes later."""
        self._send.close()
        for question in self._waiting(UNDER_WAY_MAX):
            question.settle(NeverAsked())
        self._receive.close()

    def _waiting(self, most: int) -> Iterator[_Question]:
        """Takes the questions that have come, as many as `most`."""
        with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            for _ in range(most):
                yield self._receive.receive_nowait()
