"""One request on its way to a worker, and what comes back, unread.

What each message means for the request, and whether it is sent once more, is decided by
`calling/attempts.py`; here is the waiting that belongs to it. Every wait ends with the caller's
deadline.

Rule 1: who leaves before the end has told the worker so.
Rule 2: a worker is always asked for a stream, in which silence tells that it is gone.
Rule 3: each attempt has an inbox of its own, so that what an earlier one still says is not taken
for a part of this answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import trio

from trio_worker.calling.attempts import NOBODY_LISTENS_GRACE_S, Exchange, Persistence
from trio_worker.errors import (
    MessageLost,
    MessageTooLarge,
    NoWorker,
    PayloadTooLarge,
    WorkerError,
)
from trio_worker.gateway.inboxes import Inbox, Inboxes
from trio_worker.ports import Broker, Message
from trio_worker.wire import native

SILENT_S = 20.0
"""A worker says something every five seconds, or is gone."""
SLACK_S = 2.0
"""So much later it may be noticed, since a deadline is not moved on for every message."""
AT_ONCE = 64
"""So many messages are handed on together, then others get their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A message of an answer."""

    body: bytes
    worker_id: str
    opens: int | None
    """The choice of which it is the first word, and says nothing yet. With choice 0 an attempt
    begins: what came before does not count any more."""
    is_last: bool


class Forward:
    """Sends requests over one connection; any number at a time."""

    def __init__(self, broker: Broker, inboxes: Inboxes, *, attempts: int) -> None:
        """`attempts` is how often a request is sent in all, before anything of it is handed on."""
        self._broker = broker
        self._inboxes = inboxes
        self._persistence = Persistence(
            timeout_ms=None, attempts=attempts, nobody_listens_grace_s=NOBODY_LISTENS_GRACE_S
        )
        self._rng = random.Random()  # noqa: S311 - spreads retries; no secret

    @contextmanager
    def ask(
        self, fields: Mapping[str, Any], *, request_id: str, choices: int, is_handed_on: bool
    ) -> Iterator[Pieces]:
        """Send a request; yields its answer, which arrives meanwhile.

        `choices` is how many the answer has. `is_handed_on` says that its caller gets each piece at
        once; otherwise the request may be sent again until the last of them. Leaving before the
        end, also by cancellation, cancels the request at the worker. Raises `NoWorker` where there
        is no connection, and `PayloadTooLarge`.
        """
        if not self._broker.statistics().connected:
            raise NoWorker("the gateway has no connection to NATS at the moment")
        exchange = Exchange(
            {**fields, "stream": True},
            request_id=request_id,
            worker_id=None,
            persistence=self._persistence,
            rng=self._rng,
            now=trio.current_time(),
        )
        with self._inboxes.another() as inbox:
            pieces = Pieces(
                self._broker, exchange, inbox, choices=choices, is_handed_on=is_handed_on
            )
            pieces.send()
            with pieces.patience:
                try:
                    yield pieces
                finally:
                    pieces.cancel()
            if pieces.patience.cancelled_caught:
                raise pieces.nothing_has_come()


class Pieces:
    """The answer to one request, while it arrives: an asynchronous iterator of its messages.

    Those that have come meanwhile are taken together, so that a gateway that is behind catches up:
    a wait, a scope and a send are then theirs and not one's.
    """

    def __init__(
        self,
        broker: Broker,
        exchange: Exchange,
        inbox: Inbox,
        *,
        choices: int,
        is_handed_on: bool,
    ) -> None:
        self._broker = broker
        self._exchange = exchange
        self._inbox = inbox
        self._choices = choices
        self._is_handed_on = is_handed_on
        self.patience = trio.CancelScope()
        """Ends the wait for a request that cannot be sent again. It stands around all of its
        answer: a scope for each message of a long one would be an eighth of what that costs."""
        self._error: WorkerError | None = None
        """What has come behind messages that are on their way to the caller."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Piece]:
        """What has come together: one message at least, and `AT_ONCE` at most.

        Sends the request again where that is allowed. Raises the `WorkerError` that it ends with,
        when what came before has been returned. Cancelled: nothing is lost.
        """
        if self._error is not None:
            raise self._error
        if self._exchange.ended:
            raise StopAsyncIteration
        pieces = [await self._next_piece()]
        while len(pieces) < AT_ONCE and (piece := self._next_piece_nowait()) is not None:
            pieces.append(piece)
        return pieces

    async def _next_piece(self) -> Piece:
        exchange = self._exchange
        while True:
            if exchange.resend_at is not None:
                await trio.sleep_until(exchange.resend_at)
                self.send()
            try:
                piece = self._accept(await self._next_message())
            except MessageLost as lost:
                self._begin_again(lost)
                continue
            if piece is not None:
                return piece

    def _next_piece_nowait(self) -> Piece | None:
        """None if there is none now, or the request has failed or is to be sent again."""
        if self._exchange.ended:
            return None
        try:
            try:
                return self._accept(self._inbox.receive_nowait())
            except MessageLost as lost:
                self._begin_again(lost)
        except trio.WouldBlock:
            pass
        except WorkerError as error:
            self._error = error
        return None

    def _accept(self, message: Message) -> Piece | None:
        """None if the request is to be sent again. Raises what it ends with."""
        exchange, headers = self._exchange, message.headers
        if not exchange.accept(message.body, headers, message.reply, trio.current_time()):
            return None
        is_last = headers.get(native.Header.TERMINAL) is not None
        is_silent = not is_last and native.is_silent(message.body)
        if self._is_handed_on and not is_silent:
            exchange.content_is_handed_out()
        number = int(headers[native.Header.SEQUENCE])
        return Piece(
            body=message.body,
            worker_id=headers.get(native.Header.WORKER_ID, ""),
            opens=number if is_silent and number < self._choices else None,
            is_last=is_last,
        )

    async def _next_message(self) -> Message:
        """Raises `MessageLost` if the worker is gone, and another one may be asked."""
        if not self._exchange.may_be_sent_again:
            self._be_patient()
            return await self._inbox.receive()
        with trio.move_on_at(self._waits_until()):
            return await self._inbox.receive()
        raise self.nothing_has_come()

    def nothing_has_come(self) -> WorkerError:
        """Why the wait is over."""
        if trio.current_time() >= self._exchange.gives_up_at:
            return self._exchange.give_up()
        return MessageLost(f"nothing has come for {SILENT_S:g} s: the worker is gone")

    def _be_patient(self) -> None:
        """Wait at least until `_waits_until`, and at most `SLACK_S` longer."""
        until = self._waits_until()
        if not until <= self.patience.deadline < math.inf:
            self.patience.deadline = min(until + SLACK_S, self._exchange.gives_up_at)

    def _waits_until(self) -> float:
        return min(trio.current_time() + SILENT_S, self._exchange.gives_up_at)

    def _begin_again(self, lost: MessageLost) -> None:
        """Have the request sent to another worker, or raise `lost` where that may not be."""
        self.cancel()
        self._exchange.begin_again(lost, trio.current_time())
        self._inbox.move()

    def send(self) -> None:
        """Send the request now. Raises `PayloadTooLarge`."""
        body = self._exchange.body(trio.current_time())
        try:
            self._broker.publish(
                Message(subject=self._exchange.subject, body=body, reply=self._inbox.subject)
            )
        except MessageTooLarge as exc:
            raise PayloadTooLarge(
                f"the request has {exc.size} bytes; the NATS server takes {exc.limit}",
                details={"bytes": exc.size, "limit": exc.limit},
            ) from exc

    def cancel(self) -> None:
        """Tell a worker that may have the request to end it."""
        if (cancel := self._exchange.cancel_message()) is not None:
            subject, body = cancel
            self._broker.publish(Message(subject=subject, body=body))
