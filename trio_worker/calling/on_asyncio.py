"""Calling a worker from Python, on asyncio, with nats-py alone. `client` is the same for Trio.

    async with open_client("nats://127.0.0.1:4222") as client:
        async with client.ask({"prompt": "Hello", "stream": True}) as answer:
            async for chunk in answer:
                print(chunk.text, end="", flush=True)

        whole = await client.complete({"prompt": "Hello"})
        print(whole.text, whole.usage)

An error reply is raised as the class of `trio_worker.errors` that belongs to its code. One that
may be retried is retried first: at once where another worker may have room, then after the time
it names, within the request's deadline, and only while no text has been handed out. What the
connection meets is raised as nats-py raises it.

This module imports no Trio, and nothing that changes asyncio.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import nats
from nats import errors as nats_errors
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg

from trio_worker.calling.any_loop import (
    INBOX_MESSAGES,
    LEAVE_S,
    AnswerOnAnyLoop,
    ClientOnAnyLoop,
)
from trio_worker.calling.attempts import NOBODY_LISTENS_GRACE_S, Chunk, Exchange, Persistence
from trio_worker.errors import PayloadTooLarge

__all__ = ["Answer", "Chunk", "Client", "open_client"]


class Answer(AnswerOnAnyLoop):
    """The answer to one request, while it arrives: an asynchronous iterator of its messages."""

    def __init__(
        self, connection: Connection, exchange: Exchange, inbox: str, messages: asyncio.Queue[Msg]
    ) -> None:
        super().__init__(exchange)
        self._connection = connection
        self._inbox = inbox
        self._messages = messages

    async def __anext__(self) -> Chunk:
        """The next message.

        Sends the request again where that is allowed. Then the opening chunk of a stream, which
        has no text, may come again, and `Sequence` begins anew.

        Raises the `WorkerError` of an error reply, `NoWorker` if nobody has listened for the
        grace or until the deadline, `RequestTimeout` a second after the deadline if not even an
        error has come, and `MessageLost` for a gap in the numbering, which core NATS allows.
        Cancelled: nothing is lost; the next call goes on.
        """
        exchange = self._exchange
        if exchange.ended:
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        bound = exchange.gives_up_at if math.isfinite(exchange.gives_up_at) else None
        while True:
            if exchange.resend_at is not None:
                await asyncio.sleep(exchange.resend_at - loop.time())
                await self.send()
            try:
                async with asyncio.timeout_at(bound):
                    message = await self._messages.get()
            except TimeoutError:
                raise exchange.give_up() from None
            chunk = exchange.take(
                message.data, message.headers or {}, message.reply or None, loop.time()
            )
            if chunk is not None:
                return chunk

    async def cancel(self) -> None:
        """Ask the worker to end the request; `RequestCancelled` follows if it was not too late."""
        if (cancel := self._exchange.cancel_message()) is not None:
            await self._connection.publish(*cancel)

    async def send(self) -> None:
        """Send the request now; `ask` does it first, and then the iteration where it must."""
        body = self._exchange.body(asyncio.get_running_loop().time())
        try:
            await self._connection.publish(self._exchange.subject, body, reply=self._inbox)
        except nats_errors.MaxPayloadError as exc:
            limit = int(self._connection.max_payload)
            raise PayloadTooLarge(
                f"the request has {len(body)} bytes; the NATS server takes {limit}",
                details={"bytes": len(body), "limit": limit},
            ) from exc


class Client(ClientOnAnyLoop):
    """Asks over a nats-py connection, which stays yours; any number of answers at a time.

    Args:
        timeout_ms: for requests that name none; None leaves it to the worker, and the wait to a
            timeout of your own.
        attempts: how often a request is sent in all while the answer is an error that may be
            retried; 1 is never again.
        nobody_listens_grace_s: for how long it is sent again where no worker listens, as while
            one restarts, within the deadline; 0 is never again.
        caller: whose requests these are; they go to the subject that names it, on which the
            server may hold an account to one caller. None: to those of everybody.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        timeout_ms: int | None = 30_000,
        attempts: int = 3,
        nobody_listens_grace_s: float = NOBODY_LISTENS_GRACE_S,
        caller: str | None = None,
    ) -> None:
        self._connection = connection
        super().__init__(
            Persistence(
                timeout_ms=timeout_ms,
                attempts=attempts,
                nobody_listens_grace_s=nobody_listens_grace_s,
            ),
            caller=caller,
        )

    @asynccontextmanager
    async def ask(
        self, request: Mapping[str, Any], *, worker_id: str | None = None
    ) -> AsyncIterator[Answer]:
        """Send a request; yields its answer, which arrives meanwhile.

        Leaving the context before the end, also by cancellation, cancels the request at the
        worker.

        Args:
            request: the fields of the wire format, such as `messages` or `prompt`. With a
                `model`, it goes to the workers that serve that one.
            worker_id: a certain worker; None for any of the fleet.
        """
        exchange = self._exchange(
            request,
            request_id=secrets.token_hex(16),
            worker_id=worker_id,
            now=asyncio.get_running_loop().time(),
        )
        messages: asyncio.Queue[Msg] = asyncio.Queue(INBOX_MESSAGES)
        # nats-py counts its inboxes up: who has seen two of them would know the others.
        inbox = f"{self._connection.new_inbox()}{secrets.token_hex(16)}"

        async def take(message: Msg) -> None:
            # What does not fit shows as a gap in the numbering.
            with suppress(asyncio.QueueFull):
                messages.put_nowait(message)

        # The server reads one connection in order: the interest is there before the request.
        subscription = await self._connection.subscribe(inbox, cb=take)
        answer = Answer(self._connection, exchange, inbox, messages)
        try:
            await answer.send()
            yield answer
        finally:
            with suppress(TimeoutError, nats_errors.Error):
                async with asyncio.timeout(LEAVE_S):
                    await answer.cancel()
                    await subscription.unsubscribe()


@asynccontextmanager
async def open_client(
    url: str,
    *,
    timeout_ms: int | None = 30_000,
    attempts: int = 3,
    nobody_listens_grace_s: float = NOBODY_LISTENS_GRACE_S,
    caller: str | None = None,
    **options: Any,
) -> AsyncIterator[Client]:
    """A client on a connection of its own. Raises as `nats.connect` does.

    `timeout_ms`, `attempts`, `nobody_listens_grace_s` and `caller` are as `Client` says; `options`
    go to `nats.connect`: `user`, `password`, `token`, `user_credentials`, `tls`, `inbox_prefix`
    and so on.
    """
    connection = await nats.connect(url, **{"name": "trio-worker client", **options})
    try:
        yield Client(
            connection,
            timeout_ms=timeout_ms,
            attempts=attempts,
            nobody_listens_grace_s=nobody_listens_grace_s,
            caller=caller,
        )
    finally:
        with suppress(TimeoutError, nats_errors.Error):
            async with asyncio.timeout(LEAVE_S):
                await connection.flush()
        await connection.close()
