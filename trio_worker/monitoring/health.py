"""Whether a worker lives and is ready, and the reason if it is not."""

from __future__ import annotations

from trio_worker.flow.door import DoorState
from trio_worker.monitoring.heartbeat import Heartbeats
from trio_worker.monitoring.observed import Health
from trio_worker.monitoring.worker_parts import WorkerParts
from trio_worker.ports import EngineState


def liveness_of(heartbeats: Heartbeats, *, now: float) -> Health:
    """Not ok while a loop gives no sign of life within its bound; the reason names it."""
    late = [
        f"{each.loop} has not come round for {each.silent_s(now):.0f} s (bound: {each.bound_s:g} s)"
        for each in heartbeats.late(now)
    ]
    if late:
        return Health(ok=False, reason="stuck: " + ", ".join(late))
    return Health(ok=True, reason="the loops make progress")


def readiness_of(parts: WorkerParts, *, is_subscribed: bool) -> Health:
    """Ok while a request sent now would be taken."""
    if parts.door.state.value is DoorState.OPEN:
        if not is_subscribed:
            return Health(ok=False, reason="loading: not subscribed to requests yet")
        if not parts.broker.statistics().connected:
            return Health(ok=False, reason="nats: the connection is down")
        return Health(ok=True, reason="accepting requests")
    if not parts.admission.draining and parts.engine.statistics().state is EngineState.RESTARTING:
        return Health(ok=False, reason="restarting: the engine was lost and starts again")
    return Health(ok=False, reason=parts.admission.why_not_accepting())
