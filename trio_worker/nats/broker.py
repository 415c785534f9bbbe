"""The broker port on nats-py, which runs in a trio-asyncio loop inside this context.

Owns the connection, its loop and the outbox. Rules:

1. The border between Trio and asyncio is crossed once per batch: `publish` appends to the
   outbox and wakes one asyncio task, the pump.
2. nats-py gets a message only while it is connected; everything else waits in the outbox,
   where it is accounted for and can be discarded. At most `_PENDING_BYTES` and the socket's
   buffers are past the outbox and not yet at the server.
3. Nothing another client sends ends the connection, and nothing of ours makes the server end
   it. If it ends for good all the same, `wait_lost` says so.
4. No message, log line or `repr` contains a secret.
"""

# ruff: noqa: SLF001 - three classes that are one mechanism, and nats-py's own parts

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import trio
import trio_asyncio
from loguru import logger
from nats import errors as nats_errors
from nats.aio.msg import Msg
from trio_asyncio import aio_as_trio

from trio_worker.errors import BrokerUnavailable, ConfigError, StopWorker
from trio_worker.exception_groups import sole_exceptions
from trio_worker.nats.address import NatsAddress, parse_nats_url
from trio_worker.nats.login import Identity, Login
from trio_worker.nats.mended_client import MendedClient
from trio_worker.nats.outbox import Outbox
from trio_worker.ports import BrokerStatistics, Message, Outlet

T = TypeVar("T")
Sink = Callable[[Message], None]

_ATTEMPT_TIMEOUT_S = 2.0
"""For each of: connecting, the server's greeting, its answer to our credentials."""
_PENDING_BYTES = 256 * 1024
"""What nats-py may hold unwritten before it makes the pump wait."""
_PUMP_BATCH = 64
"""Messages between two chances for nats-py to write."""
_SUBSCRIPTION_MESSAGES = 16_384
"""What one subscription may hold before newer messages are thrown away: more than the
smallest messages that one read (64 KiB) can bring, so only a stalled loop reaches it."""
_SUBSCRIPTION_BYTES = 64 * 1024 * 1024
_DRAIN_S = 5.0
_ABORT_GRACE_S = 0.25
_QUIET_S = 5.0
"""At most one log line of a kind in this time."""
_MAY_NOT_SUBSCRIBE = re.compile(r'permissions violation for subscription to "([^"]*)"')
"""As the parser hands it on, in lower case."""


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
    subscription_limit: int = _SUBSCRIPTION_MESSAGES,
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
            broker = NatsBroker(
                address,
                identity,
                loop=loop,
                outbox_limit_bytes=outbox_limit_bytes,
                subscription_limit=subscription_limit,
            )
            try:
                await broker._connect(
                    name,
                    timeout_s=connect_timeout_s,
                    wait_s=reconnect_wait_s,
                    ping_interval_s=ping_interval_s,
                    inbox_prefix=inbox_prefix,
                )
                yield broker
            finally:
                with trio.move_on_after(close_timeout_s + 1.0, shield=True):
                    await broker._close(close_timeout_s)


class NatsBroker:
    """The port. Its state: nats-py's client, the outbox, the pump, and the tasks under way."""

    def __init__(
        self,
        address: NatsAddress,
        identity: Identity,
        *,
        loop: Any,
        outbox_limit_bytes: int,
        subscription_limit: int,
    ) -> None:
        self._address = address
        self._identity = identity
        self._loop = loop
        self._subscription_limit = subscription_limit
        self._client = MendedClient(identity.wants_tls, self._on_lost)
        self._log = _QuietLog(address.bare)
        self._filled = asyncio.Event()
        """There may be something to pump."""
        self._outbox = Outbox(
            loose_limit_bytes=outbox_limit_bytes,
            max_payload=lambda: self.max_payload,
            on_put=self._filled.set,
        )
        self._moved = asyncio.Event()
        """The pump has emptied the outbox once more."""
        self._up = asyncio.Event()
        """The connection stands, and the server knows our subscriptions."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._lost = trio.Event()
        self._lost_reason = ""
        self._connect_scope: trio.CancelScope | None = None
        self._refusal: StopWorker | None = None
        self._subscriptions: set[NatsSubscription] = set()
        """Those that have not ended."""
        self._last_failure = "no answer"
        self._published = 0
        self._received = 0
        self._dropped = 0
        self._slow_consumers = 0

    @property
    def max_payload(self) -> int:
        return int(self._client.max_payload)

    def new_inbox(self) -> str:
        # nats-py counts its inboxes up: who has seen two of them would know the others.
        return f"{self._client.new_inbox()}{secrets.token_hex(16)}"

    def publish(self, message: Message) -> None:
        """As the port says. Raises `ValueError` for what is no subject or no header name."""
        if not self._outbox.publish(message):
            self._log.warning("outbox", "the outbox is full: dropping messages of no request")

    def open_outlet(self) -> Outlet:
        return self._outbox.open_share()

    async def subscribe(
        self, subject: str, sink: Sink, *, group: str | None = None
    ) -> NatsSubscription:
        """As the port says; while there is no connection it waits for one.

        Cancelled: there is no subscription. Raises `ValueError` if `subject` is not one, and
        `ConfigError` if the server does not let us. If it takes its permission back later, or
        after a reconnection, `wait_lost` says so: a worker that is deaf must not look well.
        """
        subscription = NatsSubscription(self, sink)
        try:
            await self._run(lambda: subscription._open(subject, group))
        except nats_errors.BadSubjectError as exc:
            raise ValueError(f"{subject!r} or {group!r} cannot be subscribed to") from exc
        except BaseException:
            subscription._forget()
            raise
        return subscription

    async def flush(self) -> None:
        """As the port says. Waits while there is no connection. Cancelled: nothing is lost."""
        mark = self._outbox.mark()

        async def flushed() -> None:
            while not self._outbox.is_past(mark):
                self._moved.clear()
                await self._moved.wait()
            await self._round_trip()

        await self._run(flushed)

    async def wait_lost(self) -> str:
        await self._lost.wait()
        return self._lost_reason

    def statistics(self) -> BrokerStatistics:
        return BrokerStatistics(
            url=self._address.bare,
            connected=self._up.is_set(),
            reconnects=int(self._client.stats["reconnects"]),
            received=self._received,
            published=self._published,
            dropped=self._dropped + self._outbox.dropped,
            unpublished_bytes=self._outbox.unpublished_bytes,
            slow_consumers=self._slow_consumers,
        )

    # --- its life, called by open_nats_broker ---------------------------------------------

    async def _connect(
        self,
        name: str,
        *,
        timeout_s: float,
        wait_s: float,
        ping_interval_s: float,
        inbox_prefix: str,
    ) -> None:
        """Return once connected and start the pump. Raises as `open_nats_broker` says."""
        where = self._address.bare

        async def connected() -> None:
            await self._client.connect(
                where,
                name=name,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                lame_duck_mode_cb=self._on_lame_duck,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=wait_s,
                connect_timeout=min(_ATTEMPT_TIMEOUT_S, timeout_s),
                ping_interval=ping_interval_s,
                max_outstanding_pings=2,
                pending_size=_PENDING_BYTES,
                inbox_prefix=inbox_prefix,
                **self._identity.options(),
            )
            if self._client.is_connected:
                self._up.set()
            await self._up.wait()

        with trio.move_on_after(timeout_s) as self._connect_scope:
            await self._run(connected)
        self._connect_scope = None
        if self._refusal is not None:
            raise self._refusal
        if not self._up.is_set():
            raise BrokerUnavailable(
                f"NATS at {where} could not be reached: tried for {timeout_s:g} s, and the last"
                f" attempt failed with: {self._last_failure}."
                " Start a nats-server there, or change nats.url."
            )
        logger.info("connected to NATS at {}", where)
        self._task(self._pump())

    async def _close(self, timeout_s: float) -> None:
        """Publish what is left, close the connection, end the pump. Bounded; never raises."""
        flushed = False
        if self._up.is_set():
            with trio.move_on_after(timeout_s) as scope:
                await self.flush()
            flushed = not scope.cancelled_caught
        self._closing = True
        await aio_as_trio(self._disconnect, loop=self._loop)(
            grace_s=_ABORT_GRACE_S if flushed else 0.0
        )
        if len(self._outbox):
            self._dropped += len(self._outbox)
            logger.warning(
                "{} messages could not be sent before the connection was closed",
                len(self._outbox),
            )

    async def _disconnect(self, *, grace_s: float) -> None:
        """In asyncio: close in order for `grace_s`, then abort; end what is still under way."""
        client = self._client
        client.options["allow_reconnect"] = False
        closing = self._task(client.close())
        if grace_s:
            await asyncio.wait({closing}, timeout=grace_s)
        client.abort()
        await asyncio.wait({closing}, timeout=_ABORT_GRACE_S)
        client.release_waiters()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_ABORT_GRACE_S)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run asyncio code from Trio. Cancelled: returns at once, and tells it to end.

        nats-py swallows cancellation in places, so waiting for its end would take its time.
        """
        task = self._task(work())
        try:
            await aio_as_trio(asyncio.wait, loop=self._loop)({task})
        finally:
            task.cancel()
        return task.result()

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task: asyncio.Task[T] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: whoever waited has it, or has left

    # --- asyncio's side ------------------------------------------------------------------

    async def _pump(self) -> None:
        """Hand the outbox to nats-py while connected. Ends when cancelled by `_disconnect`."""
        client = self._client
        while not self._closing:
            await self._filled.wait()
            await self._up.wait()
            for _ in range(_PUMP_BATCH):
                if not client.is_connected or (parcel := self._outbox.take()) is None:
                    break
                if parcel.payload_bytes > client.max_payload:
                    # The limit has shrunk with a reconnection.
                    self._dropped += 1
                    self._log.warning("size", "dropping a message over the server's new limit")
                    continue
                try:
                    await client.publish(parcel.subject, parcel.body, parcel.reply, parcel.headers)
                except (nats_errors.Error, OSError) as exc:
                    self._dropped += 1
                    self._log.warning("publish", f"dropping a message: {exc!r}")
                else:
                    self._published += 1
            if not len(self._outbox):
                self._filled.clear()
            self._moved.set()
            await asyncio.sleep(0)

    async def _round_trip(self) -> None:
        """Return when the server has read everything written so far."""
        while True:
            await self._up.wait()
            try:
                await self._client.ping()
            except (nats_errors.Error, OSError):
                # Either `_up` is clear by now, or it will be when nats-py has noticed.
                await asyncio.sleep(_ABORT_GRACE_S)
            else:
                return

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, nats_errors.SlowConsumerError):
            self._slow_consumers += 1
            self._log.warning("slow", f"messages on {exc.subject!r} were thrown away, unread")
            return
        self._last_failure = str(exc) or type(exc).__name__
        self._log.warning(type(exc).__name__, self._last_failure)
        if (refused := _MAY_NOT_SUBSCRIBE.search(str(exc))) is not None:
            for subscription in self._subscriptions:
                if subscription.subject.lower() == refused[1]:
                    self._deafened(subscription)
        if self._connect_scope is not None and self._identity.refusal(exc) is not None:
            self._give_up(exc)

    def _deafened(self, subscription: NatsSubscription) -> None:
        """The server has not taken `subscription`, or does so no longer."""
        if subscription.is_open and not self._lost.is_set():
            self._lost_reason = f"the server no longer lets us receive {subscription.subject!r}"
            if self._up.is_set():
                self._tell_deaf()
        subscription.is_refused = True

    def _tell_deaf(self) -> None:
        """Only while the connection stands: then what is still to be said can be said."""
        logger.error("NATS at {}: {}", self._address.bare, self._lost_reason)
        self._lost.set()

    def _give_up(self, exc: Exception) -> None:
        """End the first connection's attempts: `exc` will not go away by itself."""
        assert self._connect_scope is not None
        if self._refusal is None:
            self._refusal = self._identity.refusal(exc) or BrokerUnavailable(
                f"the NATS server at {self._address.bare} ended the connection: {exc}."
                " Its log may say more."
            )
            self._connect_scope.cancel()

    async def _on_disconnected(self) -> None:
        self._up.clear()
        if not self._lost.is_set():
            self._lost_reason = ""  # the next connection may be permitted more
        self._client.release_waiters()
        if not self._closing and self._connect_scope is None and not self._lost.is_set():
            logger.warning("disconnected from NATS at {}; reconnecting", self._address.bare)

    async def _on_reconnected(self) -> None:
        self._up.set()
        if self._connect_scope is None:
            logger.info("reconnected to NATS at {}", self._address.bare)
        if self._lost_reason and not self._lost.is_set():
            self._tell_deaf()

    async def _on_lame_duck(self) -> None:
        logger.warning("the NATS server at {} is about to shut down", self._address.bare)

    def _on_lost(self, reason: str) -> None:
        self._up.clear()
        if self._connect_scope is not None:
            self._last_failure = reason
            self._give_up(self._client.last_error or ConnectionError(reason))
        elif not self._closing and not self._lost.is_set():
            self._lost_reason = reason
            logger.error("the connection to NATS has ended for good: {}", reason)
            self._lost.set()


class NatsSubscription:
    """Interest in one subject, from `NatsBroker.subscribe` until `drain`."""

    def __init__(self, broker: NatsBroker, sink: Sink) -> None:
        self._broker = broker
        self._client = broker._client
        self._sink = sink
        self._subscription: Any = None
        self._ended = False
        self.subject = ""
        self.is_open = False
        """The server has taken it once."""
        self.is_refused = False

    async def drain(self) -> None:
        """As the port says, in at most `_DRAIN_S`. Cancelled: the sink is not called again."""
        try:
            await self._broker._run(self._drained)
        finally:
            self._forget()

    async def _open(self, subject: str, group: str | None) -> None:
        await self._broker._up.wait()
        self.subject = subject
        if not self._ended:
            self._broker._subscriptions.add(self)
        self._subscription = await self._client.subscribe(
            subject,
            queue=group or "",
            cb=self._deliver,
            pending_msgs_limit=self._broker._subscription_limit,
            pending_bytes_limit=_SUBSCRIPTION_BYTES,
        )
        await self._broker._round_trip()
        if self.is_refused:
            raise ConfigError(
                f"nats: the server does not let us subscribe to {subject!r}."
                " Grant the user of nats.url that permission, or use another user."
            )
        self.is_open = True
        if self._ended:
            self._withdraw()

    async def _drained(self) -> None:
        client, subscription = self._client, self._subscription
        withdrawn = False
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                with suppress(nats_errors.Error, OSError):
                    await client.send_unsubscribe(subscription)
                    await client.ping()
                    withdrawn = True
                await client.join(subscription)
        if withdrawn:
            client.forget(subscription)

    async def _deliver(self, message: Msg) -> None:
        """nats-py's callback. It never waits, and nothing may leave it."""
        if self._ended:
            return
        broker = self._broker
        broker._received += 1
        try:
            self._sink(
                Message(
                    subject=message.subject,
                    body=message.data,
                    reply=message.reply or None,
                    headers=message.headers or {},
                )
            )
        except Exception:  # noqa: BLE001 - a fault of ours must not end the subscription
            logger.exception("taking a message on {!r} failed", message.subject)

    def _forget(self) -> None:
        """End the interest now. Also legal in Trio tasks, also twice."""
        if not self._ended:
            self._ended = True
            self._broker._subscriptions.discard(self)
            self._withdraw()

    def _withdraw(self) -> None:
        if self._subscription is not None and self._client.forget(self._subscription):
            self._broker._task(self._client.send_unsubscribe(self._subscription))


class _QuietLog:
    """Warnings that may come in floods: one of a kind in `_QUIET_S`, with a count."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._since: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def warning(self, kind: str, text: str) -> None:
        now = trio.current_time()
        if now - self._since.get(kind, -_QUIET_S) < _QUIET_S:
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return
        self._since[kind] = now
        more = self._held_back.pop(kind, 0)
        tail = f" (and {more} like it before)" if more else ""
        logger.warning("NATS at {}: {}{}", self._where, text, tail)


def _log_asyncio(_loop: object, context: dict[str, Any]) -> None:
    logger.debug("asyncio: {} {!r}", context.get("message"), context.get("exception"))
