"""A message system in the event loop: the broker port without a network, on any clock.

`MemoryServer` routes as nats-server does: wildcards, queue groups, the no-responders status.
`open_memory_broker` opens one connection to it. Rules:

1. A sink is never called inside the call that published: messages go through one queue, and
   whichever connection's task wakes first carries all of it, in order. So what happens does
   not depend on the order in which Trio runs its tasks.
2. Everything is bounded as in the real adapter: the outbox, and what is under way to one
   subscription.
3. A connection that is down neither sends nor receives; its outbox waits, its subscriptions
   come back, and what was under way to it is lost.
4. A connection that is frozen keeps its interest, as that of a process that is stopped does: what
   goes there waits for it, and so does what it says.
5. While the server is split, connections on different sides do not know of each other.
"""

# ruff: noqa: SLF001 - the server and its connections are one mechanism

from __future__ import annotations

import heapq
import itertools
import random
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from loguru import logger

from trio_worker.exception_groups import sole_exceptions
from trio_worker.nats.outbox import Outbox
from trio_worker.nats.parcel import Parcel, address
from trio_worker.ports import BrokerStatistics, Message, Outlet

Sink = Callable[[Message], None]
Service = Callable[[Message], bool]
"""Takes a message, and says whether it was for it."""

_BATCH = 256
"""Messages carried between two chances for the other tasks to run."""


def subject_matches(pattern: str, subject: str) -> bool:
    """Whether interest in `pattern` takes in `subject`: `*` is one token, `>` the rest."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(
        token in {"*", name} for token, name in zip(wanted, given, strict=True)
    )


class MemoryServer:
    """The message system. Its state: connections, interest, and what is under way.

    Args:
        random: chooses the member of a queue group.
        max_payload: as the real server's limit.
        delay_s: how long each delivery takes. May be changed at any time; the messages of one
            subscription stay in order.
    """

    def __init__(
        self, *, random: random.Random, max_payload: int = 1024 * 1024, delay_s: float = 0.0
    ) -> None:
        self.max_payload = max_payload
        self.delay_s = delay_s
        self._random = random
        self.services: list[Service] = []
        """Parts of the server itself that take messages: they count as listeners."""
        self._subscriptions: list[MemorySubscription] = []
        self._cut_off: set[MemoryBroker] = set()
        """The connections on the other side of a split."""
        self._outgoing: deque[MemoryBroker] = deque()
        """One entry per published message, in the order of publishing, whoever published."""
        self._under_way: list[_Delivery | _Timer] = []
        """A heap."""
        self._numbers = itertools.count()
        self._work = trio.Event()

    def split(self, *away: MemoryBroker) -> None:
        """Cut these connections off from all others; they still know of each other."""
        self._cut_off = set(away)

    def heal(self) -> None:
        """Everybody knows of everybody again."""
        self._cut_off = set()

    def _reaches(self, sender: MemoryBroker | None, taker: MemoryBroker) -> bool:
        return (sender in self._cut_off) is (taker in self._cut_off)

    async def _carry(self) -> None:
        """Run until cancelled: route and deliver. Any number of tasks may do this."""
        while True:
            for _ in range(_BATCH):
                if not self._step():
                    break
            else:
                await trio.lowlevel.checkpoint()
                continue
            due = self._under_way[0].due if self._under_way else float("inf")
            with trio.move_on_at(due):
                await self._work.wait()

    def _step(self) -> bool:
        """Route one message or deliver one; False if there is nothing to do now."""
        if self._outgoing:
            broker = self._outgoing.popleft()
            parcel = broker._next()
            if parcel is not None:
                self._route(parcel, broker)
            return True
        if self._under_way and self._under_way[0].due <= trio.current_time():
            heapq.heappop(self._under_way).arrive()
            return True
        if self._work.is_set():
            self._work = trio.Event()
        return False

    def _wake(self) -> None:
        self._work.set()

    def _route(self, parcel: Parcel, sender: MemoryBroker) -> None:
        message = Message(
            subject=parcel.envelope.subject,
            body=parcel.body,
            reply=parcel.envelope.reply or None,
            headers=parcel.envelope.headers | parcel.headers,
        )
        is_heard = self.hand_out(message.subject, message, sender)
        served_by = () if sender in self._cut_off else self.services
        is_served = [service(message) for service in served_by]
        if not is_heard and not any(is_served) and message.reply is not None:
            self._report_no_responders(message.subject, message.reply, sender)

    def hand_out(self, subject: str, message: Message, sender: MemoryBroker | None = None) -> bool:
        """Send a message to who listens on `subject`, whatever its own; False: nobody does.

        What has no sender comes from the server itself, which no split cuts off.
        """
        groups: dict[str, list[MemorySubscription]] = {}
        takers: list[MemorySubscription] = []
        for subscription in self._subscriptions:
            if not subscription.takes(subject):
                continue
            if not self._reaches(sender, subscription.broker):
                continue
            if subscription.group is None:
                takers.append(subscription)
            else:
                groups.setdefault(subscription.group, []).append(subscription)
        takers += [self._random.choice(members) for members in groups.values()]
        for subscription in takers:
            self._send(subscription, message)
        return bool(takers)

    def interest_in(self, subject: str) -> Callable[[], bool]:
        """Whether who listens on `subject` now still does, on the same line."""
        takers = [(each, each.broker.line) for each in self._subscriptions if each.takes(subject)]
        return lambda: any(
            each in self._subscriptions and each.broker.is_up and each.broker.line == line
            for each, line in takers
        )

    def call_at(self, due: float, call: Callable[[], object]) -> None:
        """Have something done then, while any connection is open."""
        heapq.heappush(self._under_way, _Timer(due=due, number=next(self._numbers), arrive=call))
        self._wake()

    def _report_no_responders(self, subject: str, reply: str, sender: MemoryBroker) -> None:
        """As the real one: to the sender's own subscription on the reply subject, if any."""
        status = Message(subject=reply, headers={"Status": "503", "Nats-Subject": subject})
        for subscription in self._subscriptions:
            if subscription.broker is sender and subscription.takes(reply):
                self._send(subscription, status)
                return

    def _send(self, subscription: MemorySubscription, message: Message) -> None:
        if subscription.under_way >= subscription.broker.subscription_limit:
            subscription.broker.slow_consumers += 1
            return
        self._post(subscription, lambda: subscription.deliver(message))

    def _post(self, subscription: MemorySubscription, arrival: Callable[[], None]) -> None:
        subscription.under_way += 1
        broker = subscription.broker
        # One connection is one stream: nothing in it overtakes.
        broker.last_due = max(broker.last_due, trio.current_time() + self.delay_s)
        heapq.heappush(
            self._under_way,
            _Delivery(
                due=broker.last_due,
                number=next(self._numbers),
                subscription=subscription,
                line=broker.line,
                arrival=arrival,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    """Something that happens at a moment; what was put first happens first."""

    due: float
    number: int

    def __lt__(self, other: _Due) -> bool:
        return (self.due, self.number) < (other.due, other.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timer(_Due):
    arrive: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delivery(_Due):
    """Something on its way to a connection."""

    subscription: MemorySubscription
    line: int
    """Which of the connection's successive lines it is on; on a broken one it is lost."""
    arrival: Callable[[], None]

    def arrive(self) -> None:
        subscription = self.subscription
        if subscription.broker.is_frozen:
            subscription.broker.held.append(self)
            return
        subscription.under_way -= 1
        if self.line == subscription.broker.line and subscription.broker.is_up:
            self.arrival()
        if not subscription.under_way:
            subscription.empty.set()


@asynccontextmanager
async def open_memory_broker(
    server: MemoryServer,
    *,
    name: str = "memory",
    close_timeout_s: float = 2.0,
    outbox_limit_bytes: int = 64 * 1024 * 1024,
    subscription_limit: int = 16_384,
) -> AsyncIterator[MemoryBroker]:
    """A connection to `server`, for as long as the block.

    Leaving publishes what is in the outbox, in at most `close_timeout_s` and only while
    connected, and ends every subscription. Exceptions leave the block as they were raised.
    """
    broker = MemoryBroker(
        server,
        name=name,
        outbox_limit_bytes=outbox_limit_bytes,
        subscription_limit=subscription_limit,
    )
    with sole_exceptions():
        async with trio.open_nursery() as nursery:
            # The task outlives the block's cancellation until the outbox has been published.
            nursery.start_soon(_carry_until, server, broker.closed)
            try:
                await trio.lowlevel.checkpoint()  # the real one has to connect
                yield broker
            finally:
                with trio.move_on_after(close_timeout_s, shield=True):
                    if broker.is_up:
                        await broker.flush()
                broker.close()


async def _carry_until(server: MemoryServer, closed: trio.Event) -> None:
    with trio.CancelScope(shield=True) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server._carry)
            await closed.wait()
            scope.cancel()


class MemoryBroker:
    """The port, and what a test does to a connection."""

    def __init__(
        self,
        server: MemoryServer,
        *,
        name: str,
        outbox_limit_bytes: int,
        subscription_limit: int,
    ) -> None:
        self.subscription_limit = subscription_limit
        self.is_up = True
        self.is_frozen = False
        self.held: list[_Delivery] = []
        """What has arrived while it was frozen; bounded by the limit of each subscription."""
        self.line = 0
        self.last_due = 0.0
        self.slow_consumers = 0
        self.received = 0
        self.closed = trio.Event()
        self._server = server
        self._name = name
        self._outbox = Outbox(
            loose_limit_bytes=outbox_limit_bytes,
            max_payload=lambda: server.max_payload,
            on_put=self._announce,
        )
        self._up = trio.Event()
        self._up.set()
        self._moved = trio.Event()
        """Something has left the outbox."""
        self._lost = trio.Event()
        self._lost_reason = ""
        self._inboxes = itertools.count(1)
        self._published = 0
        self._dropped = 0
        self._reconnects = 0

    @property
    def max_payload(self) -> int:
        return self._server.max_payload

    def new_inbox(self) -> str:
        return f"_INBOX.{self._name}{next(self._inboxes):012d}"

    def publish(self, message: Message) -> None:
        """As the port says. Raises `ValueError` for what is no subject or no header name."""
        self._outbox.publish(message)

    def open_outlet(
        self, subject: str, *, reply: str | None = None, headers: Mapping[str, str]
    ) -> Outlet:
        """As the port says."""
        return self._outbox.open_share(address(subject, reply, headers))

    def _announce(self, messages: int = 1) -> None:
        """Line up for the server, once per message; while nothing leaves, not at all."""
        if self.is_up and not self.is_frozen and messages:
            self._server._outgoing.extend([self] * messages)
            self._server._wake()

    def _next(self) -> Parcel | None:
        if not self.is_up or self.is_frozen:
            return None
        parcel = self._outbox.take()
        if parcel is not None:
            self._published += 1
        self._moved.set()
        self._moved = trio.Event()
        return parcel

    async def subscribe(
        self, subject: str, sink: Sink, *, group: str | None = None
    ) -> MemorySubscription:
        """As the port says; while the connection is down it waits.

        Cancelled: there is no subscription. Raises `ValueError` if `subject` is not one.
        """
        await self._up.wait()
        _check_pattern(subject)
        subscription = MemorySubscription(self, subject, sink, group)
        self._server._subscriptions.append(subscription)
        try:
            # The server's answer: messages may come before it, and so may a cancellation.
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            subscription.end()
            raise
        return subscription

    async def flush(self) -> None:
        """As the port says. Waits while the connection is down. Cancelled: nothing is lost."""
        mark = self._outbox.mark()
        while not self._outbox.is_past(mark):
            await self._moved.wait()
        while True:
            await self._up.wait()
            answered = MemorySubscription(self, "", _ignore, None)
            self._server._post(answered, answered.answered.set)
            self._server._wake()
            await answered.empty.wait()
            if answered.answered.is_set():
                return

    async def wait_lost(self) -> str:
        await self._lost.wait()
        return self._lost_reason

    def statistics(self) -> BrokerStatistics:
        return BrokerStatistics(
            url="memory://",
            connected=self.is_up,
            reconnects=self._reconnects,
            received=self.received,
            published=self._published,
            dropped=self._dropped + self._outbox.dropped,
            unpublished_bytes=self._outbox.unpublished_bytes,
            slow_consumers=self.slow_consumers,
        )

    # --- what a test does -----------------------------------------------------------------

    def disconnect(self) -> None:
        """Break the line: what is under way to this connection is lost, the outbox waits."""
        if self.is_up:
            self.is_up = False
            self.line += 1
            self._up = trio.Event()

    def reconnect(self) -> None:
        """Mend the line: subscriptions hold again, and what waited in the outbox leaves."""
        if self.is_up or self._lost.is_set() or self.closed.is_set():
            return
        self.is_up = True
        self._reconnects += 1
        self._up.set()
        self._announce(len(self._outbox))

    def freeze(self) -> None:
        """Stop receiving and sending, while the server keeps the interest."""
        self.is_frozen = True

    def thaw(self) -> None:
        """Take what has come meanwhile, and say what was held back."""
        self.is_frozen = False
        for delivery in self.held:
            heapq.heappush(self._server._under_way, delivery)
        self.held = []
        self._announce(len(self._outbox))
        self._server._wake()

    def close_for_good(self, reason: str) -> None:
        """End the connection as a server does that will not have this client back."""
        self.disconnect()
        self._lost_reason = reason
        self._lost.set()

    def close(self) -> None:
        """What leaving the context does at its end."""
        self.disconnect()
        self._dropped += len(self._outbox)
        server = self._server
        server._subscriptions = [
            subscription
            for subscription in server._subscriptions
            if subscription.broker is not self
        ]
        self.closed.set()
        server._wake()  # whoever carries from now on has to look at the clock itself


class MemorySubscription:
    """Interest in one subject."""

    def __init__(self, broker: MemoryBroker, pattern: str, sink: Sink, group: str | None) -> None:
        self.broker = broker
        self.group = group
        self.under_way = 0
        self.empty = trio.Event()
        """Nothing is under way any more; set anew by each delivery that is the last."""
        self.answered = trio.Event()
        self._pattern = pattern
        self._sink = sink
        self._ended = False

    def takes(self, subject: str) -> bool:
        return self.broker.is_up and subject_matches(self._pattern, subject)

    def deliver(self, message: Message) -> None:
        if self._ended:
            return
        self.broker.received += 1
        try:
            self._sink(message)
        except Exception:  # noqa: BLE001 - as the real adapter: the subscription goes on
            logger.exception("taking a message on {!r} failed", message.subject)

    async def drain(self) -> None:
        """As the port says. Cancelled: the sink is not called again."""
        self._withdraw()
        try:
            while self.under_way:
                self.empty = trio.Event()
                await self.empty.wait()
            await trio.lowlevel.checkpoint()
        finally:
            self.end()

    def end(self) -> None:
        """End the interest now: the sink is not called again."""
        self._withdraw()
        self._ended = True

    def _withdraw(self) -> None:
        subscriptions = self.broker._server._subscriptions
        if self in subscriptions:
            subscriptions.remove(self)


def _check_pattern(pattern: str) -> None:
    tokens = pattern.split(".")
    if (
        re.search(r"[ \t\r\n]", pattern)
        or any(not token for token in tokens)
        or ">" in tokens[:-1]
        or any(("*" in token or ">" in token) and len(token) > 1 for token in tokens)
    ):
        raise ValueError(f"{pattern!r} cannot be subscribed to")


def _ignore(_message: Message) -> None:
    """The sink of what is no subscription of anybody's: the answer to a flush."""
