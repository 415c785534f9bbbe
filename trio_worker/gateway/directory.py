"""Which workers there are, by their own word: all are asked every few seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from trio_worker.gateway.models import Limits, Offer, limits_of, read_offer
from trio_worker.ports import Broker, Message

ASK_EVERY_S = 2.0
FORGET_AFTER_S = 7.0
"""Whoever has not answered three times is not there."""
WORKERS_MAX = 1000
"""More are not remembered."""
ANSWER_S = 0.5
"""For who asks once: more than workers take to answer."""
LEAVE_S = 1.0
INFO_SUBJECT = "$SRV.INFO.trio-worker"


@dataclass(slots=True)
class _Heard:
    offer: Offer
    at: float


class Directory:
    """Its state: the last word of each worker."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._heard: dict[str, _Heard] = {}

    @property
    def offers(self) -> Sequence[Offer]:
        """Of the workers that are there."""
        since = trio.current_time() - FORGET_AFTER_S
        return [each.offer for each in self._heard.values() if each.at >= since]

    def limits_of(self, model: str | None) -> Limits:
        """What holds for a request for this model. Raises `ModelNotFound`."""
        return limits_of(self.offers, model)

    async def keep(
        self, broker: Broker, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Ask until cancelled. Started when everybody has been asked for the first time."""
        inbox = broker.new_inbox()
        await broker.subscribe(inbox, self.take)
        ask = partial(broker.publish, Message(subject=INFO_SUBJECT, reply=inbox))
        ask()
        task_status.started()
        while True:
            await trio.sleep(ASK_EVERY_S)
            self._forget()
            ask()

    def take(self, message: Message) -> None:
        """An answer; what is none, such as the word that nobody listens, is passed over."""
        offer = read_offer(message.body, since=int(self._wall_clock()))
        if offer is None:
            return
        known = self._heard.get(offer.worker_id)
        if known is None:
            if len(self._heard) < WORKERS_MAX:
                self._heard[offer.worker_id] = _Heard(offer, trio.current_time())
            return
        if known.offer.model == offer.model:
            # Since when it has been there is what it was first heard of.
            offer = replace(offer, since=known.offer.since)
        known.offer, known.at = offer, trio.current_time()

    async def ask_once(self, broker: Broker) -> None:
        """Ask who there is, for whoever does not `keep` asking.

        Returns `ANSWER_S` later at the latest; before, if somebody has answered and what came
        together with it is read. Cancelled: nothing is left.
        """
        inbox, is_heard = broker.new_inbox(), trio.Event()

        def take(message: Message) -> None:
            self.take(message)
            is_heard.set()

        subscription = await broker.subscribe(inbox, take)
        try:
            broker.publish(Message(subject=INFO_SUBJECT, reply=inbox))
            with trio.move_on_after(ANSWER_S):
                await is_heard.wait()
                await broker.flush()
        finally:
            with trio.move_on_after(LEAVE_S, shield=True):
                await subscription.drain()

    def _forget(self) -> None:
        since = trio.current_time() - FORGET_AFTER_S
        self._heard = {name: each for name, each in self._heard.items() if each.at >= since}
