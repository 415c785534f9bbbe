"""Takes the readings of a worker: one function for each part of the snapshot."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import msgspec

from trio_worker import __version__
from trio_worker.core.memory import MB, DegradationStep, Pressure
from trio_worker.core.priority import name_of
from trio_worker.flow.own_beat import own_beat
from trio_worker.monitoring.snapshot import (
    BatchReading,
    EngineReading,
    FleetReading,
    InFlightReading,
    JobsReading,
    MemberReading,
    QueueReading,
    RequestsReading,
    ResourcesReading,
    Snapshot,
    TokensReading,
    WorkerReading,
)
from trio_worker.monitoring.worker_parts import WorkerParts


def snapshot_of(parts: WorkerParts, *, now: float, started_at: float) -> Snapshot:
    return Snapshot(
        worker=_worker(parts, uptime_s=now - started_at),
        queue=_queue(parts),
        batch=_batch(parts),
        resources=resources_of(parts),
        engine=_engine(parts),
        requests=_requests(parts),
        tokens=_tokens(parts, now=now),
        fleet=_fleet(parts, now=now),
        nats=parts.broker.statistics(),
        jobs=_jobs(parts),
    )


def resources_of(parts: WorkerParts) -> ResourcesReading:
    """Memory against its limits, and what is done about it."""
    gauge, limits = parts.admission.gauge, parts.config.resource_limits
    degradations = parts.counters.metrics.degradations.values
    return ResourcesReading(
        memory_mb=round(gauge.used / MB, 1),
        reserved_mb=round(parts.scheduler.ledger.reserved_bytes / MB, 1),
        can_accept_request=gauge.level is not Pressure.CRITICAL,
        under_pressure=gauge.level is not Pressure.NORMAL,
        pressure=gauge.level,
        steps=[step for step in DegradationStep if step in gauge.steps],
        degradations={step: count for (step,), count in degradations.items() if count},
        available_mb=round(gauge.available / MB, 1),
        limits={
            "max_memory_mb": limits.max_memory_mb,
            "critical_memory_mb": limits.critical_memory_mb,
        },
    )


def in_flight_of(parts: WorkerParts, *, now: float, limit: int | None) -> list[InFlightReading]:
    """The requests in flight, the oldest first, at most `limit`; neither prompts nor answers."""
    levels = parts.config.request_queue.priority_levels
    return [
        InFlightReading(
            request_id=each.request_id,
            stage=each.stage,
            priority=name_of(each.level, levels),
            age_s=round(now - each.arrived_at, 3),
            prompt_tokens=len(each.prompt),
            prefilled=each.prefilled,
            tokens=len(each.produced),
            max_tokens=each.max_tokens,
            resumed=each.resumed,
            preempted=each.preempted,
        )
        for each in islice(parts.admission.in_flight.values(), limit)
    ]


def member_of(beat: msgspec.Struct, age_s: float) -> MemberReading:
    """A worker by its beat (wire/beats.py), which is so many seconds old."""
    return MemberReading(**msgspec.structs.asdict(beat), age_s=round(age_s, 3))


def fleet_of(parts: WorkerParts, *, now: float) -> list[MemberReading]:
    """The workers that are known, by id, this one among them."""
    own = own_beat(parts.door, worker_id=parts.config.id, model=parts.config.model_name)
    return [
        member_of(beat, age_s)
        for beat, age_s in sorted(
            [(own, 0.0), *parts.live.others(now)], key=lambda known: known[0].id
        )
    ]


def depth_by_priority(parts: WorkerParts) -> dict[str, int]:
    """Queued requests of every level there is, the most urgent first."""
    levels = parts.config.request_queue.priority_levels
    by_level = parts.queue.by_level()
    return {name_of(level, levels): by_level.get(level, 0) for level in range(levels)}


def _worker(parts: WorkerParts, *, uptime_s: float) -> WorkerReading:
    draining = parts.admission.draining
    return WorkerReading(
        id=parts.config.id,
        version=__version__,
        state="draining" if draining else parts.engine.statistics().state,
        uptime_s=round(uptime_s, 3),
    )


def _jobs(parts: WorkerParts) -> JobsReading | None:
    if parts.jobs_held is None or parts.jobs_troubles is None:
        return None
    events = Counter[str]()
    for (what, _), count in parts.counters.metrics.jobs.values.items():
        events[what] += count
    return JobsReading(
        beside=parts.jobs_held.beside,
        events=dict(events),
        trouble=parts.jobs_troubles.line,
    )


def _queue(parts: WorkerParts) -> QueueReading:
    admission = parts.admission
    return QueueReading(
        depth=admission.depth,
        max_depth=admission.max_depth,
        is_full=admission.is_full,
        by_priority=depth_by_priority(parts),
        promotions=parts.queue.promotions,
        waiting_for_place=admission.waiting,
        callers=parts.queue.callers(),
    )


def _batch(parts: WorkerParts) -> BatchReading:
    batches = parts.batches
    return BatchReading(
        running=len(parts.scheduler.running),
        max_batch_size=parts.scheduler.slots,
        turns=batches.turns,
        mean_batch_size=round(batches.decoded / max(batches.decode_turns, 1), 3),
        max_batch_seen=batches.max_batch_seen,
        last_formation_ms=round(batches.last_formation_ms, 3),
        by_trigger=dict(batches.by_trigger),
        preemptions=parts.counters.metrics.preemptions.total(),
    )


def _engine(parts: WorkerParts) -> EngineReading:
    engine, memory = parts.engine.statistics(), parts.batches.engine_memory
    info = engine.info
    return EngineReading(
        pid=engine.pid,
        state=engine.state,
        model=parts.config.model_name,
        restarts=engine.restarts,
        resumed=parts.counters.metrics.resumed.total(),
        context_length=info.context_length if info else None,
        cache_bytes_per_token=(info.cache_bytes_per_token if info else 0) or None,
        device=info.device if info else None,
        memory_active_mb=round(memory.active / MB, 1),
        memory_cache_mb=round(memory.cache / MB, 1),
    )


def _requests(parts: WorkerParts) -> RequestsReading:
    counters, in_flight = parts.counters, parts.admission.in_flight
    return RequestsReading(
        in_flight=len(in_flight),
        completed=counters.by_outcome["ok"],
        by_outcome=dict(counters.by_outcome),
        by_stage=dict(Counter(each.stage.value for each in in_flight.values())),
        dropped=counters.dropped,
        queue_wait_ms=counters.queue_wait.percentiles_ms(),
        time_to_first_token_ms=counters.time_to_first_token.percentiles_ms(),
        inter_token_ms=counters.inter_token.percentiles_ms(),
        request_ms=counters.request.percentiles_ms(),
        cancel_ms=counters.cancel.percentiles_ms(),
    )


def _tokens(parts: WorkerParts, *, now: float) -> TokensReading:
    written = parts.counters.metrics
    return TokensReading(
        prompt=written.prompt_tokens.total(),
        cached=written.cached_tokens.total(),
        generated=written.generated_tokens.total(),
        per_second=round(parts.counters.throughput.per_second(now=now), 3),
    )


def _fleet(parts: WorkerParts, *, now: float) -> FleetReading:
    written = parts.counters.metrics
    return FleetReading(
        others=sum(1 for _ in parts.live.others(now)),
        handed_on={reason: count for (reason,), count in written.handed_on.values.items()},
        taken_over=written.taken_over.total(),
        returned=written.returned.total(),
    )
