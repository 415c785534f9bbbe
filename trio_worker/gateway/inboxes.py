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


class Inboxes:
    """Its state: the inboxes that are open, by their last token; one a request that runs."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._tokens = map(str, itertools.count())
        self._open: dict[str, trio.MemorySendChannel[Message]] = {}

    @contextmanager
    def another(self) -> Iterator[tuple[str, trio.MemoryReceiveChannel[Message]]]:
        """The subject of a new inbox, and what comes on it while the block runs."""
        token = next(self._tokens)
        send, receive = trio.open_memory_channel[Message](MESSAGES_MAX)
        self._open[token] = send
        try:
            with send, receive:
                yield f"{self._subject}.{token}", receive
        finally:
            del self._open[token]

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
