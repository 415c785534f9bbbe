"""Interest in one subject, over however many lines the connection has one after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from loguru import logger
from nats import errors as nats_errors
from nats.aio.msg import Msg

from trio_worker.errors import ConfigError
from trio_worker.nats.connection import Connection, Interest
from trio_worker.ports import Message

Sink = Callable[[Message], None]

_BYTES_MAX = 64 * 1024 * 1024
"""What one subscription may hold before newer messages are thrown away."""
_DRAIN_S = 5.0


async def subscribe(
    connection: Connection, subject: str, sink: Sink, *, group: str | None, messages_max: int
) -> NatsSubscription:
    """As `NatsBroker.subscribe`; at most `messages_max` wait for the sink."""
    subscription = NatsSubscription(connection, subject, sink)
    try:
        await subscription.open(group, messages_max)
    except nats_errors.BadSubjectError as exc:
        subscription.forget()
        raise ValueError(f"{subject!r} or {group!r} cannot be subscribed to") from exc
    except BaseException:
        subscription.forget()
        raise
    return subscription


class NatsSubscription:
    """Interest in one subject, from `subscribe` until `drain`."""

    def __init__(self, connection: Connection, subject: str, sink: Sink) -> None:
        self._connection = connection
        self._client = connection.client
        self._interest = Interest(subject)
        self._sink = sink
        self._subscription: Any = None
        """nats-py's."""
        self._ended = False

    async def open(self, group: str | None, messages_max: int) -> None:
        """Return when the server has taken it. Raises `ConfigError` if it does not."""
        subject = self._interest.subject
        await self._connection.wait_standing()
        self._connection.interests.add(self._interest)
        self._subscription = await self._connection.run(
            self._client.subscribe,
            subject,
            queue=group or "",
            cb=self._deliver,
            pending_msgs_limit=messages_max,
            pending_bytes_limit=_BYTES_MAX,
        )
        await self._connection.round_trip()
        if self._interest.is_refused:
            raise ConfigError(
                f"nats: the server does not let us subscribe to {subject!r}."
                " Grant the user of nats.url that permission, or use another user."
            )
        self._interest.is_taken = True

    async def drain(self) -> None:
        """As the port says, in at most `_DRAIN_S`. Cancelled: the sink is not called again."""
        is_withdrawn = False
        try:
            with trio.move_on_after(_DRAIN_S):
                self._client.withdraw(self._subscription)
                with suppress(nats_errors.Error, OSError):
                    await self._connection.run(self._client.ping)
                    is_withdrawn = True
                await self._connection.run(self._client.join, self._subscription)
        finally:
            self.forget(is_withdrawn=is_withdrawn)

    def forget(self, *, is_withdrawn: bool = False) -> None:
        """End the interest now, and tell the server unless it knows. Also twice."""
        if self._ended:
            return
        self._ended = True
        self._connection.interests.discard(self._interest)
        if self._subscription is not None:
            self._client.forget(self._subscription)
            if not is_withdrawn:
                self._client.withdraw(self._subscription)

    async def _deliver(self, message: Msg) -> None:
        """nats-py's callback. It never waits, and nothing may leave it."""
        if self._ended:
            return
        self._connection.received += 1
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
