"""How this worker is, as the rest of the fleet is told."""

from __future__ import annotations

from trio_worker import __version__
from trio_worker.flow.door import Door, DoorState
from trio_worker.wire.beats import Beat


def own_beat(door: Door, *, worker_id: str, model: str) -> Beat:
    """As of now."""
    admission = door.admission
    return Beat(
        id=worker_id,
        model=model,
        slots=admission.slots,
        in_flight=len(admission.in_flight),
        queued=admission.depth + admission.waiting,
        accepting=door.state.value is DoorState.OPEN,
        leaving=admission.draining,
        version=__version__,
    )
