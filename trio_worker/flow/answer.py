"""One caller's answer: what the rows of its request produce, as messages.

Whoever takes the turns puts each output into its choice; the request's own task waits for the last
one, tells a streaming caller that the request is alive while none comes, and writes the end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from loguru import logger

from trio_worker.core.sequence import Ending, Sequence
from trio_worker.errors import EngineFailed, InvalidRequest, WorkerError
from trio_worker.exception_groups import sole_exceptions
from trio_worker.flow.reply import Reply
from trio_worker.protocol.turn import FinishReason, Output, SequenceFailure
from trio_worker.wire.dialect import AnswerWriter
from trio_worker.wire.native import Usage, WholeChoice, WorkerNote

KEEP_ALIVE_S = 5.0
"""How often at least a streaming caller hears something."""

_T = TypeVar("_T")


class Answer:
    """What goes back to the caller, streamed or as a whole.

    It holds no queue: a token is a message in the outbox, whose bound is the reply stream's, or
    a piece of what is said as a whole, of `max_tokens` pieces a choice at most.
    """

    def __init__(
        self,
        sequence: Sequence,
        reply: Reply,
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
        self._ends_with_summary = self._stream and (
            sequence.request.choices > 1 or sequence.request.include_usage
        )
        self.choices = tuple(
            Choice(
                row.choice, self, writer, stream=self._stream, ends_apart=self._ends_with_summary
            )
            for row in sequence.rows
        )
        """Where the outputs of each row go."""
        self._has_ended = trio.Event()
        """All last outputs have been taken, or something has gone wrong."""
        self.failure: Exception | None = None
        """What has gone wrong; then nothing is passed on any more."""

    @property
    def text(self) -> str:
        """What the first choice has come to so far; empty for a stream."""
        return self.choices[0].whole.text

    def open(self) -> None:
        """Tell a streaming caller that the request is here, in few words if it knows of it."""
        if self._sequence.is_opened:
            self.keep_alive()
        elif self._stream:
            for choice in self.choices:
                self.send(self._writer.opening(choice.index))

    def keep_alive(self) -> None:
        if self._stream:
            going_on = next((each.index for each in self.choices if each.finish is None), 0)
            self.send(self._writer.keep_alive(going_on))
        self._last_sent_at = trio.current_time()

    def trace_prompt(self) -> None:
        """Write the prompt at level `trace`, if that is on; then the answer follows at its end."""

        def shown() -> object:
            for choice in self.choices:
                choice.traced = []
            request = self._sequence.request
            return request.messages if request.prompt is None else request.prompt

        logger.opt(lazy=True).trace("Prompt: {!r}", shown)

    def trace_text(self) -> None:
        """Write the text so far at level `trace`, if the prompt was."""
        for choice in self.choices:
            if choice.traced is not None:
                logger.trace("Answer: {!r}", "".join(choice.traced))

    def send(self, body: bytes) -> None:
        """Put a message that is not the last into the outbox."""
        self.reply.send(body)
        self._last_sent_at = trio.current_time()
        if self.reply.backlogged:
            self._sequence.end(Ending.BACKLOG)

    def fail(self, failure: Exception) -> None:
        """The request's task is told."""
        self.failure = failure
        self._has_ended.set()

    def choice_ended(self) -> None:
        if all(choice.finish is not None for choice in self.choices):
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
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """The terminal message, after the last output."""
        first, rows = self._sequence, self._sequence.rows
        usage = Usage.of(
            prompt=len(first.prompt),
            completion=sum(len(row.produced) for row in rows),
            cached=first.cached,
            reasoning=sum(choice.reasoning_tokens for choice in self.choices),
        )
        self.reply.finish(self._last_body(usage, self._note()))

    def _last_body(self, usage: Usage, note: WorkerNote) -> bytes:
        if self._ends_with_summary:
            return self._writer.summary(usage, note)
        if self._stream:
            finish = self.choices[0].finish
            assert finish is not None
            return self._writer.closing(finish, usage, note)
        return self._writer.whole(
            [choice.whole for choice in self.choices],
            usage,
            note,
            with_logprobs=self._sequence.request.sampling.logprobs,
        )

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

    def _note(self) -> WorkerNote:
        first, rows = self._sequence, self._sequence.rows
        batched_at = min(_known(row.batched_at) for row in rows)
        first_token_at = min(_known(row.first_token_at) for row in rows)
        last_token_at = max(_known(row.last_token_at) for row in rows)
        return WorkerNote(
            id=self._worker_id,
            request_id=first.request_id,
            seed=first.sampling.seed,
            queue_ms=_ms(batched_at - first.arrived_at),
            prefill_ms=_ms(first_token_at - batched_at),
            decode_ms=_ms(last_token_at - first_token_at),
            priority=self.priority,
            resumed=max(row.resumed for row in rows),
            degraded=tuple(dict.fromkeys(step for row in rows for step in row.degraded)),
        )


class Choice:
    """Where the outputs of one row go. Its state is what has been said of it."""

    def __init__(
        self, index: int, answer: Answer, writer: AnswerWriter, *, stream: bool, ends_apart: bool
    ) -> None:
        """`ends_apart` says that its finish reason has a chunk which is not the stream's last."""
        self.index = index
        self.finish: FinishReason | None = None
        self.reasoning_tokens = 0
        self.whole = WholeChoice()
        """Empty for a stream."""
        self.traced: list[str] | None = None
        """Its text, while level `trace` is on."""
        self._answer = answer
        self._writer = writer
        self._stream = stream
        self._ends_apart = ends_apart

    def take(self, output: Output | SequenceFailure) -> None:
        """Pass an output on, in order. Synchronous, and never raises.

        What goes wrong with this answer is no matter of who takes the turns: it is raised where
        the request's task waits, and nothing is passed on any more.
        """
        answer = self._answer
        if answer.failure is not None:
            return
        try:
            self.finish = self._pass_on(output)
        except Exception as failure:  # noqa: BLE001 - see above
            answer.fail(failure)
            return
        if self.finish is not None:
            answer.choice_ended()

    def _pass_on(self, output: Output | SequenceFailure) -> FinishReason | None:
        if isinstance(output, SequenceFailure):
            raise (InvalidRequest if output.is_askers_fault else EngineFailed)(output.message)
        if self.traced is not None:
            self.traced.append(output.text)
        if output.is_reasoning:
            self.reasoning_tokens += 1
        if not self._stream:
            self.whole.add(output)
            return output.finish
        if output.text or output.beside or output.logprobs:
            self._answer.send(
                self._writer.chunk(output.text, output.logprobs, output.beside, self.index)
            )
        if output.finish is not None and self._ends_apart:
            self._answer.send(self._writer.ending(output.finish, self.index))
        return output.finish


def _known(at: float | None) -> float:
    """When something happened that has happened."""
    assert at is not None
    return at


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
