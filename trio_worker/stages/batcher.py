"""The batch loop: wait for work, plan, one turn of the engine, hand out tokens.

It never waits for a caller: a token channel has room for every token its request may get. From
the look at the queue to the plan of the turn everything is one synchronous section.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import trio
from loguru import logger
from trio_util import wait_any

from trio_worker.core.formation import Formation, Trigger
from trio_worker.core.memory import DegradationStep, Pressure, PressureGauge
from trio_worker.core.priority import name_of
from trio_worker.core.rates import ArrivalRate
from trio_worker.core.scheduler import Delivery, Scheduler
from trio_worker.core.sequence import Ending, Event, Sequence, Stage
from trio_worker.errors import EngineLost, WorkerFault
from trio_worker.flow.door import Door
from trio_worker.flow.request_channel import PriorityReceiveChannel
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat
from trio_worker.ports import Engine
from trio_worker.protocol.turn import Output, Report, RequestId, SequenceFailure
from trio_worker.supervisor.restart_budget import RestartBudget

TRIM_INTERVAL_S = 1.0
"""While caches are to be trimmed, they are trimmed so often: doing it each turn costs turns."""
FAULTS_MAX = 2
"""A request that was aboard of so many faults of the loop is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """What the configuration says about batches."""

    formation: Formation
    preempt: bool
    degraded_max_tokens: int
    levels: int
    held_most_s: float
    """How long the least urgent level is held back under pressure."""
    recycle_after_tokens: int


async def run_batcher(
    queue: PriorityReceiveChannel,
    *,
    engine: Engine,
    scheduler: Scheduler,
    door: Door,
    rules: BatchRules,
    budget: RestartBudget,
    gauge: PressureGauge,
    arrivals: ArrivalRate,
    batches: BatchCounters,
    counters: RequestCounters,
    heartbeat: Heartbeat,
) -> None:
    """Run until cancelled, or until the queue ends. Owns the queue's end and the running set.

    When the engine is lost, running sequences stay in the running set, and go back into the
    batch with the tokens they have once the engine is ready again.

    After a fault of its own the loop starts again with a fresh engine, as `_Batcher.recover` says,
    and raises `WorkerFault` when `budget` is spent.
    """
    batcher = _Batcher(
        queue,
        scheduler,
        door,
        engine=engine,
        rules=rules,
        gauge=gauge,
        arrivals=arrivals,
        batches=batches,
        counters=counters,
        heartbeat=heartbeat,
    )
    with queue:
        logger.debug("Batcher loop started")
        try:
            while True:
                try:
                    await batcher.take_turns()
                except Exception as fault:  # noqa: BLE001 - the boundary of the loop
                    batcher.recover(fault, budget)
                    await batcher.wait_ready()
                else:
                    return
        finally:
            logger.debug("Batcher loop stopped")


async def _wait_for_batch(
    queue: PriorityReceiveChannel,
    formation: Formation,
    arrivals: ArrivalRate,
    heartbeat: Heartbeat,
) -> Trigger:
    """Wait for the first request, and then as long for more as the rule says."""
    while True:
        heartbeat.rest(Awaited.WORK)
        await queue.wait_depth(1)
        first_at: float | None = None
        while (first := queue.first()) is not None:
            heartbeat.beat(trio.current_time())
            if first_at is None:
                first_at = _queued_at(first)
            decision = formation.decide(
                now=trio.current_time(),
                waiting=len(queue),
                first_at=first_at,
                mean_gap_s=arrivals.mean_gap_s,
            )
            if isinstance(decision, Trigger):
                return decision
            with trio.move_on_at(decision.until) as patience:
                await queue.wait_depth(len(queue) + 1)
            if patience.cancelled_caught and len(queue):
                return decision.trigger


def _ids(sequences: Iterable[Sequence]) -> str:
    return ", ".join(each.request_id for each in sequences)


def _queued_at(sequence: Sequence) -> float:
    assert sequence.queued_at is not None
    return sequence.queued_at


class _Batcher:
    """The loop, and the synchronous parts around a turn."""

    def __init__(
        self,
        queue: PriorityReceiveChannel,
        scheduler: Scheduler,
        door: Door,
        *,
        engine: Engine,
        rules: BatchRules,
        gauge: PressureGauge,
        arrivals: ArrivalRate,
        batches: BatchCounters,
        counters: RequestCounters,
        heartbeat: Heartbeat,
    ) -> None:
        self._queue = queue
        self._scheduler = scheduler
        self._door = door
        self._engine = engine
        self._rules = rules
        self._gauge = gauge
        self._arrivals = arrivals
        self._heartbeat = heartbeat
        self._batches = batches
        self._counters = counters
        self._metrics = counters.metrics
        self._steps: frozenset[DegradationStep] = frozenset()
        self._trimmed_at = float("-inf")
        self._thinned_at_reading = -1
        self._tokens_of_engine = 0
        self._blocked_at: float | None = None
        """When the last look let nobody in, or left somebody in the queue, if it did."""
        self._ready_since = float("-inf")
        """When the engine was last waited for, it became ready then."""

    async def take_turns(self) -> None:
        """Turn after turn; returns when the queue has ended and nobody runs any more."""
        while True:
            self._heartbeat.beat(trio.current_time())
            trigger = Trigger.RUNNING
            if not self._scheduler.has_work:
                try:
                    trigger = await _wait_for_batch(
                        self._queue, self._rules.formation, self._arrivals, self._heartbeat
                    )
                except trio.EndOfChannel:
                    return
            # Taken before the look at the queue: no change in between is missed.
            changes = (self._queue.changed, self._door.changed)
            self.fill(trigger)
            if not self._scheduler.has_work and not self.may_trim():
                # What is queued is held back by memory: look again when something has changed.
                await wait_any(*(change.wait for change in changes))
                continue
            try:
                await self.turn()
            except EngineLost as lost:
                self.lost(lost)
                await self.wait_ready()

    async def wait_ready(self) -> None:
        """Return once the engine can take a turn."""
        self._heartbeat.rest(Awaited.ENGINE)
        await self._engine.wait_ready()
        self._ready_since = trio.current_time()

    # --- before the turn ------------------------------------------------------------------

    def fill(self, trigger: Trigger) -> None:
        """Give the free slots to the head of the queue, and a busy one to an urgent head.

        Nobody passes a head whose bytes do not fit, and under critical pressure nobody enters;
        instead the least urgent leaves, once for every reading that calls for it.
        """
        self._note_steps()
        now = trio.current_time()
        if self._gauge.level is Pressure.CRITICAL:
            self._thin_out()
            self._blocked_at = now
            return
        entered: list[Sequence] = []
        while (head := self._head()) is not None:
            max_tokens = self._allowed_tokens(head)
            need = self._scheduler.ledger.need(prompt=len(head.prompt), max_tokens=max_tokens)
            if self._scheduler.free_slots == 0:
                if not self._make_room(head, need):
                    break
            elif not self._scheduler.ledger.fits(need):
                if not self._scheduler.ledger.fits_ever(need):
                    head.end(Ending.TOO_LARGE)
                break
            if max_tokens < head.max_tokens:
                head.max_tokens = max_tokens
                head.degraded.append(DegradationStep.CAP_TOKENS)
            self._queue.take_nowait(head)
            if head.batched_at is None:
                self._counters.queue_wait.observe(now - head.arrived_at, self._priority(head))
            self._scheduler.enter(head, now=now)
            self._door.batched(head)
            entered.append(head)
        if entered:
            formation_s = now - max(self._room_since(now), min(map(_queued_at, entered)))
            self._batches.by_trigger[trigger] += 1
            self._batches.last_formation_ms = 1000 * formation_s
            self._metrics.batch_formation.observe(formation_s, (trigger.value,))
            logger.debug(
                "Batch takes {} ({}): {} running, {} queued",
                _ids(entered),
                trigger,
                len(self._scheduler.running),
                len(self._queue),
            )
        self._blocked_at = now if len(self._queue) else None

    def _room_since(self, now: float) -> float:
        """Since when there has been room for the head of the queue, as far as is known.

        If the last look found none, since a request was withdrawn after it, or else only since
        now: a turn has just ended, or there is memory again.
        """
        if self._blocked_at is None:
            return self._ready_since
        freed_at = self._scheduler.freed_at
        return max(self._ready_since, freed_at if freed_at > self._blocked_at else now)

    def _head(self) -> Sequence | None:
        if DegradationStep.HOLD_LOW not in self._steps:
            return self._queue.first()
        # Under pressure memory is read several times a second, and each reading is a change that
        # has the batcher look here again: so the bound is kept.
        return self._queue.first(
            hold_level=self._rules.levels - 1,
            held_after=trio.current_time() - self._rules.held_most_s,
        )

    def _make_room(self, head: Sequence, need: int) -> bool:
        """Preempt for an urgent head, if the rules allow and the head then has a slot and fits."""
        scheduler = self._scheduler
        victim = scheduler.victim_of(head) if self._rules.preempt else None
        if victim is None or len(scheduler.running) > scheduler.slots_now:
            return False
        if not scheduler.ledger.fits(need, instead_of=victim.request_id):
            return False
        self._preempt(victim, "priority")
        victim.preempted += 1
        return True

    def _thin_out(self) -> None:
        if self._gauge.readings == self._thinned_at_reading:
            return
        self._thinned_at_reading = self._gauge.readings
        victim = self._scheduler.least_urgent()
        if victim is not None:
            self._preempt(victim, "memory")

    def _preempt(self, victim: Sequence, reason: str) -> None:
        self._scheduler.preempt(victim)
        self._queue.put_back_nowait(victim)
        self._metrics.preemptions.add(labels=(reason,))
        logger.bind(request_id=victim.request_id).debug(
            "Preempted for {} with {} tokens", reason, len(victim.produced)
        )

    def _allowed_tokens(self, head: Sequence) -> int:
        """Its `max_tokens`; under `cap_tokens` less, unless it has been in the batch before."""
        capped = DegradationStep.CAP_TOKENS in self._steps and head.batched_at is None
        cap = self._rules.degraded_max_tokens
        return min(head.max_tokens, cap) if capped else head.max_tokens

    def _note_steps(self) -> None:
        """Follow the gauge; each step that begins or ends is a line and a count."""
        steps = self._gauge.steps
        for step in DegradationStep:
            if step in steps and step not in self._steps:
                self._metrics.degradations.add(labels=(step.value,))
                logger.warning("Degradation begins: {}", step)
            elif step in self._steps and step not in steps:
                logger.info("Degradation ends: {}", step)
        self._steps = steps
        self._scheduler.shrunk = DegradationStep.SHRINK_BATCH in steps

    # --- the turn -------------------------------------------------------------------------

    async def turn(self) -> None:
        """One turn. Raises `EngineLost`; then `lost` has to follow."""
        trim = self._is_trim_due()
        work = self._scheduler.plan(trim_caches=trim)
        for admit in work.admit:
            if admit.produced or self._scheduler.running[admit.request_id].resumed:
                logger.bind(request_id=admit.request_id).debug(
                    "Resumes after {} tokens", len(admit.produced)
                )
        began_at = trio.current_time()
        if trim:
            self._trimmed_at = began_at
        report = await self._engine.turn(work)
        now = trio.current_time()
        self._metrics.turn_seconds.observe(now - began_at)
        for sequence in self._scheduler.removed:
            if sequence.left_at is not None:
                self._counters.cancel.observe(now - sequence.left_at)
        sampled = set[RequestId]()
        for output in report.outputs:
            self._sample(output, now, again=output.request_id in sampled)
            sampled.add(output.request_id)
        deliveries = self._scheduler.book(report, now=now)
        self._hand_out(deliveries)
        self._log_turn(deliveries)
        self._gauge.read_engine(report.memory.active + report.memory.cache)
        self._scheduler.ledger.reconcile(
            used=self._gauge.used, cached_tokens=self._scheduler.cached_tokens
        )
        self._door.pressure_changed()
        self._count(report, now)
        self._recycle_if_due()

    def lost(self, lost: EngineLost) -> None:
        """Book the loss; whoever is found guilty of it fails, and the budget is given back."""
        aboard = _ids(self._scheduler.running.values()) or "nobody"
        logger.warning("Engine lost ({}: {}) with {} aboard", lost.reason, lost, aboard)
        deliveries = self._scheduler.lost(blameless=lost.reason == "planned")
        self._scheduler.ledger.engine_restarted()
        self._tokens_of_engine = 0
        for delivery in deliveries:
            self._engine.pardon(delivery.sequence.crashes)
        self._hand_out(deliveries)

    def recover(self, fault: Exception, budget: RestartBudget) -> None:
        """Put things right after a fault of this loop, whatever it left half done.

        The scheduler's state is made anew and the engine replaced. Whoever was in the batch, or
        on the way into it, goes back into the queue with the tokens it has, unless its caller
        would miss some of them, or it was aboard of a fault before: these are answered
        `INTERNAL`, and so a request that causes faults causes no more than two.

        Raises `WorkerFault` when `budget` is spent.
        """
        logger.opt(exception=fault).error(
            "Batcher loop error with {} requests aboard", len(self._scheduler.running)
        )
        self._metrics.batch_loop_restarts.add()
        self._scheduler.abandon()
        self._tokens_of_engine = 0
        if not budget.spend(trio.current_time()):
            raise WorkerFault(
                f"the batch loop failed {budget.spent} times within {budget.window_s:g} s, "
                f"at last: {type(fault).__name__}: {fault}"
            ) from fault
        self._engine.recycle()
        for sequence in self._door.admission.in_flight.values():
            if sequence.is_batchable and sequence not in self._queue:
                self._take_back(sequence)

    def _take_back(self, sequence: Sequence) -> None:
        sequence.faults += 1
        if sequence.faults >= FAULTS_MAX or not sequence.is_whole:
            sequence.end(Ending.FAULT)
        else:
            if sequence.stage is not Stage.QUEUED:
                sequence.resumed += 1
                sequence.advance(Event.PREEMPTED)
            self._queue.put_back_nowait(sequence)

    def may_trim(self) -> bool:
        """Whether an idle engine may be asked to trim, since the head of the queue does not fit."""
        head = self._head()
        return head is not None and self._is_trim_due()

    def _is_trim_due(self) -> bool:
        """While trimming is a step, regularly; in need of memory at once."""
        if self._gauge.level is Pressure.CRITICAL and self._scheduler.has_work:
            return True
        wanted = DegradationStep.TRIM_CACHES in self._steps or not self._scheduler.has_work
        return wanted and trio.current_time() - self._trimmed_at >= TRIM_INTERVAL_S

    def _sample(self, output: Output, now: float, *, again: bool) -> None:
        """Latencies, before the booking moves the times on; `again` in the same turn, no time."""
        sequence = self._scheduler.running.get(output.request_id)
        if sequence is None:
            return
        last_at = now if again else sequence.last_token_at
        if last_at is None:
            first_s = now - sequence.arrived_at
            logger.bind(request_id=sequence.request_id).debug(
                "First token after {} ms", round(1000 * first_s)
            )
            self._counters.time_to_first_token.observe(first_s, self._priority(sequence))
        else:
            self._counters.inter_token.observe(now - last_at)

    def _log_turn(self, deliveries: list[Delivery]) -> None:
        """Who has come to an end in this turn, and whether the batch has."""
        ended = [each.sequence for each in deliveries if each.sequence.concluded]
        if ended:
            left = len(self._scheduler.running)
            logger.debug("Batch completed {}: {} running", _ids(ended), left)

    def _priority(self, sequence: Sequence) -> str:
        return name_of(sequence.level, self._rules.levels)

    def _hand_out(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            sequence, output = delivery.sequence, delivery.output
            assert sequence.outputs is not None
            sequence.outputs.send_nowait(output)
            if isinstance(output, SequenceFailure):
                sequence.concluded = True
            else:
                sequence.handed_out += 1
                sequence.concluded = output.finish is not None

    def _count(self, report: Report, now: float) -> None:
        batches = self._batches
        batches.turns += 1
        batches.engine_memory = report.memory
        for size in report.batch_sizes:
            batches.decode_turns += 1
            batches.decoded += size
            self._metrics.batch_size.observe(size)
            batches.max_batch_seen = max(batches.max_batch_seen, size)
            self._counters.throughput.add(size, now=now)
            self._tokens_of_engine += size

    def _recycle_if_due(self) -> None:
        """Metal's count of buffers runs out after some 300,000 tokens; nothing else does."""
        info = self._engine.statistics().info
        if (
            info is not None
            and info.accelerator == "metal"
            and self._tokens_of_engine >= self._rules.recycle_after_tokens
        ):
            logger.info("Replacing the engine after {} tokens", self._tokens_of_engine)
            self._tokens_of_engine = 0
            self._engine.recycle()
