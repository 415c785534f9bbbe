"""Passing requests on to other workers: core's choice, with what is known here, and the message.

A request is passed on as it came in, to the subject of the worker that is chosen. Its answer goes
from there straight to the caller. The message's own reply subject is this worker's: there the
server says if nobody listens any more, and then the request is here again as if it had just come.
That is why nothing is run twice: who passes a request on has not begun with it, and has it back
only where nobody has received it.
"""

from __future__ import annotations

from dataclasses import replace

import trio
from loguru import logger

from trio_worker.core.hand_on import Asking, Place, Reason, next_hop
from trio_worker.core.memory import Pressure
from trio_worker.core.prefix_order import PrefixKeys, digest, in_order
from trio_worker.core.request import CHOICES_MAX
from trio_worker.errors import MessageTooLarge
from trio_worker.flow.door import Door, DoorState
from trio_worker.flow.live_set import LiveSet
from trio_worker.flow.passed_on import PROBE, Passed, PassedOn
from trio_worker.monitoring.metrics import Metrics
from trio_worker.ports import Broker, Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native, subjects
from trio_worker.wire.handed_on import Hop, with_hop
from trio_worker.wire.native import Fields
from trio_worker.wire.prompt_keys import keys_of

SETTLE_S = 0.5
"""How long the end of a worker waits at most for what the server says of what it passed on."""
UNPUBLISHED_BYTES_MAX = 2**22
"""While more than this waits in the outbox, nothing is passed on."""


class HandOn:
    """Its state: what has been passed on of late, and whether passing on works at all.

    `live` may be read by anyone; who listens to the beats writes it.
    """

    def __init__(
        self,
        broker: Broker,
        door: Door,
        live: LiveSet,
        *,
        worker_id: str,
        model: str,
        enabled: bool,
        metrics: Metrics,
    ) -> None:
        self.live = live
        self.enabled = enabled
        self.is_proven = False
        """The server has answered the probe: we may publish to workers, and are told of absence."""
        self._broker = broker
        self._door = door
        self._worker_id = worker_id
        self._model = model
        self._metrics = metrics
        self._passed_on = PassedOn()

    # --- passing on -----------------------------------------------------------------------

    def pass_on(
        self, message: Message, fields: Fields, hop: Hop, *, must_leave: bool = False
    ) -> bool:
        """Pass a request on if another worker is the better place; False if it is ours.

        `hop` has the reply subject that was checked, and what others have said of the request;
        `must_leave` says that it cannot be taken in here. Synchronous.
        """
        now = trio.current_time()
        if not self._may_pass(fields, now):
            return False
        rows, own = _rows(fields), self._own_place()
        may_keep = not must_leave and self._may_keep(rows)
        keys = keys_of(fields, len(message.body))
        if keys is None and may_keep and own.has_slot(rows):
            return False  # what the choice would come to, without looking at all the others
        others = self.live.places(now)
        asking = Asking(
            rows=rows,
            rank=self._rank(keys, others),
            has_home=keys is not None,
            route=hop.route,
        )
        target = next_hop(asking, own, others, may_keep=may_keep)
        request_id = hop.request_id or native.request_id_of(fields)
        if target is None or not self._sent(message, request_id, hop, target, now):
            return False
        self.live.sent(target, rows)
        reason = self._reason(own, rows, may_keep=may_keep)
        self._metrics.handed_on.add(labels=(reason.value,))
        named = {} if request_id is None else {"request_id": request_id}
        logger.bind(**named).debug("Request passed on to {}: {}", target, reason.value)
        return True

    def _may_pass(self, fields: Fields, now: float) -> bool:
        return (
            self.enabled
            and self.is_proven
            and self.live.has_others(now)
            and fields.get("model") in (None, self._model)
        )

    def _is_heard(self) -> bool:
        """Whether the server hears us now: what waits in the outbox cannot come back from there."""
        now = self._broker.statistics()
        return now.connected and now.unpublished_bytes <= UNPUBLISHED_BYTES_MAX

    def _may_keep(self, rows: int) -> bool:
        """Whether there is room for a request of so many choices, with a wait if need be."""
        admission = self._door.admission
        return not (
            admission.draining
            or admission.is_full_for(min(rows, admission.max_depth))
            or admission.gauge.level is Pressure.CRITICAL
        )

    def _own_place(self) -> Place:
        admission = self._door.admission
        return Place(
            id=self._worker_id,
            slots=admission.slots,
            in_flight=len(admission.in_flight),
            accepting=self._door.state.value is DoorState.OPEN,
        )

    def _rank(self, keys: PrefixKeys | None, others: list[Place]) -> dict[str, int]:
        """Without keys another one each time, lest all who choose choose the same."""
        if keys is None:
            drawn = digest(self._worker_id.encode(), str(self._passed_on.latest).encode())
            keys = PrefixKeys(system=drawn, conversation=drawn)
        order = in_order(keys, [self._worker_id, *(each.id for each in others)])
        return {worker_id: rank for rank, worker_id in enumerate(order)}

    def _sent(
        self, message: Message, request_id: RequestId | None, hop: Hop, target: str, now: float
    ) -> bool:
        """False, and nothing has left, if the server does not hear us or would not take it."""
        if not self._is_heard():
            return False
        number = self._passed_on.next_number()
        onward = replace(hop, route=(*hop.route, self._worker_id))
        outlet = self._broker.open_outlet(
            subjects.direct(target),
            reply=subjects.forwarded(self._worker_id, number),
            headers=with_hop(message.headers, onward),
        )
        try:
            outlet.publish(message.body, {})
        except MessageTooLarge:
            return False
        self._passed_on.keep(
            number,
            Passed(
                message=message,
                hop=hop,
                target=target,
                request_id=request_id,
                at=now,
            ),
        )
        return True

    def _reason(self, own: Place, rows: int, *, may_keep: bool) -> Reason:
        if self._door.admission.draining:
            return Reason.DRAINING
        if not may_keep:
            return Reason.NO_ROOM
        return Reason.PREFIX if own.has_slot(rows) else Reason.NO_SLOT

    # --- what becomes of it ---------------------------------------------------------------

    def returned(self, status: Message) -> Passed | None:
        """What the server says that nobody has taken; None if it is not about a request of ours."""
        if status.headers.get("Status") != "503":
            return None
        number = status.subject.rpartition(".")[2]
        if number == str(PROBE):
            self.is_proven = True
            return None
        passed = self._passed_on.take(int(number)) if number.isdecimal() else None
        if passed is not None:
            self.live.gone(passed.target)
            self._metrics.returned.add()
            logger.debug("Request came back: nobody listens for {}", passed.target)
        return passed

    async def probe(self) -> None:
        """Ask the server whether passing on works, while nobody listens on our own subject yet.

        Returns when the server has been asked; its word is heard by `returned`.
        """
        self._broker.publish(
            Message(
                subject=subjects.direct(self._worker_id),
                reply=subjects.forwarded(self._worker_id, PROBE),
            )
        )
        await self._broker.flush()

    def cancel(self, request_id: RequestId) -> bool:
        """A caller cancels a request that may be on its way: send the cancel message after it.

        Who takes the request hears it again behind it, and so does whoever it passes it on to.
        Returns whether it was passed on here, of late, and was not cancelled yet.
        """
        was_here = self._passed_on.cancel(request_id)
        if was_here:
            body = native.cancel_by_id(request_id)
            self._broker.publish(Message(subject=subjects.CANCEL, body=body))
        return was_here

    def forget_taken(self) -> None:
        """Forget what has been taken. To be called every now and then."""
        now = trio.current_time()
        if not self._broker.statistics().connected:
            self._passed_on.keep_all(now)
        self._passed_on.forget(now)

    async def settle(self) -> None:
        """Return when the server has had its say about all that was passed on, or after a moment.

        What comes back is passed on again or answered where the server's word is heard.
        Cancelled: what the server would have said is not heard.
        """
        with trio.move_on_after(SETTLE_S):
            latest = -1
            while len(self._passed_on) and latest != self._passed_on.latest:
                latest = self._passed_on.latest
                # The word is there before the first answer, and was heard before the second.
                await self._broker.flush()
                await self._broker.flush()


def _rows(fields: Fields) -> int:
    n = fields.get("n")
    return n if isinstance(n, int) and 1 <= n <= CHOICES_MAX else 1
