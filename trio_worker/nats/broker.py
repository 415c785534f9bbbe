"""The broker port on nats-py, which runs in a trio-asyncio loop inside this context.

Owns the outbox and what empties it. Rules:

1. `publish` appends to the outbox and wakes one Trio task, the pump, which writes what has come
   together as one buffer: no task of asyncio runs for what the socket takes at once.
2. A message is written only while the connection stands and is not full; everything else waits
   in the outbox, where it is accounted for and can be discarded. What the connection's buffers
   hold is past the outbox and not yet at the server.
3. Nothing another client sends ends the connection, and nothing of ours makes the server end
   it. If it ends for good all the same, `wait_lost` says so.
4. No message, log line or `repr` contains a secret.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio_asyncio
from loguru import logger
from trio_util import RepeatedEvent

from trio_worker.exception_groups import sole_exceptions
from trio_worker.nats.address import parse_nats_url
from trio_worker.nats.connection import Connection
from trio_worker.nats.login import Identity, Login
from trio_worker.nats.outbox import Outbox
from trio_worker.nats.parcel import BODY_END, address
from trio_worker.nats.subscription import NatsSubscription, Sink, subscribe
from trio_worker.ports import BrokerStatistics, Message, Outlet

_PASS_BYTES = 64 * 1024
_PASS_MESSAGES = 256
"""What the pump writes between two chances for other tasks: whichever is reached first."""
SUBSCRIPTION_MESSAGES = 16_384
"""What one subscription may hold before newer messages are thrown away: more than the
smallest messages that one read (64 KiB) can bring, so only a stalled loop reaches it."""


@asynccontextmanager
async def open_nats_broker(
    url: str,
    *,
    name: str,
    login: Login | None = None,
    connect_timeout_s: float = 10.0,
    close_timeout_s: float = 2.0,
    reconnect_wait_s: float = 0.5,
    ping_interval_s: float = 15.0,
    outbox_limit_bytes: int = 64 * 1024 * 1024,
    subscription_limit: int = SUBSCRIPTION_MESSAGES,
    inbox_prefix: str = "_INBOX",
) -> AsyncIterator[NatsBroker]:
    """A connection to the server at `url`, known there as `name`, for as long as the block.

    Entering returns with a connection. It raises `BrokerUnavailable` if there is none after
    `connect_timeout_s`, and `ConfigError` as soon as it is clear that there never will be one:
    a bad URL or file, refused credentials, a certificate that does not hold. Once connected,
    it reconnects for ever, `reconnect_wait_s` apart; a server that has not answered for three
    times `ping_interval_s` is taken for gone.

    Leaving publishes what is in the outbox and closes, in at most `close_timeout_s` and one
    second more, also when cancelled. Without a connection it does not wait for one.

    `outbox_limit_bytes` bounds what is published through no outlet; `new_inbox` makes subjects
    that begin with `inbox_prefix` and a dot. Exceptions leave the block as they were raised in
    it: not wrapped, unless there are several.
    """
    address = parse_nats_url(url)
    identity = Identity(address, login or Login())
    with sole_exceptions():
        async with trio_asyncio.open_loop() as loop:
            # The default handler re-raises into the loop's nursery, and nats-py leaves
            # exceptions of its tasks unretrieved.
            loop.set_exception_handler(_log_asyncio)
            connection = Connection(address, identity, loop=loop)
            broker = NatsBroker(
                connection,
                outbox_limit_bytes=outbox_limit_bytes,
                subscription_limit=subscription_limit,
            )
            flushed = False
            try:
                async with _pumping(broker):
                    await connection.connect(
                        name=name,
                        timeout_s=connect_timeout_s,
                        reconnect_wait_s=reconnect_wait_s,
                        ping_interval_s=ping_interval_s,
                        inbox_prefix=inbox_prefix,
                    )
                    try:
                        yield broker
                    finally:
                        with trio.move_on_after(close_timeout_s, shield=True):
                            flushed = await broker.flush_if_standing()
            finally:
                with trio.move_on_after(1.0, shield=True):
                    await connection.close(in_order=flushed)
                broker.abandon()


@asynccontextmanager
async def _pumping(broker: NatsBroker) -> AsyncIterator[None]:
    """The pump runs in this block, also while it unwinds: what is said last has to leave too."""
    scope = trio.CancelScope(shield=True)

    async def pump() -> None:
        with scope:
            await broker.pump()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump)
        try:
            yield
        finally:
            scope.cancel()


class NatsBroker:
    """The port. Its state: the connection, the outbox, and what has become of the messages."""

    def __init__(
        self,
        connection: Connection,
        *,
        outbox_limit_bytes: int,
        subscription_limit: int,
    ) -> None:
        self.connection = connection
        self._outbox = Outbox(
            loose_limit_bytes=outbox_limit_bytes,
            max_payload=lambda: self.max_payload,
            on_put=self._wake_pump,
        )
        self._filled = trio.Event()
        """There is something in the outbox; set anew each time that the pump waits for it."""
        self._pumped = RepeatedEvent()
        """The pump has taken from the outbox what was there."""
        self._subscription_limit = subscription_limit
        self._published = 0
        self._dropped = 0

    @property
    def max_payload(self) -> int:
        return int(self.connection.client.max_payload)

    def new_inbox(self) -> str:
        # nats-py counts its inboxes up: who has seen two of them would know the others.
        return f"{self.connection.client.new_inbox()}{secrets.token_hex(16)}"

    def publish(self, message: Message) -> None:
        """As the port says. Raises `ValueError` for what is no subject or no header name."""
        if not self._outbox.publish(message):
            self.connection.quiet_log.warn(
                "outbox", "the outbox is full: dropping messages of no request"
            )

    def open_outlet(
        self, subject: str, *, reply: str | None = None, headers: Mapping[str, str]
    ) -> Outlet:
        """As the port says."""
        return self._outbox.open_share(address(subject, reply, headers))

    async def subscribe(
        self, subject: str, sink: Sink, *, group: str | None = None
    ) -> NatsSubscription:
        """As the port says; while there is no connection it waits for one.

        Cancelled: there is no subscription. Raises `ValueError` if `subject` is not one, and
        `ConfigError` if the server does not let us. If it takes its permission back later, or
        after a reconnection, `wait_lost` says so: a worker that is deaf must not look well.
        """
        return await subscribe(
            self.connection, subject, sink, group=group, messages_max=self._subscription_limit
        )

    async def flush(self) -> None:
        """As the port says. Waits while there is no connection. Cancelled: nothing is lost."""
        mark = self._outbox.mark()
        while not self._outbox.is_past(mark):
            await self._pumped.wait()
        await self.connection.round_trip()

    async def wait_lost(self) -> str:
        return await self.connection.wait_useless()

    def statistics(self) -> BrokerStatistics:
        connection = self.connection
        return BrokerStatistics(
            url=connection.where,
            connected=connection.stands,
            reconnects=int(connection.client.stats["reconnects"]),
            received=connection.received,
            published=self._published,
            dropped=self._dropped + self._outbox.dropped,
            unpublished_bytes=self._outbox.unpublished_bytes,
            slow_consumers=connection.slow_consumers,
        )

    # --- for open_nats_broker -------------------------------------------------------------

    async def pump(self) -> None:
        """Write what is in the outbox, in order, while the connection takes it. Until cancelled."""
        while True:
            if not len(self._outbox):
                self._filled = trio.Event()
                await self._filled.wait()
            if not self.connection.is_writable:
                await self.connection.wait_writable()
            self.connection.client.write(self._take_frames())
            self._pumped.set()
            if len(self._outbox):
                await trio.lowlevel.checkpoint()

    def _wake_pump(self) -> None:
        self._filled.set()

    def _take_frames(self) -> bytes:
        """What one pass writes, as it is on the wire."""
        frames: list[bytes] = []
        max_payload, room_bytes = self.max_payload, _PASS_BYTES
        for _ in range(_PASS_MESSAGES):
            if room_bytes <= 0 or (parcel := self._outbox.take()) is None:
                break
            if parcel.payload_bytes > max_payload:
                # The limit has shrunk with a reconnection.
                self._dropped += 1
                self.connection.quiet_log.warn(
                    "size", "dropping a message over the server's new limit"
                )
                continue
            frames += (parcel.head, parcel.body, BODY_END)
            room_bytes -= parcel.size
            self._published += 1
        return b"".join(frames)

    async def flush_if_standing(self) -> bool:
        """Flush; False, at once, if there is no connection."""
        if self.connection.stands:
            await self.flush()
            return True
        return False

    def abandon(self) -> None:
        """Count what is left as dropped, and say so."""
        if len(self._outbox):
            self._dropped += len(self._outbox)
            logger.warning(
                "{} messages could not be sent before the connection was closed",
                len(self._outbox),
            )


def _log_asyncio(_loop: object, context: dict[str, Any]) -> None:
    logger.debug("asyncio: {} {!r}", context.get("message"), context.get("exception"))
