"""From a message to a request's own task, or to an error reply. Never waits for inference.

Bounds: `INTAKE_BUFFER` messages between the broker's callbacks and this task; a request that does
not fit is answered `QUEUE_FULL` on the spot. Messages on control subjects come through the same
buffer, so that a cancel message does not overtake the request it is about.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeAlias

import trio
from loguru import logger
from trio_util import move_on_when

from trio_worker.core.sequence import Sequence, sequences_of
from trio_worker.errors import SHUTTING_DOWN, QueueFull, WorkerDraining, WorkerError
from trio_worker.flow.door import Door, DoorState
from trio_worker.flow.reply_stream import ReplyStream
from trio_worker.flow.serving import Serving
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat
from trio_worker.ports import Broker, Message, Subscription
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native, subjects

INTAKE_BUFFER = 256
TOGETHER_MAX = 16
"""Messages between two chances for other tasks: well below a millisecond each."""
SUBSCRIPTION_DRAIN_S = 0.5

IntakeBuffer: TypeAlias = tuple[trio.MemorySendChannel[Message], trio.MemoryReceiveChannel[Message]]


class Respond(Protocol):
    """Starts one request's own task: stages/respond.py with everything else filled in."""

    def __call__(
        self, sequence: Sequence, scope: trio.CancelScope, reply: ReplyStream
    ) -> Awaitable[None]: ...


def open_intake_buffer() -> IntakeBuffer:
    return trio.open_memory_channel[Message](INTAKE_BUFFER)


async def run_intake(
    requests: trio.Nursery,
    *,
    serving: Serving,
    broker: Broker,
    respond: Respond,
    buffer: IntakeBuffer,
    act_on_control: Callable[[Message], None],
    worker_id: str,
    reply_prefixes: tuple[str, ...],
    counters: RequestCounters,
    rng: random.Random,
    heartbeat: Heartbeat,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take messages until the door closes; every admitted request becomes a task in `requests`.

    Started when the subscriptions stand. Returns when the door has closed, the subscriptions are
    drained, and everything that had arrived is answered or admitted. Cancelled: messages still
    in the buffer are lost, as they would be in the network.
    """
    reception = _Reception(
        serving,
        broker=broker,
        worker_id=worker_id,
        reply_prefixes=reply_prefixes,
        counters=counters,
        rng=rng,
    )
    send, receive = buffer

    def offer(message: Message) -> None:
        try:
            send.send_nowait(message)
            heartbeat.wake(Awaited.WORK, trio.current_time())
        except trio.WouldBlock:
            reception.refuse(message, QueueFull("more requests arrive than this worker can read"))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            reception.refuse(message, WorkerDraining(SHUTTING_DOWN))

    async with receive, trio.open_nursery() as nursery:
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
                elif (admitted := reception.admit(message)) is not None:
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
    for subject in subjects.shared(model_name):
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


class _Reception:
    """The synchronous part: reads a message, and lets the request in or answers why not."""

    def __init__(
        self,
        serving: Serving,
        *,
        broker: Broker,
        worker_id: str,
        reply_prefixes: tuple[str, ...],
        counters: RequestCounters,
        rng: random.Random,
    ) -> None:
        self._serving = serving
        self._broker = broker
        self._worker_id = worker_id
        self._reply_prefixes = reply_prefixes
        self._counters = counters
        self._rng = rng
        self._arrivals = itertools.count()

    def admit(self, message: Message) -> tuple[Sequence, trio.CancelScope, ReplyStream] | None:
        """What the request's task needs, or None if there will be no task.

        Of a request with several choices, the sequence is that of the first.

        Then the caller has been answered, unless the reply subject is not one to answer to.
        """
        reply_subject = self._reply_subject(message)
        if reply_subject is None:
            return None
        request_id: RequestId | None = None
        try:
            fields = native.parse_body(message.body, self._serving.limits)
            request_id = native.request_id_of(fields)
            request = native.to_request(
                fields,
                self._serving.limits,
                request_id=request_id or self._draw_id(),
                draw_seed=lambda: self._rng.randrange(native.SEED_END),
            )
            now = trio.current_time()
            scope = trio.CancelScope(deadline=now + request.timeout_s)
            sequence = sequences_of(
                request,
                subject=message.subject,
                reply_subject=reply_subject,
                arrivals=self._arrivals,
                arrived_at=now,
                aging_s=self._serving.aging_s,
                scope=scope,
            )
            self._serving.door.admit(sequence)
        except WorkerError as error:
            self._answer(message, reply_subject, request_id or self._draw_id(), error)
            return None
        logger.bind(request_id=request.request_id).debug(
            "Request admitted: model {}, priority {}, depth {}{}",
            self._serving.limits.model_name,
            request.priority,
            self._serving.door.admission.depth,
            "" if request.caller is None else f", caller {request.caller}",
        )
        reply = ReplyStream(
            self._broker,
            subject=reply_subject,
            control_subject=subjects.control(self._worker_id, request.request_id),
            request_id=request.request_id,
            worker_id=self._worker_id,
        )
        return sequence, scope, reply

    def refuse(self, message: Message, error: WorkerError) -> None:
        """Answer a message that is not even read."""
        if (subject := self._reply_subject(message)) is not None:
            self._answer(message, subject, self._draw_id(), error)

    def _reply_subject(self, message: Message) -> str | None:
        """Where to answer. None, and counted, where the caller names nothing that is permitted."""
        if subjects.may_reply_to(message.reply, self._reply_prefixes):
            return message.reply
        self._counters.dropped += 1
        logger.debug("Message dropped: no reply subject, or one that is not permitted")
        return None

    def _answer(
        self, message: Message, subject: str, request_id: RequestId, error: WorkerError
    ) -> None:
        self._counters.answer(message.subject, error)
        self._counters.metrics.rejections.add(labels=(error.code.value,))
        logger.bind(request_id=request_id, outcome=error.code.value).debug(
            "Request refused: {}: {}", error.code, error.message
        )
        ReplyStream(
            self._broker,
            subject=subject,
            control_subject=None,
            request_id=request_id,
            worker_id=self._worker_id,
        ).fail(error, retry_after_ms=self._serving.door.admission.retry_after_ms())

    def _draw_id(self) -> RequestId:
        return RequestId(f"{self._rng.getrandbits(128):032x}")
