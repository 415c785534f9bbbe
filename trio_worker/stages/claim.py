"""Makes sure that a worker id is used once: asks for it, then answers to it."""

from __future__ import annotations

import trio
from loguru import logger

from trio_worker.errors import ConfigError
from trio_worker.ports import Broker, Message
from trio_worker.wire import subjects

CLAIM_S = 1.0
"""How long an answer may take. Where nobody listens, the server says so at once."""


async def claim_id(broker: Broker, worker_id: str, reply_prefixes: tuple[str, ...]) -> None:
    """Return once the id is ours. Raises `ConfigError` if another worker answers to it."""
    subject = subjects.ping(worker_id)
    inbox = broker.new_inbox()
    send, receive = trio.open_memory_channel[Message](1)

    def first_answer(message: Message) -> None:
        try:
            send.send_nowait(message)
        except trio.WouldBlock:
            return  # one answer says it all

    subscription = await broker.subscribe(inbox, first_answer)
    try:
        broker.publish(Message(subject=subject, reply=inbox))
        with trio.move_on_after(CLAIM_S) as unanswered:
            answer = await receive.receive()
        if not unanswered.cancelled_caught and answer.headers.get("Status") != "503":
            raise ConfigError(
                f"cluster.worker.id: a worker with the id {worker_id} is running on this NATS "
                "already; stop it, or choose another id"
            )
    finally:
        with trio.move_on_after(CLAIM_S, shield=True):
            await subscription.drain()

    def answer_ping(message: Message) -> None:
        if subjects.may_reply_to(message.reply, reply_prefixes):
            broker.publish(Message(subject=message.reply, body=worker_id.encode()))

    await broker.subscribe(subject, answer_ping)
    logger.debug("Worker id {} claimed", worker_id)
