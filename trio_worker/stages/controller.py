"""Membership in the clusters of mlx-serving's controllers, and their requests.

A request of theirs goes the way of all: through the reception into the one queue. What is told to
them is told again and again, since a controller that is restarted knows nobody: what its workers
have said to the one before is lost.

Bounds: `ARRIVALS_MAX` requests between the broker's callbacks and this task, beyond which they are
refused, and `LATELY_MAX` ids of requests that have come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio
from loguru import logger
from trio_util import move_on_when

from trio_worker.errors import SHUTTING_DOWN, QueueFull, WorkerDraining
from trio_worker.flow.door import Door, DoorState
from trio_worker.flow.earshot import Earshot
from trio_worker.flow.reception import Arrival, Reception, Respond
from trio_worker.flow.reply_stream import ReplyStream
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.ports import Broker, Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import subjects
from trio_worker.wire.mlx_serving import Load, Member, MlxServing, Status, request_id_in

BEAT_S = 5.0
"""A controller takes a worker for gone 15 s after its last beat."""
BEAT_GAP_S = 0.1
"""Between two of them, at least, when the load changes."""
LINGER_S = 0.5
"""From leaving to the end of what controllers had begun to send before they knew."""
SUBSCRIPTION_DRAIN_S = 0.5
ARRIVALS_MAX = 256
LATELY_MAX = 4096
"""A controller that repeats itself does so within some seconds."""


class Departure:
    """How the end of a membership is asked for, and told."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.done = trio.Event()
        """No controller sends anything any more that can be helped."""


async def run_controller(
    requests: trio.Nursery,
    *,
    member: Member,
    reception: Reception,
    door: Door,
    broker: Broker,
    respond: Respond,
    worker_id: str,
    counters: RequestCounters,
    memory_bytes: Callable[[], int],
    cpu_percent: Callable[[], float],
    wall_clock: Callable[[], float],
    departure: Departure,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a member until asked to depart, and serve what comes until the door closes.

    Started when the subscription stands. Returns when the door has closed and everything that had
    arrived is answered or admitted; every admitted request becomes a task in `requests`.
    Cancelled: controllers are told that the worker leaves, and what has not been read is refused:
    nobody else ends their waiting.
    """
    earshot = Earshot(broker, requests, worker_id=worker_id)
    send, receive = trio.open_memory_channel[Arrival](ARRIVALS_MAX)
    desk = _Desk(earshot, reception, door, send, worker_id=worker_id, counters=counters)
    membership = _Membership(
        member,
        broker=broker,
        door=door,
        counters=counters,
        memory_bytes=memory_bytes,
        cpu_percent=cpu_percent,
        wall_clock=wall_clock,
    )
    await broker.subscribe(subjects.probe(worker_id, "*"), earshot.take)
    async with receive, trio.open_nursery() as nursery:
        await nursery.start(
            partial(_belong, earshot=earshot, door=door, departure=departure),
            broker,
            membership,
            desk,
        )
        task_status.started()
        try:
            async for arrival in receive:
                fields = reception.read(arrival)
                admitted = None if fields is None else reception.admit(arrival, fields)
                if admitted is not None:
                    requests.start_soon(respond, *admitted)
        finally:
            desk.refuse_unread(receive)
    logger.debug("No requests of controllers any more")


async def _belong(
    broker: Broker,
    membership: _Membership,
    desk: _Desk,
    *,
    earshot: Earshot,
    door: Door,
    departure: Departure,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Subscribe, be a member, leave, and hold the subscription until the door closes."""
    subject = subjects.from_controllers(membership.id)
    with desk.open:
        subscription = await broker.subscribe(subject, desk.take)
        try:
            task_status.started()
            async with move_on_when(departure.asked.wait):
                await membership.tell()
            await _leave(membership, earshot)
            departure.done.set()
            await door.state.wait_value(lambda state: state is DoorState.CLOSED)
        except BaseException:
            membership.leave()
            raise
        finally:
            with trio.move_on_after(SUBSCRIPTION_DRAIN_S, shield=True):
                await subscription.drain()


async def _leave(membership: _Membership, earshot: Earshot) -> None:
    """Return when controllers have had the time to take note, if there is one at all.

    That is after `LINGER_S`, and before it however long the server takes to confirm, within the
    bound of `Probe.is_heard`.
    """
    if await earshot.open_probe(subjects.DEREGISTER).is_heard(membership.farewell()):
        logger.info("Left mlx-serving's controllers")
        # They confirm nothing, and what they have sent meanwhile is to be served.
        await trio.sleep(LINGER_S)
    else:
        # There is none, or no connection: then they are told when it is back.
        membership.leave()


class _Membership:
    """What controllers are told. It holds what has not left yet, one message of each kind."""

    def __init__(
        self,
        member: Member,
        *,
        broker: Broker,
        door: Door,
        counters: RequestCounters,
        memory_bytes: Callable[[], int],
        cpu_percent: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.id = member.id
        self._member = member
        self._door = door
        self._counters = counters
        self._memory_bytes = memory_bytes
        self._cpu_percent = cpu_percent
        self._wall_clock = wall_clock
        self._register = broker.open_outlet(subjects.REGISTER, headers={})
        self._beat = broker.open_outlet(subjects.HEARTBEAT, headers={})
        self._deregister = broker.open_outlet(subjects.DEREGISTER, headers={})

    async def tell(self) -> None:
        """Register and beat at once, every `BEAT_S`, and when the load changes. Until cancelled."""
        logger.info("Joined mlx-serving's controllers as {}", self.id)
        while True:
            told = self._state()
            self._say(*told)
            told_at = trio.current_time()
            with trio.move_on_at(told_at + BEAT_S):
                while self._state() == told:
                    await self._door.changed.wait()
            await trio.sleep_until(told_at + BEAT_GAP_S)

    def farewell(self) -> bytes:
        """The last that is said. What has been said before and has not left is taken back."""
        self._register.discard()
        self._beat.discard()
        return self._member.deregistration(now=self._wall_clock())

    def leave(self) -> None:
        """Say it as soon as there is a connection. Synchronous; to say it twice harms nobody."""
        self._deregister.discard()
        self._deregister.publish(self.farewell(), {})

    def _state(self) -> tuple[Status, int]:
        is_open = self._door.state.value is DoorState.OPEN
        status = Status.ONLINE if is_open else Status.DEGRADED
        return status, len(self._door.admission.in_flight)

    def _say(self, status: Status, active: int) -> None:
        now = self._wall_clock()
        by_subject = self._counters.by_subject.values()
        handled = sum(each.answered for each in by_subject)
        load = Load(
            active=active,
            handled=handled,
            mean_latency_ms=1000 * sum(each.processing_s for each in by_subject) / max(handled, 1),
            memory_bytes=self._memory_bytes(),
            cpu_percent=self._cpu_percent(),
        )
        for outlet, body in (
            (self._register, self._member.registration(status, now=now)),
            (self._beat, self._member.heartbeat(status, load, now=now)),
        ):
            # What an outage has held back is out of date.
            outlet.discard()
            outlet.publish(body, {})


class _Desk:
    """Takes controllers' messages. Its state: the requests that have come lately."""

    def __init__(
        self,
        earshot: Earshot,
        reception: Reception,
        door: Door,
        arrivals: trio.MemorySendChannel[Arrival],
        *,
        worker_id: str,
        counters: RequestCounters,
    ) -> None:
        self.open = arrivals
        self._earshot = earshot
        self._reception = reception
        self._door = door
        self._worker_id = worker_id
        self._counters = counters
        self._lately: OrderedDict[RequestId, None] = OrderedDict()
        """Bound: `LATELY_MAX`."""

    def take(self, message: Message) -> None:
        """A sink. Never raises."""
        request_id = request_id_in(message.body)
        if request_id is None:
            self._counters.dropped += 1
            logger.debug("A controller's message dropped: no requestId to answer to")
            return
        if self._is_repeated(request_id, message.subject):
            # An error would end the answer to the first.
            logger.bind(request_id=request_id).debug("A controller has repeated a request")
            return
        arrival = self._arrival(message, request_id)
        try:
            self.open.send_nowait(arrival)
        except trio.WouldBlock:
            error = QueueFull("more requests arrive than this worker can read")
            self._reception.refuse(arrival, error, request_id)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            self._reception.refuse(arrival, WorkerDraining(SHUTTING_DOWN), request_id)

    def refuse_unread(self, arrivals: trio.MemoryReceiveChannel[Arrival]) -> None:
        """Answer what has come and will not be read. Synchronous."""
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                self._reception.refuse(arrivals.receive_nowait(), WorkerDraining(SHUTTING_DOWN))

    def _is_repeated(self, request_id: RequestId, subject: str) -> bool:
        running = self._door.admission.in_flight.get(request_id)
        if request_id in self._lately or (running is not None and running.subject == subject):
            return True
        self._lately[request_id] = None
        if len(self._lately) > LATELY_MAX:
            self._lately.popitem(last=False)
        return False

    def _arrival(self, message: Message, request_id: RequestId) -> Arrival:
        dialect = MlxServing(request_id)
        reply_subject = subjects.to_controllers(request_id)

        def open_reply(request_id: RequestId, *, is_admitted: bool) -> ReplyStream:
            # What cannot be read gets another id, which only the log has.
            control = subjects.control(self._worker_id, request_id) if is_admitted else None
            return ReplyStream(
                self._earshot,
                dialect=dialect,
                subject=reply_subject,
                control_subject=control,
                request_id=request_id,
                worker_id=self._worker_id,
            )

        return Arrival(
            body=message.body,
            subject=message.subject,
            dialect=dialect,
            open_reply=open_reply,
            reply_subject=reply_subject,
        )
