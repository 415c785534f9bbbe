"""Ending requests from outside: cancel messages, and the server's word that a caller is gone.

Acting on such a message is synchronous, so there is nothing to wait for. It goes through intake's
buffer all the same, while there is one with room: a cancel message must not overtake its request.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from loguru import logger

from trio_worker.core.sequence import Ending
from trio_worker.flow.door import Door, DoorState
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat
from trio_worker.ports import Broker, Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native, subjects


class Control:
    """Acts on messages about requests in flight."""

    def __init__(
        self,
        broker: Broker,
        door: Door,
        reply_prefixes: tuple[str, ...],
        cancel_on_its_way: Callable[[RequestId], bool],
    ) -> None:
        """`cancel_on_its_way` ends a request that has just been passed to another worker, if so."""
        self._broker = broker
        self._door = door
        self._reply_prefixes = reply_prefixes
        self._cancel_on_its_way = cancel_on_its_way

    def act(self, message: Message) -> None:
        """End the request that the message is about, if it says so and there is one."""
        if message.subject == subjects.CANCEL:
            named = native.cancelled_id(message.body)
            if named is not None and not self._door.end(named, Ending.CANCELLED):
                self._cancel_on_its_way(named)
            return
        request_id = RequestId(message.subject.rpartition(".")[2])
        if message.headers.get("Status") == "503":
            self._caller_gone(request_id, message.headers.get("Nats-Subject"))
        elif message.body == native.CANCEL_BODY:
            cancelled = self._door.end(request_id, Ending.CANCELLED) or self._cancel_on_its_way(
                request_id
            )
            if subjects.may_reply_to(message.reply, self._reply_prefixes):
                body = native.cancel_reply(request_id, cancelled=cancelled)
                self._broker.publish(Message(subject=message.reply, body=body))

    def _caller_gone(self, request_id: RequestId, subject: str | None) -> None:
        """The server found nobody to take a message of ours.

        Only what this very request's reply subject met counts: an id may be used again, and the
        503 of an earlier request with it may still be under way.
        """
        sequence = self._door.admission.in_flight.get(request_id)
        if sequence is not None and sequence.reply_subject == subject:
            logger.bind(request_id=request_id).debug("The caller is gone")
            sequence.end(Ending.CALLER_GONE)


async def run_control(
    control: Control,
    *,
    broker: Broker,
    door: Door,
    worker_id: str,
    intake: trio.MemorySendChannel[Message],
    heartbeat: Heartbeat,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen until cancelled. Started when the subscriptions stand.

    Messages go into `intake`, a clone of its own, until the door closes; from then on, and while
    it is full, they are acted on here: a request that such a message may overtake is refused
    anyhow. `heartbeat` is intake's.
    """

    def take(message: Message) -> None:
        try:
            intake.send_nowait(message)
            heartbeat.wake(Awaited.WORK, trio.current_time())
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            control.act(message)

    with intake:
        await broker.subscribe(subjects.control(worker_id, "*"), take)
        await broker.subscribe(subjects.CANCEL, take)
        task_status.started()
        await door.state.wait_value(lambda state: state is DoorState.CLOSED)
    await trio.sleep_forever()
