"""Calling a worker from Python, on Trio.

    async with open_client("nats://127.0.0.1:4222") as client:
        async with client.ask({"prompt": "Hello", "stream": True}) as answer:
            async for chunk in answer:
                print(chunk.text, end="", flush=True)

An `Answer` is an asynchronous iterator of the messages of one answer. An error reply is raised as
the class of `trio_worker.errors` that belongs to its code.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from trio_worker.adapters.nats_broker import Login, open_nats_broker
from trio_worker.core import subjects
from trio_worker.core.wire import native
from trio_worker.errors import BY_CODE, InternalError, WorkerError
from trio_worker.ports import Broker, Message

INBOX_MESSAGES = 8192
"""Messages of one answer that may wait to be read: more than any answer has by default."""
NOBODY_LISTENS_RETRY_S = 0.25
CANCEL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One message of an answer."""

    text: str
    finish_reason: str | None
    usage: Mapping[str, Any] | None
    """With the last message: token counts as OpenAI names them."""
    worker: Mapping[str, Any] | None
    """With the last message: what the worker says about how it served the request."""
    body: Mapping[str, Any]
    """The whole message."""
    headers: Mapping[str, str]


class Answer:
    """The answer to one request, while it arrives."""

    def __init__(
        self, broker: Broker, receive: trio.MemoryReceiveChannel[Message], first: Message | None
    ) -> None:
        self._broker = broker
        self._receive = receive
        self._first = first
        self._next_sequence = 0
        self.control_subject: str | None = None
        """Known from the first message on; publishing `cancel` there ends the request."""
        self.ended = False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Chunk:
        """The next message. Raises the `WorkerError` of an error reply.

        Cancelled: nothing is lost. A gap in the numbering, which core NATS allows, is an
        `InternalError`.
        """
        if self.ended:
            raise StopAsyncIteration
        message, self._first = self._first or await self._receive.receive(), None
        self.control_subject = message.reply or self.control_subject
        terminal = message.headers.get(native.HEADER_TERMINAL)
        self.ended = terminal is not None
        body = msgspec.json.decode(message.body, type=dict[str, Any])
        if terminal == "error":
            raise _error(body)
        sequence = int(message.headers.get(native.HEADER_SEQUENCE, -1))
        if sequence != self._next_sequence:
            raise InternalError(
                f"message {self._next_sequence} of the answer was lost; {sequence} came instead"
            )
        self._next_sequence += 1
        return _chunk(body, message.headers)

    async def text(self) -> str:
        """The whole text; reads to the end."""
        return "".join([chunk.text async for chunk in self])

    def cancel(self) -> None:
        """Ask the worker to end the request; a terminal message follows if it was not too late."""
        if self.control_subject is not None:
            self._broker.publish(Message(subject=self.control_subject, body=b"cancel"))


class Client:
    """Asks over one broker connection; any number of answers at a time."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    @asynccontextmanager
    async def ask(
        self, request: Mapping[str, Any], *, worker_id: str | None = None
    ) -> AsyncIterator[Answer]:
        """Send a request; yields its answer once a worker has taken it.

        While no worker listens the request is sent again: bound that with a cancel scope of your
        own. Leaving the context before the end, also by cancellation, cancels the request at the
        worker.

        Args:
            request: the fields of the wire format, such as `messages` or `prompt`.
            worker_id: a certain worker; None for any of the fleet.
        """
        subject = subjects.direct(worker_id) if worker_id else subjects.shared("")[0]
        send, receive = trio.open_memory_channel[Message](INBOX_MESSAGES)
        inbox = self._broker.new_inbox()
        request_id = request.get("request_id") or request.get("requestId") or secrets.token_hex(12)

        def take(message: Message) -> None:
            # What does not fit shows as a gap in the numbering.
            with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                send.send_nowait(message)

        async with send, receive:
            subscription = await self._broker.subscribe(inbox, take)
            answer: Answer | None = None
            try:
                body = msgspec.json.encode(_with_id(request, request_id))
                first = await self._send(subject, body, inbox, receive)
                answer = Answer(self._broker, receive, first)
                answer.control_subject = first.reply
                yield answer
            finally:
                with trio.move_on_after(CANCEL_S, shield=True):
                    if answer is None or not answer.ended:
                        # By its id rather than by the control subject, which a request that is
                        # not streamed has not told us yet.
                        cancel = msgspec.json.encode({"request_id": request_id})
                        self._broker.publish(Message(subject=subjects.CANCEL, body=cancel))
                        await self._broker.flush()
                    await subscription.drain()

    async def _send(
        self,
        subject: str,
        body: bytes,
        inbox: str,
        receive: trio.MemoryReceiveChannel[Message],
    ) -> Message:
        """The first message of the answer; sends again while the server knows of no worker."""
        while True:
            self._broker.publish(Message(subject=subject, body=body, reply=inbox))
            message = await receive.receive()
            if message.headers.get("Status") != "503":
                return message
            await trio.sleep(NOBODY_LISTENS_RETRY_S)


@asynccontextmanager
async def open_client(
    url: str, *, name: str = "trio-worker client", login: Login | None = None
) -> AsyncIterator[Client]:
    """A client on a connection of its own. Raises as `open_nats_broker` does."""
    async with open_nats_broker(url, name=name, login=login or Login()) as broker:
        yield Client(broker)


def _with_id(request: Mapping[str, Any], request_id: str) -> Mapping[str, Any]:
    known = "request_id" in request or "requestId" in request
    return request if known else {"request_id": request_id, **request}


def _error(body: Mapping[str, Any]) -> WorkerError:
    fields = body.get("error") or {}
    cls = BY_CODE.get(fields.get("code", ""), InternalError)
    error = cls(
        fields.get("message", "an error without a message"),
        details=fields.get("details"),
        retryable=fields.get("retryable"),
    )
    error.retry_after_ms = fields.get("retry_after_ms")
    return error


def _chunk(body: Mapping[str, Any], headers: Mapping[str, str]) -> Chunk:
    choice = body["choices"][0]
    content = choice.get("delta") or choice.get("message") or {}
    return Chunk(
        text=choice.get("text") or content.get("content") or "",
        finish_reason=choice.get("finish_reason"),
        usage=body.get("usage"),
        worker=body.get("worker"),
        body=body,
        headers=headers,
    )
