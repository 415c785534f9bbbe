"""The batch loop: wait for work, plan, one turn of the engine, hand out tokens.

It never waits for a caller: an answer takes every token at once. From a turn's report over the look
at the queue to the plan of the next turn everything is one synchronous section, and what is
decided there is decided in core/batching.py and core/scheduler.py. The next turn is under way
before the tokens of the last one are handed out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import trio
from loguru import logger
from trio_util import wait_any

from trio_worker.core.batching import Filling, queued_at_of
from trio_worker.core.formation import Trigger
from trio_worker.core.priority import name_of
from trio_worker.core.scheduler import Delivery
from trio_worker.core.sequence import Sequence
from trio_worker.errors import EngineLost, WorkerFault
from trio_worker.flow.serving import Serving
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Awaited, Heartbeat
from trio_worker.ports import Turn
from trio_worker.protocol.turn import Report, SequenceFailure, Work


async def run_batcher(
    serving: Serving, *, batches: BatchCounters, counters: RequestCounters, heartbeat: Heartbeat
) -> None:
    """Run until cancelled, or until the queue ends. Owns the queue's end and the running set.

    When the engine is lost, running sequences stay in the running set, and go back into the
    batch with the tokens they have once the engine is ready again.

    After a fault of its own the loop starts again with a fresh engine, as `_Batcher.recover` says,
    and raises `WorkerFault` when its budget is spent.
    """
    batcher = _Batcher(serving, batches, counters, heartbeat)
    with serving.queue_out:
        logger.debug("Batcher loop started")
        try:
            while True:
                try:
                    await batcher.take_turns()
                except Exception as fault:  # noqa: BLE001 - the boundary of the loop
                    batcher.recover(fault)
                    await batcher.wait_ready()
                else:
                    return
        finally:
            logger.debug("Batcher loop stopped")


class _Batcher:
    """The loop, and what is told, counted and handed out around a turn."""

    def __init__(
        self,
        serving: Serving,
        batches: BatchCounters,
        counters: RequestCounters,
        heartbeat: Heartbeat,
    ) -> None:
        self._serving = serving
        self._queue = serving.queue_out
        self._door = serving.door
        self._engine = serving.engine
        self._scheduler = serving.scheduler
        self._batching = serving.batching
        self._batches = batches
        self._heartbeat = heartbeat
        self._counters = counters
        self._metrics = counters.metrics
        self._restarts_known = 0
        """Of the engine."""
        self._reported_at = float("-inf")
        """When the last turn was."""

    async def take_turns(self) -> None:
        """Turn after turn; returns when the queue has ended and nobody runs any more."""
        while True:
            self._heartbeat.beat(trio.current_time())
            trigger = Trigger.RUNNING
            if not self._scheduler.has_work:
                try:
                    trigger = await self._wait_for_batch()
                except trio.EndOfChannel:
                    return
                self._notice_restart()
            # Taken before the look at the queue: no change in between is missed.
            changes = (self._queue.changed, self._door.changed)
            turn = self.begin(trigger)
            if turn is None:
                # What is queued is held back by memory: look again when something has changed.
                await wait_any(*(change.wait for change in changes))
                continue
            try:
                await self.go_on_from(turn)
            except EngineLost as lost:
                self.lost(lost)
                await self.wait_ready()

    async def wait_ready(self) -> None:
        """Return once the engine can take a turn."""
        self._heartbeat.rest(Awaited.ENGINE)
        await self._engine.wait_ready()
        self._notice_restart()
        self._batching.room_since.engine_ready(trio.current_time())

    async def _wait_for_batch(self) -> Trigger:
        """Wait for the first request, and then for more, as long as the rule says."""
        queue, formation = self._queue, self._batching.rules.formation
        while True:
            self._heartbeat.rest(Awaited.WORK)
            await queue.wait_depth(1)
            first_at: float | None = None
            while (first := queue.first()) is not None:
                self._heartbeat.beat(trio.current_time())
                if first_at is None:
                    first_at = queued_at_of(first)
                decision = formation.decide(
                    now=trio.current_time(),
                    waiting=len(queue),
                    first_at=first_at,
                    mean_gap_s=self._serving.arrivals.mean_gap_s,
                )
                if isinstance(decision, Trigger):
                    return decision
                with trio.move_on_at(decision.until) as patience:
                    await queue.wait_depth(len(queue) + 1)
                if patience.cancelled_caught and len(queue):
                    return decision.trigger

    # --- before the turn ------------------------------------------------------------------

    def _notice_restart(self) -> None:
        """An engine that was lost while nobody was aboard has failed no turn.

        So it is looked for where the loop has waited: while somebody is aboard, a turn tells.
        """
        restarts = self._engine.statistics().restarts
        if restarts != self._restarts_known:
            self._restarts_known = restarts
            self._forget_engine()

    def _forget_engine(self) -> None:
        """What it used and computed says nothing about the one that takes its place."""
        self._serving.ledger.engine_restarted()
        self._serving.engine_age.restarted()

    def fill(self, trigger: Trigger) -> None:
        """Let in who may enter the batch, and tell what came of it."""
        self._follow_pressure()
        now = trio.current_time()
        filling = self._batching.fill(now)
        for each in filling.preempted:
            self._metrics.preemptions.add(labels=(each.reason,))
            logger.bind(request_id=each.victim.request_id).debug(
                "Preempted for {} with {} tokens", each.reason, len(each.victim.produced)
            )
        for newcomer in _requests(filling.newcomers):
            self._counters.queue_wait.observe(now - newcomer.arrived_at, self._priority(newcomer))
        for entered in filling.entered:
            self._door.batched(entered)
        if filling.entered:
            self._formed(filling, trigger)

    def _formed(self, filling: Filling, trigger: Trigger) -> None:
        self._batches.by_trigger[trigger] += 1
        self._batches.last_formation_ms = 1000 * filling.formation_s
        self._metrics.batch_formation.observe(filling.formation_s, (trigger.value,))
        logger.debug(
            "Batch takes {} ({}): {} running, {} queued",
            _ids(filling.entered),
            trigger,
            len(self._scheduler.running),
            len(self._queue),
        )

    def _follow_pressure(self) -> None:
        """Each step of degradation that begins or ends is a line, and a count."""
        begun, ended = self._batching.follow_pressure()
        for step in begun:
            self._metrics.degradations.add(labels=(step.value,))
            logger.warning("Degradation begins: {}", step)
        for step in ended:
            logger.info("Degradation ends: {}", step)

    # --- the turn -------------------------------------------------------------------------

    def begin(self, trigger: Trigger) -> _TurnUnderWay | None:
        """Begin the next turn, with whoever may enter for it; None if there is nothing to do."""
        self.fill(trigger)
        now = trio.current_time()
        if not self._batching.has_turn(now):
            return None
        work = self._batching.plan(now)
        turn = _TurnUnderWay(self._engine.begin(work), now)
        self._log_resumed(work)
        return turn

    async def go_on_from(self, turn: _TurnUnderWay) -> None:
        """Turn after turn, until there is nothing to do.

        Raises `EngineLost`, with all turns that were under way; then `lost` has to follow.
        """
        under_way = deque([turn])
        while under_way:
            report = await under_way[0].turn.report()
            self.take(report, under_way)

    def take(self, report: Report, under_way: deque[_TurnUnderWay]) -> None:
        """Book the report of the oldest turn, begin what follows, and hand the tokens out.

        In this order: the engine computes while tokens are handed out.
        """
        turn = under_way.popleft()
        now = trio.current_time()
        self._heartbeat.beat(now)
        deliveries = self._scheduler.book(report, now=now)
        self._measure_removed(now)
        self._note_memory(report)
        try:
            # One that began behind others has been done since they were reported.
            began_at = max(turn.began_at, self._reported_at)
            self._reported_at = now
            self._count(report, took_s=now - began_at, now=now)
            self._recycle_if_due()
            while self._scheduler.has_work and self._batching.may_begin_ahead(report):
                following = self.begin(Trigger.RUNNING)
                if following is None:
                    break
                under_way.append(following)
        finally:
            self._hand_out(deliveries, now)
            self._log_ended(deliveries)

    def lost(self, lost: EngineLost) -> None:
        """Book the loss; whoever is found guilty of it fails, and the budget is given back."""
        aboard = _ids(self._scheduler.running.values()) or "nobody"
        logger.warning("Engine lost ({}: {}) with {} aboard", lost.reason, lost, aboard)
        deliveries = self._scheduler.lost(blameless=lost.reason == "planned")
        self._forget_engine()
        for delivery in deliveries:
            self._engine.pardon(delivery.sequence.crashes)
        self._hand_out(deliveries, trio.current_time())

    def recover(self, fault: Exception) -> None:
        """Put things right after a fault of this loop, whatever it left half done.

        The scheduler's state is made anew and the engine replaced. Whoever was in the batch, or
        on the way into it, goes back into the queue or is answered `INTERNAL`, as
        `Batching.take_back` says, and so a request that causes faults causes no more than two.

        Raises `WorkerFault` when the loop's budget is spent.
        """
        logger.opt(exception=fault).error(
            "Batcher loop error with {} requests aboard", len(self._scheduler.running)
        )
        self._metrics.batch_loop_restarts.add()
        self._scheduler.abandon()
        budget = self._serving.loop_budget
        if not budget.spend(trio.current_time()):
            raise WorkerFault(
                f"the batch loop failed {budget.spent} times within {budget.window_s:g} s, "
                f"at last: {type(fault).__name__}: {fault}"
            ) from fault
        self._engine.recycle()
        self._batching.take_back(self._door.admission.in_flight.values())

    def _log_resumed(self, work: Work) -> None:
        for admit in work.admit:
            if admit.produced or self._scheduler.running[admit.request_id].resumed:
                logger.bind(request_id=admit.request_id).debug(
                    "Resumes after {} tokens", len(admit.produced)
                )

    def _measure_removed(self, now: float) -> None:
        for sequence in self._scheduler.removed:
            if sequence.left_at is not None:
                self._counters.cancel.observe(now - sequence.left_at)

    def _hand_out(self, deliveries: list[Delivery], now: float) -> None:
        """Every output to the answer that it belongs to, and the time it took into the counts."""
        gaps: Counter[float] = Counter()
        """How many tokens follow one that came at this time: mostly that of the turn before."""
        for sequence, output, last_at in deliveries:
            assert sequence.outputs is not None
            sequence.outputs.take(output)
            if isinstance(output, SequenceFailure):
                sequence.concluded = True
                continue
            sequence.handed_out += 1
            sequence.concluded = output.finish is not None
            if last_at is not None:
                gaps[last_at] += 1
            elif sequence.leader is None:
                self._measure_first(sequence, now)
        for last_at, count in gaps.items():
            self._counters.inter_token.observe(now - last_at, count=count)

    def _measure_first(self, sequence: Sequence, now: float) -> None:
        first_s = now - sequence.arrived_at
        logger.bind(request_id=sequence.request_id).debug(
            "First token after {} ms", round(1000 * first_s)
        )
        self._counters.time_to_first_token.observe(first_s, self._priority(sequence))

    def _log_ended(self, deliveries: list[Delivery]) -> None:
        """Who has come to an end in this turn."""
        ended = [each.sequence for each in deliveries if each.sequence.concluded]
        if ended:
            left = len(self._scheduler.running)
            logger.debug("Batch completed {}: {} running", _ids(ended), left)

    def _note_memory(self, report: Report) -> None:
        gauge = self._serving.gauge
        has_changed = gauge.read_engine(report.memory.active + report.memory.cache)
        self._serving.ledger.reconcile(used=gauge.used, cached_tokens=self._scheduler.cached_tokens)
        if has_changed:
            self._door.pressure_changed()

    def _count(self, report: Report, *, took_s: float, now: float) -> None:
        self._metrics.turn_seconds.observe(took_s)
        batches = self._batches
        batches.turns += 1
        batches.engine_memory = report.memory
        for size in report.batch_sizes:
            batches.decode_turns += 1
            batches.decoded += size
            self._metrics.batch_size.observe(size)
            batches.max_batch_seen = max(batches.max_batch_seen, size)
            self._counters.throughput.add(size, now=now)
            self._serving.engine_age.decoded(size)

    def _recycle_if_due(self) -> None:
        age, info = self._serving.engine_age, self._engine.info
        if info is not None and age.is_over(info.accelerator):
            logger.info("Replacing the engine after {} tokens", age.tokens)
            age.restarted()
            self._engine.recycle()

    def _priority(self, sequence: Sequence) -> str:
        return name_of(sequence.level, self._serving.levels)


@dataclass(frozen=True, slots=True)
class _TurnUnderWay:
    turn: Turn
    began_at: float


def _requests(rows: Iterable[Sequence]) -> Iterator[Sequence]:
    """Those that stand for their requests, which are counted once."""
    return (row for row in rows if row.leader is None)


def _ids(sequences: Iterable[Sequence]) -> str:
    return ", ".join(each.request_id for each in sequences)
