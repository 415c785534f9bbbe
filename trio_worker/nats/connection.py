"""One connection to a nats-server: nats-py's client, and where its connection is in its life.

nats-py runs in asyncio and calls back from there; every callback is one step of the life. Whoever
waits for the connection waits in Trio for a state of it. What is called in asyncio ends when it
is cancelled, since the client is mended; so nothing of ours is left behind in its loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import trio
from loguru import logger
from nats import errors as nats_errors
from trio_asyncio import aio_as_trio
from trio_util import AsyncValue

from trio_worker.errors import BrokerUnavailable
from trio_worker.nats.address import NatsAddress
from trio_worker.nats.connection_life import STANDING, USELESS, ConnectionLife, Event, State
from trio_worker.nats.login import Identity
from trio_worker.nats.mended_client import MendedClient
from trio_worker.nats.quiet_log import QuietLog

T = TypeVar("T")

_ATTEMPT_TIMEOUT_S = 2.0
"""For each of: connecting, the server's greeting, its answer to our credentials."""
_PENDING_BYTES = 256 * 1024
"""What nats-py may hold of commands before it makes who gives them wait."""
_ABORT_GRACE_S = 0.25
_MAY_NOT_SUBSCRIBE = re.compile(r'permissions violation for subscription to "([^"]*)"')
"""As the parser hands it on, in lower case."""


@dataclass(slots=True, eq=False)
class Interest:
    """A subject that we ask the server for, and what it said."""

    subject: str
    is_taken: bool = False
    """The server has taken it once."""
    is_refused: bool = False


class Connection:
    """nats-py's client and the life of its connection.

    Its state beside them: the interests that have not ended, and counts.
    """

    def __init__(
        self,
        address: NatsAddress,
        identity: Identity,
        *,
        loop: Any,
    ) -> None:
        self.where = address.bare
        self.client = MendedClient(wants_tls=identity.wants_tls, on_ended=self._on_ended)
        self.quiet_log = QuietLog(self.where)
        self.interests: set[Interest] = set()
        self.received = 0
        """Messages handed to a sink."""
        self.slow_consumers = 0
        self._identity = identity
        self._loop = loop
        self._life = ConnectionLife()
        self._state = AsyncValue(self._life.state)
        """The life's, to be waited for."""
        self._last_failure = "no answer"

    @property
    def stands(self) -> bool:
        return self._life.stands

    @property
    def is_writable(self) -> bool:
        """Whether what is written now leaves: the connection stands, and is not full."""
        return self._life.stands and self.client.is_writable

    async def connect(
        self,
        *,
        name: str,
        timeout_s: float,
        reconnect_wait_s: float,
        ping_interval_s: float,
        inbox_prefix: str,
    ) -> None:
        """Return with a connection. Raises as `open_nats_broker` says."""

        async def first_attempts() -> None:
            await self.client.connect(
                self.where,
                name=name,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                lame_duck_mode_cb=self._on_lame_duck,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=reconnect_wait_s,
                connect_timeout=min(_ATTEMPT_TIMEOUT_S, timeout_s),
                ping_interval=ping_interval_s,
                max_outstanding_pings=2,
                pending_size=_PENDING_BYTES,
                inbox_prefix=inbox_prefix,
                **self._identity.options(),
            )
            if self.client.is_connected:
                self._advance(Event.ESTABLISHED)

        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as attempts:
                attempts.start_soon(self.run, first_attempts)
                await self._state.wait_value(lambda state: state is not State.CONNECTING)
                attempts.cancel_scope.cancel()
        if self._life.state is State.FAILED:
            assert self._life.reason is not None
            raise self._life.reason
        if self._life.state is State.CONNECTING:
            raise BrokerUnavailable(
                f"NATS at {self.where} could not be reached: tried for {timeout_s:g} s, and the"
                f" last attempt failed with: {self._last_failure}."
                " Start a nats-server there, or change nats.url."
            )
        logger.info("connected to NATS at {}", self.where)

    async def close(self, *, in_order: bool) -> None:
        """End the connection, and with it every attempt to get another. Bounded; never raises.

        In order is: with what nats-py holds unwritten, if that takes no time.
        """
        self._advance(Event.LEFT)
        self.client.options["allow_reconnect"] = False
        grace_s = _ABORT_GRACE_S if in_order else 0.0
        if not in_order:
            self.client.abort()
        with trio.move_on_after(grace_s + _ABORT_GRACE_S):
            async with trio.open_nursery() as closing:
                closing.start_soon(self._abort_after, grace_s)
                # Whatever nats-py runs into on a line that is being cut: it is to be cut.
                with suppress(Exception):
                    await self.run(self.client.close)
                closing.cancel_scope.cancel()
        self.client.abort()

    async def run(self, function: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
        """Run what is written for asyncio, also from a task that was started outside its loop.

        Cancelled: it is cancelled there, and has ended when this raises. Raises `OSError` where
        nats-py itself cancels it: two of its tasks may wait for one future, and one be ended.
        """
        try:
            result: T = await aio_as_trio(function, loop=self._loop)(*args, **options)
        except asyncio.CancelledError as exc:
            # Nobody in Trio has cancelled this: that would be `trio.Cancelled`.
            raise ConnectionAbortedError("nats-py has given up waiting") from exc  # noqa: ASYNC104
        return result

    async def round_trip(self) -> None:
        """Return when the server has read everything written so far, over however many lines."""
        while True:
            await self.wait_standing()
            try:
                await self.run(self.client.ping)
            except (nats_errors.Error, OSError):
                # Either it stands no longer, or will not when nats-py has noticed.
                await trio.sleep(_ABORT_GRACE_S)
            else:
                return

    async def wait_standing(self) -> None:
        await self._state.wait_value(lambda state: state in STANDING)

    async def wait_writable(self) -> None:
        """Return when what is written leaves. Waits while there is no connection.

        Cancelled: nothing is lost.
        """
        while not self.is_writable:
            await self.wait_standing()
            try:
                await self.run(self.client.wait_written)
            except OSError:
                # It has broken, which nats-py notices in a moment, or has mended since.
                await self._state.wait_value(
                    lambda state: state not in STANDING or self.is_writable
                )

    async def wait_useless(self) -> str:
        """Return, with the reason, when it cannot do any more what it is for."""
        await self._state.wait_value(lambda state: state in USELESS)
        return str(self._life.reason)

    async def _abort_after(self, grace_s: float) -> None:
        await trio.sleep(grace_s)
        self.client.abort()

    # --- what nats-py tells, in asyncio ---------------------------------------------------

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, nats_errors.SlowConsumerError):
            self.slow_consumers += 1
            self.quiet_log.warn("slow", f"messages on {exc.subject!r} were thrown away, unread")
            return
        self._last_failure = str(exc) or type(exc).__name__
        self.quiet_log.warn(type(exc).__name__, self._last_failure)
        if (refused := _MAY_NOT_SUBSCRIBE.search(str(exc))) is not None:
            self._note_refused(refused[1])
        if (refusal := self._identity.refusal(exc)) is not None:
            self._advance(Event.REFUSED, refusal)

    def _note_refused(self, subject: str) -> None:
        """The server has not taken this interest, or does so no longer."""
        for interest in self.interests:
            if interest.subject.lower() == subject:
                interest.is_refused = True
                if interest.is_taken:
                    text = f"the server no longer lets us receive {interest.subject!r}"
                    self._advance(Event.DEAFENED, PermissionError(text))

    async def _on_disconnected(self) -> None:
        self._advance(Event.BROKEN)
        if self._life.state is State.RECONNECTING:
            logger.warning("disconnected from NATS at {}; reconnecting", self.where)

    async def _on_reconnected(self) -> None:
        if self._life.state is not State.CONNECTING:
            logger.info("reconnected to NATS at {}", self.where)
        self._advance(Event.ESTABLISHED)

    async def _on_lame_duck(self) -> None:
        logger.warning("the NATS server at {} is about to shut down", self.where)

    def _on_ended(self, last_error: Exception | None) -> None:
        reason = last_error or ConnectionError("it was closed")
        if self._life.state is State.CONNECTING:
            reason = self._identity.refusal(reason) or BrokerUnavailable(
                f"the NATS server at {self.where} ended the connection: {reason}."
                " Its log may say more."
            )
        self._advance(Event.ENDED, reason)

    def _advance(self, event: Event, reason: Exception | None = None) -> None:
        is_news = self._life.advance(event, reason)
        self._state.value = self._life.state
        if is_news and self._life.state is State.DEAF:
            logger.error("NATS at {}: {}", self.where, self._life.reason)
        elif is_news and self._life.state is State.LOST:
            logger.error("the connection to NATS has ended for good: {}", self._life.reason)
