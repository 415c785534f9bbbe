"""A worker that the monitoring pages can show: nothing behind it."""

from __future__ import annotations

from typing import Any

from trio_worker.monitoring.observed import Health
from trio_worker.monitoring.snapshot import (
    BatchReading,
    EngineReading,
    FleetReading,
    InFlightReading,
    MemberReading,
    Percentiles,
    QueueReading,
    RequestsReading,
    ResourcesReading,
    Snapshot,
    TokensReading,
    WorkerReading,
)
from trio_worker.ports import BrokerStatistics

NONE_YET = Percentiles(p50=None, p95=None, p99=None)


SNAPSHOT = Snapshot(
    worker=WorkerReading(id="w1", version="0.1.0", state="ready", uptime_s=1.0),
    queue=QueueReading(
        depth=3,
        max_depth=100,
        is_full=False,
        by_priority={"high": 3, "low": 0},
        promotions=0,
        waiting_for_place=0,
        callers=1,
    ),
    batch=BatchReading(
        running=2,
        max_batch_size=8,
        turns=10,
        mean_batch_size=1.5,
        max_batch_seen=2,
        last_formation_ms=0.1,
        by_trigger={},
        preemptions=0,
    ),
    resources=ResourcesReading(
        memory_mb=9100.4,
        reserved_mb=1,
        can_accept_request=True,
        under_pressure=True,
        pressure="soft",
        steps=["trim_caches", "hold_low"],
        degradations={},
        available_mb=1000,
        limits={"max_memory_mb": 8192, "critical_memory_mb": 10240},
    ),
    engine=EngineReading(
        pid=1,
        state="ready",
        model="m",
        restarts=0,
        resumed=0,
        context_length=8192,
        cache_bytes_per_token=1,
        device="none",
        memory_active_mb=0,
        memory_cache_mb=0,
    ),
    requests=RequestsReading(
        in_flight=1,
        completed=7,
        by_outcome={"ok": 7},
        by_stage={"decode": 1},
        dropped=0,
        queue_wait_ms=NONE_YET,
        time_to_first_token_ms=NONE_YET,
        inter_token_ms=NONE_YET,
        request_ms=NONE_YET,
        cancel_ms=NONE_YET,
    ),
    tokens=TokensReading(prompt=1, cached=0, generated=70, per_second=12.5),
    fleet=FleetReading(others=2, handed_on={"no_slot": 4}, taken_over=3, returned=1),
    nats=BrokerStatistics(
        url="nats://here",
        connected=True,
        reconnects=0,
        received=1,
        published=1,
        dropped=0,
        unpublished_bytes=0,
        slow_consumers=0,
    ),
)


class FakeWorker:
    def __init__(self) -> None:
        self.live = Health(ok=True, reason="every loop makes progress")
        self.ready = Health(ok=True, reason="accepting requests")
        self.stats: Any = SNAPSHOT
        self.snapshots = 0

    def liveness(self) -> Health:
        return self.live

    def readiness(self) -> Health:
        return self.ready

    def resources(self) -> ResourcesReading:
        return SNAPSHOT.resources

    def snapshot(self) -> Any:
        self.snapshots += 1
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats

    def metrics(self) -> list[Any]:
        return []

    def fleet(self) -> list[MemberReading]:
        return [
            MemberReading(
                id=name,
                model="m",
                slots=8,
                in_flight=3,
                queued=1,
                accepting=True,
                leaving=False,
                version="0.1.0",
                age_s=age_s,
            )
            for name, age_s in (("w1", 0.0), ("w2", 0.4), ("w3", 1.0))
        ]

    def in_flight(self, limit: int | None = None) -> list[InFlightReading]:
        reading = InFlightReading(
            request_id="r1",
            stage="decode",
            priority="high",
            age_s=0.5,
            prompt_tokens=3,
            prefilled=3,
            tokens=2,
            max_tokens=9,
            resumed=0,
            preempted=0,
        )
        return [reading] * min(99, limit or 99)


def fake_exposition(_observed: object, accept: str) -> tuple[bytes, str]:
    return b"up 1\n", "application/openmetrics-text" if "openmetrics" in accept else "text/plain"
