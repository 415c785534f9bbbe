"""The door: core's admission with the waiting that belongs to it.

Every change of what decides about admission goes through here, so that `state` (what membership
in the queue group and readiness follow) is set in the same synchronous section.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import trio
from trio_util import AsyncValue

from trio_worker.core.admission import Admission
from trio_worker.core.sequence import Ending, Sequence, Stage
from trio_worker.protocol.turn import RequestId


class DoorState(StrEnum):
    OPEN = "open"
    """Callers should come here."""
    PAUSED = "paused"
    """Callers had better ask elsewhere for the moment; who asks all the same may be let in."""
    CLOSED = "closed"
    """For good: the worker drains."""


class Door:
    """`admission` may be read by anyone and is changed only here."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.state: AsyncValue[DoorState] = AsyncValue(DoorState.PAUSED)
        self._next_change: trio.Event | None = None
        """Where somebody has asked for it."""
        self._places: dict[RequestId, trio.Event] = {}
        """One event for each request that waits for its places; bound: max_depth."""

    @property
    def changed(self) -> trio.Event:
        """Set at the next change of anything that decides about admission, memory included."""
        if self._next_change is None:
            self._next_change = trio.Event()
        return self._next_change

    def admit(self, sequence: Sequence) -> None:
        """Take a request in, or raise the `WorkerError` that speaks against it. Synchronous."""
        if (refusal := self.admission.refusal(sequence)) is not None:
            raise refusal
        self.admission.enter(sequence)
        if sequence.stage is Stage.WAITING:
            self._places[sequence.request_id] = trio.Event()
        self._changed()

    async def wait_place(self, sequence: Sequence) -> None:
        """Return once the request holds its places; a checkpoint.

        Cancelled: it holds none, or has been given them meanwhile. Either way `leave` puts things
        right.
        """
        place = self._places.get(sequence.request_id)
        if place is None:
            await trio.lowlevel.checkpoint()
        else:
            await place.wait()

    def batched(self, row: Sequence) -> None:
        """A choice of a request has entered the batch: its place is free."""
        self._grant(self.admission.batched(row))

    def leave(self, sequence: Sequence) -> None:
        """The request has ended."""
        self._places.pop(sequence.request_id, None)
        self._grant(self.admission.leave(sequence))

    def set_engine_ready(self, *, ready: bool) -> None:
        self.admission.engine_ready = ready
        self._changed()

    def pressure_changed(self) -> None:
        """The gauge was read."""
        self._changed()

    def close(self) -> None:
        """Drain: from now on every arrival is refused with `WORKER_DRAINING`."""
        self.admission.draining = True
        self._changed()

    def end(self, request_id: RequestId, ending: Ending) -> bool:
        """End a request in flight; False if there is none of this id."""
        sequence = self.admission.in_flight.get(request_id)
        if sequence is None or sequence.leader is not None or sequence.stage is Stage.ENDED:
            return False
        sequence.end(ending)
        return True

    def _grant(self, followers: Iterable[Sequence]) -> None:
        for each in followers:
            self._places.pop(each.request_id).set()
        self._changed()

    def _changed(self) -> None:
        if self._next_change is not None:
            self._next_change.set()
            self._next_change = None
        state = DoorState.OPEN if self.admission.assess() else DoorState.PAUSED
        if self.admission.draining:
            state = DoorState.CLOSED
        if state is not self.state.value:
            self.state.value = state
