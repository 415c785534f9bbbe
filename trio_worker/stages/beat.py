"""Says how this worker is, and hears how the others are.

Regularly, and soon after a change, though at most ten times a second: what others decide by it is
as old as that. The goodbye is the first thing that a drain does.
"""

from __future__ import annotations

from functools import partial

import trio
import trio_util
from loguru import logger

from trio_worker.flow.door import Door
from trio_worker.flow.hand_on import HandOn
from trio_worker.flow.own_beat import own_beat
from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.ports import Broker, Message
from trio_worker.wire import beats, subjects
from trio_worker.wire.beats import Beat

CHANGE_S = 0.1
"""How long a change waits for others, so that a burst of requests is one beat."""


class OwnBeat:
    """What this worker says. Its state: what it said last."""

    def __init__(self, broker: Broker, door: Door, *, worker_id: str, model: str) -> None:
        self._broker = broker
        self._subject = subjects.beat(worker_id)
        self._reading = partial(own_beat, door, worker_id=worker_id, model=model)
        self._said: Beat | None = None

    @property
    def has_news(self) -> bool:
        return self._reading() != self._said

    def say(self) -> None:
        """Put a beat into the outbox; without a connection none, it would come out of date."""
        self._said = self._reading()
        if self._broker.statistics().connected:
            body = beats.encode(self._said)
            self._broker.publish(Message(subject=self._subject, body=body))


async def run_beat(
    own: OwnBeat,
    *,
    broker: Broker,
    door: Door,
    hand_on: HandOn,
    ready: trio.Event,
    heartbeat: Heartbeat,
    interval_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Say every `interval_s` how this worker is, from `ready` on; until cancelled.

    Started when the beats of others are heard. Who is heard for the first time hears of us at
    once. Cancelled: beats are heard until the connection ends.
    """
    newcomers = trio_util.RepeatedEvent()

    def take(message: Message) -> None:
        beat = beats.decode(message.subject, message.body)
        if beat is not None and hand_on.live.heard(beat, trio.current_time()):
            newcomers.set()

    async def come_news() -> None:
        # Who is alone tells nobody: once a second will do for those who look on.
        while not own.has_news or not hand_on.live.has_others(trio.current_time()):
            await door.changed.wait()

    await broker.subscribe(subjects.beat("*"), take)
    task_status.started()
    await ready.wait()
    has_warned = False
    while True:
        heartbeat.beat(trio.current_time())
        own.say()
        hand_on.forget_taken()
        with trio.move_on_after(interval_s):
            await trio_util.wait_any(come_news, newcomers.wait)
            await trio.sleep(CHANGE_S)
        if not hand_on.is_proven and hand_on.enabled and not has_warned:
            has_warned = True
            logger.warning(
                "Requests are not passed on to other workers: the server does not let us publish "
                "to inference.*, or says nothing where nobody listens. Grant the user of nats.url "
                "that permission, or set fleet.hand_on to false."
            )
