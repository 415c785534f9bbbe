"""The serving of one model: its engine, its queue, its batch, and how fast that goes.

A worker that serves a second model makes a second one of these, and runs the tasks that drive it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trio_worker.config import WorkerConfig
from trio_worker.core.admission import Admission
from trio_worker.core.batching import Batching, BatchRules
from trio_worker.core.engine_age import EngineAge
from trio_worker.core.fair_shares import FairShares
from trio_worker.core.formation import Formation
from trio_worker.core.memory import PressureGauge, ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.priority import held_most_s, level_of
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.flow.door import Door
from trio_worker.flow.request_channel import (
    PriorityReceiveChannel,
    PrioritySendChannel,
    open_priority_channel,
)
from trio_worker.ports import Engine
from trio_worker.supervisor.restart_budget import RestartBudget
from trio_worker.wire.native import RequestLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What the tasks that serve one model share. Each part says itself who may change it."""

    engine: Engine
    limits: RequestLimits
    """What a request may ask for."""
    default_max_tokens: int
    aging_s: float | None
    """What one priority level is worth in waiting; None: levels do not age."""
    gauge: PressureGauge
    """Of the whole machine: every serving of a worker has the same one."""
    ledger: ReservationLedger
    queue: RequestQueue
    queue_in: PrioritySendChannel
    queue_out: PriorityReceiveChannel
    """Its owner is the batcher."""
    door: Door
    scheduler: Scheduler
    batching: Batching
    rate: ServiceRate
    arrivals: ArrivalRate
    engine_age: EngineAge
    loop_budget: RestartBudget
    """How often the batch loop may fail and start again."""

    @property
    def admission(self) -> Admission:
        return self.door.admission

    @property
    def levels(self) -> int:
        """How many priority levels there are."""
        return self.limits.priority_levels


def make_serving(
    worker: WorkerConfig, *, engine: Engine, gauge: PressureGauge, on_queued: Callable[[], None]
) -> Serving:
    """From the configuration; `on_queued` is called in the step that queues a request."""
    batching, queueing = worker.continuous_batching, worker.request_queue
    slots = batching.max_batch_size if batching.enabled else 1
    aging_s = None if queueing.aging_ms is None else queueing.aging_ms / 1000
    ledger = ReservationLedger(limit_bytes=gauge.critical_bytes)
    # Every place, and room for what leaves the batch for a while.
    shares = FairShares()
    places = queueing.max_depth if queueing.enabled else slots
    queue = RequestQueue(max_size=places + slots, shares=shares)
    queue_in, queue_out = open_priority_channel(queue, on_put=on_queued)
    rate, arrivals = ServiceRate(), ArrivalRate()
    admission = Admission(
        queue_enabled=queueing.enabled,
        max_depth=queueing.max_depth,
        max_per_caller=queueing.max_per_caller,
        reject_when_full=queueing.reject_when_full,
        slots=slots,
        refuse_unmeetable=worker.requests.refuse_unmeetable,
        gauge=gauge,
        queue=queue,
        rate=rate,
        arrivals=arrivals,
    )
    prefill = PrefillBudget(
        chunk_max=batching.prefill_chunk_tokens,
        gap_target_s=worker.engine.token_gap_target_ms / 1000,
    )
    scheduler = Scheduler(slots=slots, prefill=prefill, ledger=ledger, shares=shares)
    rules = _batch_rules(worker, slots, aging_s)
    return Serving(
        engine=engine,
        limits=_request_limits(worker),
        default_max_tokens=worker.requests.default_max_tokens,
        aging_s=aging_s,
        gauge=gauge,
        ledger=ledger,
        queue=queue,
        queue_in=queue_in,
        queue_out=queue_out,
        door=Door(admission),
        scheduler=scheduler,
        batching=Batching(rules, queue=queue, scheduler=scheduler, gauge=gauge),
        rate=rate,
        arrivals=arrivals,
        engine_age=EngineAge(most_tokens=worker.engine.recycle_after_tokens),
        loop_budget=RestartBudget(
            max_restarts=worker.engine.max_restarts, window_s=worker.engine.restart_window_s
        ),
    )


def _batch_rules(worker: WorkerConfig, slots: int, aging_s: float | None) -> BatchRules:
    batching, levels = worker.continuous_batching, worker.request_queue.priority_levels
    return BatchRules(
        formation=Formation(
            min_batch_size=min(batching.min_batch_size, slots),
            timeout_s=batching.batch_timeout_ms / 1000,
            adaptive=batching.adaptive_timeout,
        ),
        preempt=batching.preempt,
        degraded_max_tokens=worker.resource_limits.degraded_max_tokens,
        levels=levels,
        held_most_s=held_most_s(levels, aging_s),
        lead_s=worker.engine.lead_ms / 1000,
    )


def _request_limits(worker: WorkerConfig) -> RequestLimits:
    levels, requests = worker.request_queue.priority_levels, worker.requests
    return RequestLimits(
        model_name=worker.model_name,
        max_tokens_limit=requests.max_tokens_limit,
        default_timeout_ms=requests.default_timeout_ms,
        timeout_limit_ms=requests.timeout_limit_ms,
        max_body_bytes=requests.max_prompt_bytes,
        priority_levels=levels,
        default_buffered=level_of(requests.default_priority.buffered, levels),
        default_streaming=level_of(requests.default_priority.streaming, levels),
        takes_tools=worker.tools != "off",
        allows_lark=requests.allow_lark,
    )
