"""The batch loop: wait for work, plan, one turn of the engine, hand out tokens.

It never waits for a caller: a token channel has room for every token its request may get.
"""

from __future__ import annotations

import trio
from loguru import logger

from trio_worker.core.counters import BatchCounters, RequestCounters
from trio_worker.core.formation import Formation, Trigger
from trio_worker.core.rates import ArrivalRate
from trio_worker.core.scheduler import Delivery, Scheduler
from trio_worker.core.sequence import Sequence
from trio_worker.core.turn import Output, Report
from trio_worker.door import Door
from trio_worker.errors import EngineLost
from trio_worker.ports import Engine
from trio_worker.priority_channel import PriorityReceiveChannel


async def run_batcher(
    queue: PriorityReceiveChannel,
    *,
    engine: Engine,
    scheduler: Scheduler,
    door: Door,
    formation: Formation,
    arrivals: ArrivalRate,
    batches: BatchCounters,
    counters: RequestCounters,
) -> None:
    """Run until cancelled, or until the queue ends. Owns the queue's end and the running set.

    When the engine is lost, running sequences stay in the running set, and go back into the
    batch with the tokens they have once the engine is ready again.
    """
    with queue:
        logger.debug("Batcher started")
        while True:
            trigger = Trigger.RUNNING
            if not scheduler.has_work:
                try:
                    trigger = await _wait_for_batch(queue, formation, arrivals)
                except trio.EndOfChannel:
                    return
            _fill(queue, scheduler, door, batches=batches, counters=counters, trigger=trigger)
            try:
                await _turn(engine, scheduler, batches, counters)
            except EngineLost as lost:
                logger.warning(
                    "Engine lost ({}) with {} requests aboard", lost.reason, len(scheduler.running)
                )
                _hand_out(scheduler.lost(blameless=lost.reason == "planned"))
                await engine.wait_ready()


async def _wait_for_batch(
    queue: PriorityReceiveChannel, formation: Formation, arrivals: ArrivalRate
) -> Trigger:
    """Wait for the first request, and then as long for more as the rule says."""
    while True:
        await queue.wait_depth(1)
        first = queue.first()
        first_at = first.queued_at if first is not None else None
        while len(queue):
            now = trio.current_time()
            decision = formation.decide(
                now=now,
                waiting=len(queue),
                first_at=now if first_at is None else first_at,
                mean_gap_s=arrivals.mean_gap_s,
            )
            if isinstance(decision, Trigger):
                return decision
            with trio.move_on_at(decision.until) as patience:
                await queue.wait_depth(len(queue) + 1)
            if patience.cancelled_caught and len(queue):
                return decision.trigger


def _fill(
    queue: PriorityReceiveChannel,
    scheduler: Scheduler,
    door: Door,
    *,
    batches: BatchCounters,
    counters: RequestCounters,
    trigger: Trigger,
) -> None:
    """Give the free slots to the head of the queue. Synchronous up to the turn that follows."""
    now = trio.current_time()
    entered: list[Sequence] = []
    while scheduler.free_slots and len(queue):
        sequence = queue.receive_nowait()
        scheduler.enter(sequence, now=now)
        door.batched(sequence)
        counters.queue_wait_ms.add(1000 * (now - sequence.arrived_at))
        entered.append(sequence)
    if entered:
        queued_at = min(each.queued_at or now for each in entered)
        batches.by_trigger[trigger] += 1
        batches.last_formation_ms = 1000 * (now - queued_at)
        logger.debug("{} requests entered the batch: {}", len(entered), trigger)


async def _turn(
    engine: Engine, scheduler: Scheduler, batches: BatchCounters, counters: RequestCounters
) -> None:
    work = scheduler.plan()
    batches.turn_began_at = trio.current_time()
    try:
        report = await engine.turn(work)
    finally:
        batches.turn_began_at = None
    now = trio.current_time()
    for output in report.outputs:
        _sample(scheduler, output, counters, now)
    deliveries = scheduler.book(report, now=now)
    _hand_out(deliveries)
    _count(report, batches, counters, now)


def _sample(scheduler: Scheduler, output: Output, counters: RequestCounters, now: float) -> None:
    """Latencies, before the booking moves the times on."""
    sequence = scheduler.running.get(output.request_id)
    if sequence is None:
        return
    if sequence.last_token_at is None:
        counters.time_to_first_token_ms.add(1000 * (now - sequence.arrived_at))
    else:
        counters.inter_token_ms.add(1000 * (now - sequence.last_token_at))


def _hand_out(deliveries: list[Delivery]) -> None:
    for delivery in deliveries:
        assert delivery.sequence.outputs is not None
        delivery.sequence.outputs.send_nowait(delivery.output)


def _count(report: Report, batches: BatchCounters, counters: RequestCounters, now: float) -> None:
    decoded = len(report.outputs)
    batches.turns += 1
    batches.engine_memory = report.memory
    if decoded:
        batches.decode_turns += 1
        batches.decoded += decoded
        batches.max_batch_seen = max(batches.max_batch_seen, decoded)
        counters.throughput.add(decoded, now=now)
