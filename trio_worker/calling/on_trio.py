"""Calling a worker from Python, on Trio. `client_asyncio` is the same for asyncio.

    async with open_client("nats://127.0.0.1:4222") as client:
        async with client.ask({"prompt": "Hello", "stream": True}) as answer:
            async for chunk in answer:
                print(chunk.text, end="", flush=True)

        whole = await client.complete({"prompt": "Hello"})
        print(whole.text, whole.usage)

An error reply is raised as the class of `trio_worker.errors` that belongs to its code. One that
may be retried is retried first: at once where another worker may have room, then after the time
it names, within the request's deadline, and only while no text has been handed out.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from loguru import logger

from trio_worker.calling.any_loop import (
    INBOX_MESSAGES,
    LEAVE_S,
    AnswerOnAnyLoop,
    ClientOnAnyLoop,
)
from trio_worker.calling.attempts import NOBODY_LISTENS_GRACE_S, Chunk, Exchange, Persistence
from trio_worker.errors import MessageTooLarge, PayloadTooLarge
from trio_worker.nats.broker import open_nats_broker
from trio_worker.nats.login import Login
from trio_worker.ports import Broker, Message

__all__ = ["Answer", "Chunk", "Client", "Login", "open_client"]

# A caller's standard error is not ours; `logger.enable("trio_worker")` shows what the connection
# is doing.
logger.disable("trio_worker")


class Answer(AnswerOnAnyLoop):
    """The answer to one request, while it arrives: an asynchronous iterator of its messages."""

    def __init__(
        self,
        broker: Broker,
        exchange: Exchange,
        inbox: str,
        receive: trio.MemoryReceiveChannel[Message],
    ) -> None:
        super().__init__(exchange)
        self._broker = broker
        self._inbox = inbox
        self._receive = receive

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
        while True:
            if exchange.resend_at is not None:
                await trio.sleep_until(exchange.resend_at)
                self.send()
            with trio.move_on_at(exchange.gives_up_at) as too_late:
                message = await self._receive.receive()
            if too_late.cancelled_caught:
                raise exchange.give_up()
            chunk = exchange.take(message.body, message.headers, message.reply, trio.current_time())
            if chunk is not None:
                return chunk

    def cancel(self) -> None:
        """Ask the worker to end the request; `RequestCancelled` follows if it was not too late."""
        if (cancel := self._exchange.cancel_message()) is not None:
            subject, body = cancel
            self._broker.publish(Message(subject=subject, body=body))

    def send(self) -> None:
        """Send the request now; `ask` does it first, and then the iteration where it must."""
        body = self._exchange.body(trio.current_time())
        try:
            self._broker.publish(
                Message(subject=self._exchange.subject, body=body, reply=self._inbox)
            )
        except MessageTooLarge as exc:
            raise PayloadTooLarge(
                f"the request has {exc.size} bytes; the NATS server takes {exc.limit}",
                details={"bytes": exc.size, "limit": exc.limit},
            ) from exc


class Client(ClientOnAnyLoop):
    """Asks over one broker connection; any number of answers at a time.

    Args:
        timeout_ms: for requests that name none; None leaves it to the worker, and the wait to a
            cancel scope of your own.
        attempts: how often a request is sent in all while the answer is an error that may be
            retried; 1 is never again.
        nobody_listens_grace_s: for how long it is sent again where no worker listens, as while
            one restarts, within the deadline; 0 is never again.
        caller: whose requests these are; they go to the subject that names it, on which the
            server may hold an account to one caller. None: to those of everybody.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        timeout_ms: int | None = 30_000,
        attempts: int = 3,
        nobody_listens_grace_s: float = NOBODY_LISTENS_GRACE_S,
        caller: str | None = None,
    ) -> None:
        self._broker = broker
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
        worker. Raises `ConfigError` if the server does not let this account listen on its inbox.

        Args:
            request: the fields of the wire format, such as `messages` or `prompt`. With a
                `model`, it goes to the workers that serve that one.
            worker_id: a certain worker; None for any of the fleet.
        """
        exchange = self._exchange(
            request,
            request_id=secrets.token_hex(16),
            worker_id=worker_id,
            now=trio.current_time(),
        )
        send, receive = trio.open_memory_channel[Message](INBOX_MESSAGES)
        inbox = self._broker.new_inbox()

        def take(message: Message) -> None:
            # What does not fit shows as a gap in the numbering.
            with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                send.send_nowait(message)

        async with send, receive:
            with trio.move_on_at(exchange.gives_up_at) as too_late:
                subscription = await self._broker.subscribe(inbox, take)
            if too_late.cancelled_caught:
                raise exchange.give_up()
            answer = Answer(self._broker, exchange, inbox, receive)
            try:
                answer.send()
                yield answer
            finally:
                with trio.move_on_after(LEAVE_S, shield=True):
                    if exchange.cancel_message() is not None:
                        answer.cancel()
                        await self._broker.flush()
                    await subscription.drain()


@asynccontextmanager
async def open_client(
    url: str,
    *,
    name: str = "trio-worker client",
    login: Login | None = None,
    inbox_prefix: str = "_INBOX",
    timeout_ms: int | None = 30_000,
    attempts: int = 3,
    nobody_listens_grace_s: float = NOBODY_LISTENS_GRACE_S,
    caller: str | None = None,
) -> AsyncIterator[Client]:
    """A client on a connection of its own. Raises as `open_nats_broker` does.

    `timeout_ms`, `attempts`, `nobody_listens_grace_s` and `caller` are as `Client` says. Answers
    come to subjects that begin with `inbox_prefix` and a dot: where every caller has a prefix of
    its own, it goes with `nats.reply_prefixes` of the workers and with the server's permissions.
    """
    async with open_nats_broker(url, name=name, login=login, inbox_prefix=inbox_prefix) as broker:
        yield Client(
            broker,
            timeout_ms=timeout_ms,
            attempts=attempts,
            nobody_listens_grace_s=nobody_listens_grace_s,
            caller=caller,
        )
