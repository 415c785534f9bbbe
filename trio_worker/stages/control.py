"""Ending requests from outside: cancel messages, and the server's word that a caller is gone.

Everything happens inside the broker's callback: ending a request is synchronous, so there is
nothing to buffer and nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import trio
from loguru import logger

from trio_worker.core import subjects
from trio_worker.core.request import RequestId
from trio_worker.core.sequence import Ending
from trio_worker.core.wire import native
from trio_worker.door import Door
from trio_worker.ports import Broker, Message

CANCEL_BODY = b"cancel"


async def run_control(
    *,
    broker: Broker,
    door: Door,
    worker_id: str,
    reply_prefixes: Many[str],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen for ends until cancelled. Started when the subscriptions stand."""

    def on_control(message: Message) -> None:
        request_id = RequestId(message.subject.rpartition(".")[2])
        if message.headers.get("Status") == "503":
            _caller_gone(door, request_id, message.headers.get("Nats-Subject"))
        elif message.body == CANCEL_BODY:
            cancelled = door.end(request_id, Ending.CANCELLED)
            if subjects.may_reply_to(message.reply, reply_prefixes):
                assert message.reply is not None
                body = native.cancel_reply(request_id, cancelled=cancelled)
                broker.publish(Message(subject=message.reply, body=body))

    def on_cancel(message: Message) -> None:
        if (request_id := native.cancelled_id(message.body)) is not None:
            door.end(request_id, Ending.CANCELLED)

    await broker.subscribe(subjects.control(worker_id, "*"), on_control)
    await broker.subscribe(subjects.CANCEL, on_cancel)
    task_status.started()
    await trio.sleep_forever()


def _caller_gone(door: Door, request_id: RequestId, subject: str | None) -> None:
    """The server found nobody to take a message of ours.

    Only what this very request's reply subject met counts: an id may be used again, and the
    503 of an earlier request with it may still be under way.
    """
    sequence = door.admission.in_flight.get(request_id)
    if sequence is not None and sequence.reply_subject == subject:
        logger.bind(request_id=request_id).debug("The caller is gone")
        sequence.end(Ending.CALLER_GONE)
