"""JetStream for whoever has a connection: requests, receipts, reading back.

One subscription hears the replies to all requests, below an inbox of its own; a reply finds who
asked by the last token of its subject. Nothing here is tried again unless it says so, and nothing
is kept once the call is over. Bound: one reply, or one batch of them, for each call that waits.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import msgspec
import trio

from trio_worker.jetstream import api
from trio_worker.jetstream.api import Fault, JetStreamError, Json, PubAck, Stored
from trio_worker.jetstream.streams import faults_of
from trio_worker.ports import Broker, Message

ANSWER_S = 2.0
"""The longest that an answer may take; what takes longer has most likely not been permitted."""
LEAVE_S = 0.5
"""The longest that ending an interest may take."""
BATCH_MAX = 256
"""Messages of one `read`."""
LAST_OF_MAX = 512
"""Subjects of one `last_of`; the server takes 1024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Part of a stream."""

    messages: tuple[Stored, ...]
    next_sequence: int
    """Where to read on."""
    pending: int
    """How many matching messages were behind these."""


class JetStream:
    """Made by `open_jetstream`. Its state: who waits for which reply."""

    def __init__(self, broker: Broker, inbox: str) -> None:
        self.broker = broker
        self._inbox = inbox
        self._tokens = map(str, itertools.count(1))
        self._waiting: dict[str, trio.MemorySendChannel[Message]] = {}
        """One for each call that waits."""

    # --- asking ---------------------------------------------------------------------------

    async def request(
        self,
        subject: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        within_s: float = ANSWER_S,
    ) -> bytes:
        """The body of the answer. Raises `JetStreamError`.

        While the connection is down it waits, however long that is: what was published before is
        in the outbox still. Cancelled: the request may have been carried out.
        """
        with self._replies(1) as (inbox, replies):
            self.broker.publish(
                Message(subject=subject, body=body, reply=inbox, headers=headers or {})
            )
            return api.checked(await self._receive(replies, subject, within_s), subject)

    async def publish(
        self,
        subject: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        tries: int = 1,
        within_s: float = ANSWER_S,
    ) -> PubAck:
        """Store a message; returns the stream's receipt.

        The receipt comes to an inbox of this object, never to a caller's. More than one of `tries`
        are for what may be said twice: with `Nats-Msg-Id`, or with
        `Nats-Expected-Last-Subject-Sequence`, whose refusal then means that it is stored, by
        whomever. Raises `JetStreamError`, and `MessageTooLarge` as the broker does. Cancelled: it
        may have been stored.
        """
        for left in reversed(range(tries)):
            try:
                reply = await self.request(subject, body, headers, within_s=within_s)
                return msgspec.json.decode(reply, type=PubAck)
            except JetStreamError as error:
                if error.fault is not Fault.NO_ANSWER or not left:
                    raise
        raise AssertionError("a publish is tried at least once")

    # --- reading --------------------------------------------------------------------------

    async def get_last(self, stream: str, subject: str) -> Stored | None:
        """The last message of `subject`; None if there is none. Raises `JetStreamError`."""
        asked = api.direct_get(stream, subject)
        with self._replies(1) as (inbox, replies):
            self.broker.publish(Message(subject=asked, reply=inbox))
            return _stored(await self._receive(replies, asked, ANSWER_S), asked)

    async def read(
        self, stream: str, *, subject: str, sequence: int = 1, messages: int = BATCH_MAX
    ) -> Batch:
        """Up to `messages` of a stream from `sequence` on, of those on `subject`, a pattern.

        Nothing is left on the server, so a reader may stop and go on as it likes. An empty batch
        says that there is nothing more now. Raises `JetStreamError`.
        """
        body = api.batch_body(subject=subject, sequence=sequence, messages=messages)
        found, pending = await self._get_many(stream, body, messages)
        last = found[-1].sequence if found else sequence - 1
        return Batch(messages=tuple(found), next_sequence=last + 1, pending=pending)

    async def last_of(self, stream: str, subjects: Sequence[str]) -> dict[str, Stored]:
        """The last message of each of these subjects that has one, by subject.

        Raises `JetStreamError`. `LAST_OF_MAX` of them are asked for at a time.
        """
        found: dict[str, Stored] = {}
        for start in range(0, len(subjects), LAST_OF_MAX):
            some = list(subjects[start : start + LAST_OF_MAX])
            some_found, _ = await self._get_many(stream, api.last_of_body(some), len(some))
            found.update((each.subject, each) for each in some_found)
        return found

    async def _get_many(self, stream: str, body: bytes, messages: int) -> tuple[list[Stored], int]:
        asked = api.direct_get(stream)
        found: list[Stored] = []
        pending = 0
        with self._replies(messages + 1) as (inbox, replies):
            self.broker.publish(Message(subject=asked, body=body, reply=inbox))
            while True:
                message = await self._receive(replies, asked, ANSWER_S)
                if message.headers.get("Status") == "204":
                    # The end of the batch.
                    return found, int(message.headers.get("Nats-Num-Pending") or pending)
                one = _stored(message, asked)
                if one is None:
                    return found, 0
                found.append(one)
                pending = int(message.headers.get("Nats-Num-Pending") or 0)

    # --- streams and consumers ------------------------------------------------------------

    async def stream_info(self, stream: str, *, subjects: str | None = None) -> api.StreamInfo:
        """What a stream is and holds, with a count by subject of those that match `subjects`.

        Raises `JetStreamError`, also if there is none.
        """
        body = b"" if subjects is None else msgspec.json.encode({"subjects_filter": subjects})
        reply = await self.request(api.stream_info(stream), body)
        return msgspec.json.decode(reply, type=api.StreamInfo)

    async def consumer_info(self, stream: str, consumer: str) -> api.ConsumerInfo:
        """What a consumer is and has before it. Raises `JetStreamError`, also if there is none."""
        reply = await self.request(api.consumer_info(stream, consumer))
        return msgspec.json.decode(reply, type=api.ConsumerInfo)

    async def ensure_stream(self, config: Json) -> api.StreamInfo:
        """The stream of this name, made if it is missing, and never changed.

        Raises `JetStreamError`: if it is there with another retention, other subjects or another
        storage, which cannot be what `config` is for, or if a right is missing.
        """
        name = str(config["name"])
        found = await self._find_stream(name) or await self._create_stream(name, config)
        if faults := faults_of(found.config, config):
            raise JetStreamError(
                Fault.OTHER_CONFIG,
                f"the stream {name} cannot be used as it is: {'; '.join(faults)}. "
                "It is never changed here: change it, remove it, or name another one in "
                "nats.jetstream",
            )
        return found

    async def _find_stream(self, name: str) -> api.StreamInfo | None:
        try:
            return await self.stream_info(name)
        except JetStreamError as error:
            if error.fault is not Fault.STREAM_MISSING:
                raise
        return None

    async def _create_stream(self, name: str, config: Json) -> api.StreamInfo:
        # A server before 2.11: what waits there waits as long as the stream says.
        plain = {key: config[key] for key in config if key != "allow_msg_ttl"}
        await self._create(api.stream_create(name), config, plain)
        # Somebody else may have been quicker, with limits of another opinion.
        return await self.stream_info(name)

    async def _create(self, subject: str, *bodies: Json) -> None:
        """Make it unless it is there, as the first of `bodies` says of which all is known there."""
        for left, body in zip(reversed(range(len(bodies))), bodies, strict=True):
            try:
                await self.request(subject, msgspec.json.encode(body))
            except JetStreamError as error:
                if error.code == api.UNKNOWN_FIELD and left:
                    continue
                if error.fault is not Fault.OTHER_CONFIG:
                    raise
            return

    async def ensure_consumer(self, stream: str, config: Json) -> None:
        """The durable consumer of this name, made if it is missing, and never changed.

        Raises `JetStreamError`: if it is there for other subjects, or a right is missing.
        """
        name = str(config["durable_name"])
        # A server before 2.12: its consumers serve whoever asked first.
        plain = {key: config[key] for key in config if not key.startswith("priority_")}
        body: Json = {"stream_name": stream, "config": config, "action": "create"}
        await self._create(api.consumer_create(stream, name), body, body | {"config": plain})
        found = (await self.consumer_info(stream, name)).config
        if found.get("filter_subject") != config["filter_subject"]:
            raise JetStreamError(
                Fault.OTHER_CONFIG,
                f"the consumer {name} of the stream {stream} is for "
                f"{found.get('filter_subject')}, and would have to be for "
                f"{config['filter_subject']}: remove it",
            )

    async def delete_message(self, stream: str, sequence: int) -> None:
        """Take a message out of a stream, such as a job that nobody has begun.

        Raises `JetStreamError`, also if it is not there any more.
        """
        await self.request(api.message_delete(stream), msgspec.json.encode({"seq": sequence}))

    # --- pulling --------------------------------------------------------------------------

    @asynccontextmanager
    async def open_pulls(self) -> AsyncIterator[Pulls]:
        """Where messages come that are pulled, on an inbox that nothing else keeps alive.

        Leaving the block ends the interest, and with it every pull; what was under way then is in
        `Pulls.left`. Also when cancelled, in at most `LEAVE_S`.
        """
        send, receive = trio.open_memory_channel[Message](PULLED_MAX)
        pulls = Pulls(self.broker, f"{self._inbox}.{next(self._tokens)}", receive)

        def take(message: Message) -> None:
            with suppress(trio.WouldBlock):
                send.send_nowait(message)

        subscription = await self.broker.subscribe(pulls.inbox, take)
        try:
            yield pulls
        finally:
            with trio.move_on_after(LEAVE_S, shield=True):
                await subscription.drain()
            pulls.close()

    # --- the replies ----------------------------------------------------------------------

    @contextmanager
    def _replies(self, most: int) -> Iterator[tuple[str, trio.MemoryReceiveChannel[Message]]]:
        """A subject for up to `most` replies, for as long as the block."""
        token = next(self._tokens)
        self._waiting[token], receive = trio.open_memory_channel[Message](most)
        try:
            yield f"{self._inbox}.r.{token}", receive
        finally:
            del self._waiting[token]

    def deliver(self, message: Message) -> None:
        """The sink of all replies; what nobody waits for any more is dropped."""
        send = self._waiting.get(message.subject.rpartition(".")[2])
        if send is not None:
            with suppress(trio.WouldBlock):
                send.send_nowait(message)

    async def _receive(
        self, replies: trio.MemoryReceiveChannel[Message], asked: str, within_s: float
    ) -> Message:
        lines = self.broker.statistics().reconnects
        while True:
            with trio.move_on_after(within_s):
                return await replies.receive()
            now = self.broker.statistics()
            if now.connected and now.reconnects == lines:
                raise api.no_answer(asked)
            # What waited for the line has left with it, or will.
            lines = now.reconnects


PULLED_MAX = 64
"""Messages and words about pulls that may wait to be taken: each pull brings one of each."""


class Pulls:
    """Pulls that share one inbox. Its state: what has come and was not taken yet."""

    def __init__(
        self, broker: Broker, inbox: str, receive: trio.MemoryReceiveChannel[Message]
    ) -> None:
        self.inbox = inbox
        self.left: list[Message] = []
        """After the end: what came, and was not received. Bound: `PULLED_MAX`."""
        self._broker = broker
        self._receive = receive

    def ask(
        self, stream: str, consumer: str, *, priority: int, expires_s: float | None = None
    ) -> None:
        """Pull one message; without a time, one that is there now or none."""
        body = api.pull_body(priority=priority, expires_s=expires_s, no_wait=expires_s is None)
        subject = api.next_message(stream, consumer)
        self._broker.publish(Message(subject=subject, body=body, reply=self.inbox))

    async def receive(self) -> Message:
        """The next message or word about a pull. Cancelled: nothing is lost."""
        return await self._receive.receive()

    def close(self) -> None:
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                message = self._receive.receive_nowait()
                if api.delivery_of(message.reply) is not None:
                    self.left.append(message)


def _stored(message: Message, asked: str) -> Stored | None:
    """The message that an answer to a direct get brings; None if there is none such."""
    status = message.headers.get("Status")
    if status == "404":
        return None
    if status == "503":
        raise api.nobody(asked)
    if status is not None and "Nats-Sequence" not in message.headers:
        text = message.headers.get("Description", "")
        raise JetStreamError(Fault.OTHER, f"{asked}: {status} {text}")
    return api.stored(message)


@asynccontextmanager
async def open_jetstream(broker: Broker, *, inbox: str | None = None) -> AsyncIterator[JetStream]:
    """JetStream over this connection, for as long as the block.

    Replies come below `inbox`, or below a new one. Raises `ConfigError` if the server does not let
    us listen there. Calls that wait when the block is left wait on for nothing: leave none.
    """
    inbox = inbox or broker.new_inbox()
    jetstream = JetStream(broker, inbox)
    subscription = await broker.subscribe(f"{inbox}.r.*", jetstream.deliver)
    try:
        yield jetstream
    finally:
        with trio.move_on_after(LEAVE_S, shield=True):
            await subscription.drain()
