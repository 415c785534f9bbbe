"""One caller's answer: what its sequence produces, as messages.

Whoever takes the turns puts each output in; the request's own task waits for the last one, tells
a streaming caller that the request is alive while none comes, and writes the end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from loguru import logger

from trio_worker.core.sequence import Ending, Sequence
from trio_worker.errors import EngineFailed, WorkerError
from trio_worker.exception_groups import sole_exceptions
from trio_worker.flow.reply_stream import ReplyStream
from trio_worker.protocol.turn import FinishReason, Output, SequenceFailure, TokenLogprob
from trio_worker.wire.native import AnswerWriter, Usage, WorkerNote

KEEP_ALIVE_S = 5.0
"""How often at least a streaming caller hears something."""

_T = TypeVar("_T")


class Answer:
    """What goes back to the caller, streamed or collected.

    It holds no queue: a token is a message in the outbox, whose bound is the reply stream's, or
    a piece of the text that is said as a whole, of `max_tokens` pieces at most.
    """

    def __init__(
        self,
        sequence: Sequence,
        reply: ReplyStream,
        writer: AnswerWriter,
        *,
        worker_id: str,
        priority: str,
    ) -> None:
        self.reply = reply
        self.priority = priority
        self._last_sent_at = trio.current_time()
        self._sequence = sequence
        self._writer = writer
        self._worker_id = worker_id
        self._stream = sequence.request.stream
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._has_ended = trio.Event()
        """The last output has been taken, or something has gone wrong."""
        self._finish: FinishReason | None = None
        self._failure: Exception | None = None
        self._traced: list[str] | None = None
        """What has been said, while level `trace` is on."""

    @property
    def text(self) -> str:
        """What has been collected so far; empty for a stream."""
        return "".join(self._texts)

    def open(self) -> None:
        if self._stream:
            self._send(self._writer.opening())

    def keep_alive(self) -> None:
        if self._stream:
            self._send(self._writer.keep_alive())
        self._last_sent_at = trio.current_time()

    def trace_prompt(self) -> None:
        """Write the prompt at level `trace`, if that is on; then the answer follows at its end."""

        def shown() -> object:
            self._traced = []
            request = self._sequence.request
            return request.messages if request.prompt is None else request.prompt

        logger.opt(lazy=True).trace("Prompt: {!r}", shown)

    def trace_text(self) -> None:
        """Write the text so far at level `trace`, if the prompt was."""
        if self._traced is not None:
            logger.trace("Answer: {!r}", "".join(self._traced))

    def take(self, output: Output | SequenceFailure) -> None:
        """Pass an output on, in order. Synchronous, and never raises.

        What goes wrong with this answer is no matter of who takes the turns: it is raised where
        the request's task waits, and nothing is passed on any more.
        """
        if self._failure is not None:
            return
        try:
            self._finish = self._pass_on(output)
        except Exception as failure:  # noqa: BLE001 - see above
            self._failure = failure
        if self._finish is not None or self._failure is not None:
            self._has_ended.set()

    async def wait_end(self) -> None:
        """Return when the last output has been taken; meanwhile a streaming caller is kept alive.

        Raises what has gone wrong with the answer. Cancelled: what has been taken has been sent.
        """
        if not self._stream:
            await self._has_ended.wait()
        while not self._has_ended.is_set():
            with trio.move_on_at(self._last_sent_at + KEEP_ALIVE_S) as quiet:
                await self._has_ended.wait()
            # Tokens that have come meanwhile have moved the moment on.
            if quiet.cancelled_caught and trio.current_time() >= self._last_sent_at + KEEP_ALIVE_S:
                self.keep_alive()
        if self._failure is not None:
            raise self._failure

    def _pass_on(self, output: Output | SequenceFailure) -> FinishReason | None:
        if isinstance(output, SequenceFailure):
            raise EngineFailed(output.message)
        if self._traced is not None:
            self._traced.append(output.text)
        if not self._stream:
            self._texts.append(output.text)
            self._logprobs += output.logprobs
        elif output.text or output.logprobs:
            self._send(self._writer.chunk(output.text, output.logprobs))
        return output.finish

    def close(self) -> None:
        """The terminal message, after the last output."""
        assert self._finish is not None
        usage = Usage.of(
            prompt=len(self._sequence.prompt),
            completion=len(self._sequence.produced),
            cached=self._sequence.cached,
        )
        finish, note = self._finish, self._note()
        if self._stream:
            self.reply.finish(self._writer.closing(finish, usage, note))
        else:
            wanted = self._sequence.request.sampling.logprobs
            logprobs = self._logprobs if wanted else None
            self.reply.finish(self._writer.whole(self._texts, logprobs, finish, usage, note))

    async def alive_while(self, call: Callable[..., Awaitable[_T]], *args: object) -> _T:
        """What `call` returns or raises; meanwhile a streaming caller gets keep-alive chunks."""
        if not self._stream:
            return await call(*args)
        failure: WorkerError | None = None
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_alive)
                try:
                    result = await call(*args)
                except WorkerError as error:
                    # Raised below: beside a `Cancelled` it would come out in an exception group.
                    failure = error
                nursery.cancel_scope.cancel(reason="the wait is over")
        if failure is not None:
            raise failure
        return result

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep_until(self._last_sent_at + KEEP_ALIVE_S)
            self.keep_alive()

    def _send(self, body: bytes) -> None:
        self.reply.send(body)
        self._last_sent_at = trio.current_time()
        if self.reply.backlogged:
            self._sequence.end(Ending.BACKLOG)

    def _note(self) -> WorkerNote:
        sequence = self._sequence
        assert sequence.batched_at is not None
        assert sequence.first_token_at is not None
        assert sequence.last_token_at is not None
        return WorkerNote(
            id=self._worker_id,
            request_id=sequence.request_id,
            seed=sequence.request.sampling.seed,
            queue_ms=_ms(sequence.batched_at - sequence.arrived_at),
            prefill_ms=_ms(sequence.first_token_at - sequence.batched_at),
            decode_ms=_ms(sequence.last_token_at - sequence.first_token_at),
            priority=self.priority,
            resumed=sequence.resumed,
            degraded=tuple(sequence.degraded),
        )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
