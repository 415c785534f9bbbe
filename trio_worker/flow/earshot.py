"""Being heard by who listens late: a message is sent again until somebody has taken it.

mlx-serving's controller asks first and subscribes then, so that what is answered at once goes to
nobody. No fixed delay is long enough. But the server says 503 to the sender of a message with a
reply subject that meets nobody, and it does so before it confirms a flush.

Where something else listens, such as a person who looks on, the server sees a listener and has
nothing to say; so nothing is said before `SETTLE_S` either.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

import trio

from trio_worker.errors import MessageTooLarge
from trio_worker.ports import Broker, Message, Outlet
from trio_worker.wire import subjects

SETTLE_S = 0.05
"""From the arrival of a request to the first word of its answer, at least."""
HEARD_WITHIN_S = 5.0
"""From the arrival of a request on: who does not listen then is taken for gone."""
HEARD_AT_LEAST_S = 1.0
"""How long the first word is said, though, where it comes later than that; and where the worker
ends meanwhile."""
CONFIRM_S = 1.0
"""How long the server may take to confirm one attempt."""
PAUSE_S = 0.001
PAUSE_MAX_S = 0.02
"""Between attempts: the first, doubled up to the second."""
REFUSALS_MAX = 1024
"""That are waiting to be heard; what is said beyond is said once, heard or not. The answers to
requests in flight wait, too, and have the door's bound."""


class Earshot:
    """Finds out who listens. Its state: the messages under way, and which of them met nobody."""

    def __init__(self, broker: Broker, nursery: trio.Nursery, *, worker_id: str) -> None:
        """`nursery` has a task for each answer, from its first word until that is heard.

        It has to be open for as long as anybody speaks.
        """
        self.broker = broker
        self._nursery = nursery
        self._worker_id = worker_id
        self._numbers = itertools.count()
        self._under_way: set[str] = set()
        """Subjects that the server's word may come on. Bound: one for each that waits."""
        self._met_nobody: set[str] = set()
        """Of these."""
        self._refusals = 0

    def take(self, message: Message) -> None:
        """The server's word on `subjects.probe` that nobody was there. A sink."""
        if message.headers.get("Status") == "503" and message.subject in self._under_way:
            self._met_nobody.add(message.subject)

    def open_outlet(
        self, subject: str, *, reply: str | None = None, headers: Mapping[str, str]
    ) -> HeardOutlet:
        """As `Broker.open_outlet`, for the answer to a request that has just arrived.

        Without `reply`, where the server would say that nobody listens, it is a refusal.
        """
        assert not headers, "sizes are checked without headers"
        return HeardOutlet(
            self,
            self.open_probe(subject),
            self.broker.open_outlet(subject, reply=reply, headers={}),
            is_refusal=reply is None,
        )

    def open_probe(self, subject: str) -> Probe:
        return Probe(self, subject, subjects.probe(self._worker_id, str(next(self._numbers))))

    async def met_nobody(self, reply: str) -> bool:
        """Whether the message that has just been sent with this reply subject did.

        Raises `trio.TooSlowError` where the server does not confirm it within `CONFIRM_S`.
        Cancelled: not before.
        """
        self._under_way.add(reply)
        try:
            with trio.fail_after(CONFIRM_S, shield=True):
                await self.broker.flush()
            return reply in self._met_nobody
        finally:
            self._under_way.discard(reply)
            self._met_nobody.discard(reply)

    def wait_heard(self, outlet: HeardOutlet) -> bool:
        """Have a task of its own say this outlet's first word; False: too many refusals do."""
        if outlet.is_refusal and self._refusals >= REFUSALS_MAX:
            return False
        self._refusals += outlet.is_refusal
        self._nursery.start_soon(self._introduce, outlet)
        return True

    async def _introduce(self, outlet: HeardOutlet) -> None:
        try:
            await outlet.introduce()
        finally:
            self._refusals -= outlet.is_refusal


class Probe:
    """Sends to one subject, and learns each time whether somebody listens there."""

    def __init__(self, earshot: Earshot, subject: str, reply: str) -> None:
        self._earshot = earshot
        self._reply = reply
        self._outlet = earshot.broker.open_outlet(subject, reply=reply, headers={})

    async def is_heard(self, body: bytes) -> bool:
        """Send once; whether that has been heard.

        What has left and is not confirmed counts as heard: it may have been, and would be said
        twice. Cancelled: within `CONFIRM_S`, so that this is known. Raises `MessageTooLarge`.
        """
        self._outlet.publish(body, {})
        try:
            return not await self._earshot.met_nobody(self._reply)
        except trio.TooSlowError:
            has_left = not self._outlet.unpublished_bytes
            self._outlet.discard()
            return has_left


class HeardOutlet:
    """An `Outlet` whose first message is sent until it is heard; the others wait for that.

    Its bound is its owner's, as for any outlet: what waits here counts as unpublished.
    """

    def __init__(self, earshot: Earshot, probe: Probe, outlet: Outlet, *, is_refusal: bool) -> None:
        self.is_refusal = is_refusal
        self._earshot = earshot
        self._probe = probe
        self._outlet = outlet
        self._opened_at = trio.current_time()
        self._unheard: deque[bytes] = deque()
        self._unheard_bytes = 0
        self._is_introduced = False
        """Somebody listens, or everything has been done to find out."""
        self._is_introducing = False

    @property
    def unpublished_bytes(self) -> int:
        return self._unheard_bytes + self._outlet.unpublished_bytes

    def publish(self, body: bytes, headers: Mapping[str, str]) -> None:
        """As `Outlet.publish`, without headers."""
        if self._is_introduced:
            self._outlet.publish(body, headers)
            return
        if len(body) > self._earshot.broker.max_payload:
            raise MessageTooLarge(len(body), self._earshot.broker.max_payload)
        self._unheard.append(body)
        self._unheard_bytes += len(body)
        if not self._is_introducing:
            self._is_introducing = self._earshot.wait_heard(self)
            if not self._is_introducing:
                self._go_on()

    def discard(self) -> None:
        """As `Outlet.discard`; the message that is being said may be said all the same."""
        self._unheard.clear()
        self._unheard_bytes = 0
        self._outlet.discard()

    async def introduce(self) -> None:
        """Say the first message until it is heard, or nobody is there; then all goes straight.

        Cancelled: after `HEARD_AT_LEAST_S`, in which the answer's end may still be heard.
        """
        least_until = trio.current_time() + HEARD_AT_LEAST_S
        try:
            with trio.move_on_at(max(self._opened_at + HEARD_WITHIN_S, least_until)):
                await self._until_heard()
        except trio.Cancelled:
            with trio.move_on_after(HEARD_AT_LEAST_S, shield=True):
                await self._until_heard()
            raise
        finally:
            self._go_on()

    async def _until_heard(self) -> None:
        await trio.sleep_until(self._opened_at + SETTLE_S)
        pause_s = PAUSE_S
        while self._unheard:
            first = self._unheard[0]
            try:
                is_over = await self._probe.is_heard(first)
            except MessageTooLarge:
                is_over = True  # the limit has shrunk with a reconnection
            if is_over:
                if self._unheard and self._unheard[0] is first:
                    self._unheard.popleft()
                return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    def _go_on(self) -> None:
        """Send the rest straight.

        Where the first message has not been heard it is sent once more, by the outlet: that it
        finds nobody is told on the outlet's own reply subject, which ends the request.
        """
        self._is_introduced = True
        for body in self._unheard:
            with suppress(MessageTooLarge):  # likewise
                self._outlet.publish(body, {})
        self._unheard.clear()
        self._unheard_bytes = 0
