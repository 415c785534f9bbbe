"""From a message to a request's own task, or to an error reply. Never waits for inference.

Bounds: `INTAKE_BUFFER` messages between the broker's callbacks and this task; a request that does
not fit is answered `QUEUE_FULL` on the spot. Messages on control subjects come through the same
buffer, so that a cancel message does not overtake the request it is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import trio
from loguru import logger
from trio_util import move_on_when

from trio_worker.errors import (
    SHUTTING_DOWN,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    WorkerDraining,
    WorkerError,
)
from trio_worker.flow.door import Door, DoorState
from trio_worker.flow.hand_on import HandOn
from trio_worker.flow.reception import Admitted, Arrival, Reception, Respond
from trio_worker.flow.reply_stream import ReplyStream
from trio_worker.flow.serving import Serving
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat
from trio_worker.ports import Broker, Message, Subscription
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native, subjects
from trio_worker.wire.handed_on import Hop, read_hop
from trio_worker.wire.native import Fields

INTAKE_BUFFER = 256
TOGETHER_MAX = 16
"""Messages between two chances for other tasks: well below a millisecond each."""
SUBSCRIPTION_DRAIN_S = 0.5

IntakeBuffer: TypeAlias = tuple[trio.MemorySendChannel[Message], trio.MemoryReceiveChannel[Message]]


def open_intake_buffer() -> IntakeBuffer:
    return trio.open_memory_channel[Message](INTAKE_BUFFER)


async def run_intake(
    requests: trio.Nursery,
    *,
    serving: Serving,
    reception: Reception,
    broker: Broker,
    respond: Respond,
    buffer: IntakeBuffer,
    act_on_control: Callable[[Message], None],
    worker_id: str,
    reply_prefixes: tuple[str, ...],
    hand_on: HandOn,
    counters: RequestCounters,
    heartbeat: Heartbeat,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take messages until the door closes; every admitted request becomes a task in `requests`.

    Started when the subscriptions stand. Returns when the door has closed, the subscriptions are
    drained, and everything that had arrived is answered, passed on or admitted. What the server
    says of requests that were passed on is acted on also later, until the connection ends.
    Cancelled: messages still in the buffer are lost, as they would be in the network.
    """
    arrivals = _Arrivals(
        reception,
        broker=broker,
        worker_id=worker_id,
        reply_prefixes=reply_prefixes,
        hand_on=hand_on,
        counters=counters,
    )
    send, receive = buffer

    def offer(message: Message) -> None:
        try:
            send.send_nowait(message)
            heartbeat.wake(Awaited.WORK, trio.current_time())
        except trio.WouldBlock:
            arrivals.turn_away(message, QueueFull("more requests arrive than this worker can read"))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            arrivals.turn_away(message, WorkerDraining(SHUTTING_DOWN))

    async with receive, trio.open_nursery() as nursery:
        if hand_on.enabled:
            await broker.subscribe(subjects.forwarded(worker_id, "*"), offer)
            await hand_on.probe()
        await nursery.start(
            partial(_hold_subscriptions, worker_id=worker_id, offer=offer, send=send),
            broker,
            serving.door,
            serving.limits.model_name,
        )
        task_status.started()
        heartbeat.rest(Awaited.WORK)
        async for first in receive:
            for message in _with_those_behind(first, receive):
                if subjects.is_control(message.subject, worker_id):
                    act_on_control(message)
                elif (admitted := arrivals.admit(message)) is not None:
                    requests.start_soon(respond, *admitted)
            heartbeat.rest(Awaited.WORK)
    logger.debug("Intake ended")


def _with_those_behind(
    first: Message, receive: trio.MemoryReceiveChannel[Message]
) -> Iterator[Message]:
    """The messages that are there, as many as may be taken without letting others run."""
    yield first
    with suppress(trio.WouldBlock, trio.EndOfChannel):
        for _ in range(TOGETHER_MAX - 1):
            yield receive.receive_nowait()


async def _hold_subscriptions(
    broker: Broker,
    door: Door,
    model_name: str,
    *,
    worker_id: str,
    offer: Callable[[Message], None],
    send: trio.MemorySendChannel[Message],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hold this worker's own subject until the door closes, and the shared ones while it is open.

    Then drain them, and close the intake channel.
    """
    async with send:
        held: list[Subscription] = [await broker.subscribe(subjects.direct(worker_id), offer)]
        try:
            task_status.started()
            while await door.state.wait_value(_not_paused) is DoorState.OPEN:
                # While NATS is away subscribing waits; the door may pause or close meanwhile.
                async with move_on_when(door.state.wait_value, _not_open):
                    await _hold_shared(broker, model_name, offer, held)
                if door.state.value is DoorState.PAUSED:
                    shared, held = held[1:], held[:1]
                    with trio.move_on_after(SUBSCRIPTION_DRAIN_S):
                        await _drain(shared)
                    logger.info("Left the queue group")
        finally:
            with trio.move_on_after(SUBSCRIPTION_DRAIN_S, shield=True):
                await _drain(held)


async def _hold_shared(
    broker: Broker, model_name: str, offer: Callable[[Message], None], held: list[Subscription]
) -> None:
    """Join the queue group, and stay until cancelled; what stands so far is in `held`."""
    for subject in (*subjects.shared(model_name), *subjects.shared_by_caller(model_name)):
        subscription = await broker.subscribe(subject, offer, group=subjects.GROUP)
        held += [subscription]
    logger.info("Joined the queue group")
    await trio.sleep_forever()


def _not_paused(state: DoorState) -> bool:
    return state is not DoorState.PAUSED


def _not_open(state: DoorState) -> bool:
    return state is not DoorState.OPEN


async def _drain(subscriptions: Iterable[Subscription]) -> None:
    async with trio.open_nursery() as nursery:
        for subscription in subscriptions:
            nursery.start_soon(subscription.drain)


class _Arrivals:
    """Messages of the worker's own dialect as arrivals."""

    def __init__(
        self,
        reception: Reception,
        *,
        broker: Broker,
        worker_id: str,
        reply_prefixes: tuple[str, ...],
        hand_on: HandOn,
        counters: RequestCounters,
    ) -> None:
        self._reception = reception
        self._broker = broker
        self._worker_id = worker_id
        self._reply_prefixes = reply_prefixes
        self._hand_on = hand_on
        self._counters = counters

    def admit(self, message: Message) -> Admitted | None:
        """What the request's task needs, or None if there will be no task.

        Then another worker has it, or the caller has been answered, unless the reply subject is
        not one to answer to.
        """
        came = self._read(message)
        if came is None or self._passes_on(came):
            return None
        admitted = self._reception.admit(came.arrival, came.fields)
        if admitted is not None and came.hop is not None:
            self._may_leave_later(came, came.hop, admitted)
        return admitted

    def _may_leave_later(self, came: _Came, hop: Hop, admitted: Admitted) -> None:
        """Take note of what has been said of the request, and of how it might be passed on yet."""
        sequence, scope, reply = admitted
        sequence.is_opened = hop.sequence > 0
        if hop.route:
            self._counters.metrics.taken_over.add()
        message, arrival = came.message, came.arrival
        assert isinstance(reply, ReplyStream)

        def leave() -> bool:
            fields = self._reception.read(arrival)
            assert fields is not None, "it has been read before"
            left_s = scope.deadline - trio.current_time()
            now = replace(
                hop,
                request_id=sequence.request_id,
                sequence=reply.sequence,
                left_ms=max(1, math.ceil(1000 * left_s)),
            )
            return self._passes_on(_Came(message, arrival, fields, now), must_leave=True)

        sequence.elsewhere = leave

    def turn_away(self, message: Message, error: WorkerError) -> None:
        """Answer a message that cannot be taken in here, unless another worker takes it."""
        came = self._read(message)
        if came is not None and not self._passes_on(came, must_leave=True):
            self._reception.refuse(came.arrival, error, native.request_id_of(came.fields))

    def _read(self, message: Message) -> _Came | None:
        """None if there is nothing to do any more."""
        is_cancelled = False
        hop: Hop | None
        if subjects.is_forwarded(message.subject, self._worker_id):
            passed = self._hand_on.returned(message)
            if passed is None:
                return None
            message, hop, is_cancelled = passed.message, passed.hop, passed.cancelled
        else:
            hop = self._hop(message)
        arrival = self._arrival(message, message.reply if hop is None else hop.reply_to, hop)
        if arrival is None or not self._names_a_caller(arrival, message.subject):
            return None
        if (fields := self._reception.read(arrival)) is None:
            return None
        if hop is not None and hop.request_id is not None:
            fields["request_id"] = hop.request_id
        if hop is not None and hop.left_ms is not None:
            fields["timeout_ms"] = hop.left_ms
        if is_cancelled:
            error = RequestCancelled("the request was cancelled")
            self._reception.refuse(arrival, error, native.request_id_of(fields))
            return None
        return _Came(message, arrival, fields, hop)

    def _names_a_caller(self, arrival: Arrival, subject: str) -> bool:
        """False, and answered, if the caller that it was sent for cannot be one."""
        if arrival.caller is None or native.CALLER.match(arrival.caller):
            return True
        self._reception.refuse(arrival, _no_caller(subject))
        return False

    def _hop(self, message: Message) -> Hop | None:
        """What is to be said of a request if it is passed on; None if it is meant for us alone."""
        if message.subject == subjects.direct(self._worker_id):
            return read_hop(message.reply, message.headers)
        return Hop(reply_to=message.reply)

    def _passes_on(self, came: _Came, *, must_leave: bool = False) -> bool:
        if came.hop is None:
            return False
        hop = replace(came.hop, caller=came.arrival.caller)
        return self._hand_on.pass_on(came.message, came.fields, hop, must_leave=must_leave)

    def _arrival(
        self, message: Message, reply_subject: str | None, hop: Hop | None
    ) -> Arrival | None:
        """None, and counted, where the caller names no reply subject that is permitted."""
        if not subjects.may_reply_to(reply_subject, self._reply_prefixes):
            self._counters.dropped += 1
            logger.debug("Message dropped: no reply subject, or one that is not permitted")
            return None

        def open_reply(request_id: RequestId, *, is_admitted: bool) -> ReplyStream:
            return ReplyStream(
                self._broker,
                dialect=native,
                subject=reply_subject,
                control_subject=(
                    subjects.control(self._worker_id, request_id) if is_admitted else None
                ),
                request_id=request_id,
                worker_id=self._worker_id,
                sequence=0 if hop is None else hop.sequence,
            )

        origin = subjects.origin_of(message.subject)
        return Arrival(
            body=message.body,
            subject=origin.subject,
            dialect=native,
            open_reply=open_reply,
            reply_subject=reply_subject,
            caller=origin.caller or (None if hop is None else hop.caller),
        )


class _Came(NamedTuple):
    """A request that has been read."""

    message: Message
    arrival: Arrival
    fields: Fields
    hop: Hop | None
    """None: it is meant for this worker alone."""


def _no_caller(subject: str) -> InvalidRequest:
    return InvalidRequest(
        f"the subject {subject} names no caller: after `inference.by.` come up to 64 of "
        "A-Z a-z 0-9 _ -",
        details={"subject": subject},
    )
