"""The inboxes of all requests of a gateway, below one subject that it listens on once.

A subscription a request would cost a round trip to the server each; so there is one for all, and a
message finds its request by the last token of its subject. Bounds: `MESSAGES_MAX` of one request
wait to be read; what comes on top is dropped, which shows as a gap in the numbering.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import trio

from trio_worker.ports import Broker, Message

MESSAGES_MAX = 8192
"""More than an answer brings while its caller may keep us waiting to send."""


class Inbox:
    """Where the answer to one request comes; made by `Inboxes.another`."""

    def __init__(self, inboxes: Inboxes) -> None:
        self._inboxes = inboxes
        self._token, self._messages = inboxes.open()

    @property
    def subject(self) -> str:
        return self._inboxes.subject_of(self._token)

    async def receive(self) -> Message:
        """The next message. Cancelled: nothing is lost."""
        return await self._messages.receive()

    def receive_nowait(self) -> Message:
        """The next message if it has come. Raises `trio.WouldBlock`."""
        return self._messages.receive_nowait()

    def move(self) -> None:
        """Have another subject: what is still said on the old one is heard by nobody."""
        self.close()
        self._token, self._messages = self._inboxes.open()

    def close(self) -> None:
        self._messages.close()
        self._inboxes.close(self._token)


class Inboxes:
    """Its state: the inboxes that are open, by their last token; one a request that runs."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._tokens = map(str, itertools.count())
        self._open: dict[str, trio.MemorySendChannel[Message]] = {}

    @contextmanager
    def another(self) -> Iterator[Inbox]:
        """A new inbox, for as long as the block runs."""
        inbox = Inbox(self)
        try:
            yield inbox
        finally:
            inbox.close()

    def open(self) -> tuple[str, trio.MemoryReceiveChannel[Message]]:
        token = next(self._tokens)
        self._open[token], receive = trio.open_memory_channel[Message](MESSAGES_MAX)
        return token, receive

    def close(self, token: str) -> None:
        self._open.pop(token).close()

    def subject_of(self, token: str) -> str:
        return f"{self._subject}.{token}"

    def deliver(self, message: Message) -> None:
        """The sink of the one subscription. What comes for a request that has ended is dropped."""
        send = self._open.get(message.subject.rpartition(".")[2])
        if send is not None:
            with suppress(trio.WouldBlock):
                send.send_nowait(message)


@asynccontextmanager
async def open_inboxes(broker: Broker) -> AsyncIterator[Inboxes]:
    """Listens while the block runs. Raises `ConfigError` if the server does not let us."""
    subject = broker.new_inbox()
    inboxes = Inboxes(subject)
    subscription = await broker.subscribe(f"{subject}.*", inboxes.deliver)
    try:
        yield inboxes
    finally:
        with trio.move_on_after(1.0, shield=True):
            await subscription.drain()
