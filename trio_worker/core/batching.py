"""What happens to the batch between two turns: who enters, who has to leave, what is trimmed.

Rule 1: a free slot goes to the head of the queue; nobody passes a head whose bytes do not fit.
Rule 2: a head that finds no slot takes that of a less urgent sequence, if both keys say so.
Rule 3: under critical pressure nobody enters; with each reading the least urgent one leaves.
Rule 4: under lesser pressure the lowest level waits, `held_most_s` after its arrival at most, and
who enters for the first time may get fewer tokens.

Everything here is decided and done in one synchronous section; what has been decided is returned,
for the log and the counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from trio_worker.core.formation import Formation, RoomSince
from trio_worker.core.memory import DegradationStep, Pressure, PressureGauge
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Ending, Event, Sequence, Stage
from trio_worker.protocol.turn import TURNS_UNDER_WAY_MAX, Report, Work

TRIM_INTERVAL_S = 1.0
"""How often caches are trimmed while they are to be: doing it in each turn costs turns."""
FAULTS_MAX = 2
"""A request that was aboard of this many faults of the batch loop is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """What the configuration says about batches."""

    formation: Formation
    preempt: bool
    degraded_max_tokens: int
    levels: int
    held_most_s: float
    """How long after its arrival pressure may hold back a request of the lowest level."""
    lead_s: float
    """How far the engine may run ahead, in turns that are shorter."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """A running sequence has given its slot up, and waits in the queue with its tokens."""

    victim: Sequence
    reason: str
    """`priority` or `memory`."""


@dataclass(slots=True)
class Filling:
    """What one look at the queue has led to."""

    preempted: list[Preemption] = field(default_factory=list)
    entered: list[Sequence] = field(default_factory=list)
    newcomers: list[Sequence] = field(default_factory=list)
    """Those of `entered` that have not been in the batch before."""
    formation_s: float = 0.0
    """From when the first of `entered` could have entered, until it did."""


class Batching:
    """Its state: when there was room, and what has been done about the present pressure."""

    def __init__(
        self,
        rules: BatchRules,
        *,
        queue: RequestQueue,
        scheduler: Scheduler,
        gauge: PressureGauge,
    ) -> None:
        self.rules = rules
        self.room_since = RoomSince()
        self._queue = queue
        self._scheduler = scheduler
        self._gauge = gauge
        self._steps: frozenset[DegradationStep] = frozenset()
        self._trimmed_at = float("-inf")
        self._thinned_at_reading = -1

    def follow_pressure(self) -> tuple[list[DegradationStep], list[DegradationStep]]:
        """Do as the gauge says from now on; returns the steps that begin, and those that end."""
        steps, before = self._gauge.steps, self._steps
        if steps == before:
            return [], []
        self._steps = steps
        self._scheduler.shrunk = DegradationStep.SHRINK_BATCH in steps
        begun = [step for step in DegradationStep if step in steps and step not in before]
        ended = [step for step in DegradationStep if step in before and step not in steps]
        return begun, ended

    def fill(self, now: float) -> Filling:
        """Give the free slots to the head of the queue, and a busy one to an urgent head."""
        filling = Filling()
        if self._gauge.level is Pressure.CRITICAL:
            self._thin_out(filling)
            self.room_since.looked(now, somebody_is_left=True)
            return filling
        while (head := self.head(now)) is not None:
            max_tokens = self._allowed(head)
            if not self._has_room(head, max_tokens, filling):
                break
            self._enter(head, max_tokens, filling, now)
        if filling.entered:
            queued_at = min(map(queued_at_of, filling.entered))
            room_at = self.room_since.at(now, freed_at=self._scheduler.freed_at)
            filling.formation_s = now - max(room_at, queued_at)
        self.room_since.looked(now, somebody_is_left=len(self._queue) > 0)
        return filling

    def head(self, now: float) -> Sequence | None:
        """Who would enter next: the first in the queue that is not held back."""
        if DegradationStep.HOLD_LOW not in self._steps:
            return self._queue.first()
        # Under pressure memory is read several times a second, and each reading is a reason to
        # look here again: so the bound is kept.
        return self._queue.first(
            hold_level=self.rules.levels - 1, held_after=now - self.rules.held_most_s
        )

    def has_turn(self, now: float) -> bool:
        """Whether there is something to compute, or to trim for a head that does not fit."""
        if self._scheduler.has_work:
            return True
        return self.head(now) is not None and self._is_trim_due(now)

    def may_begin_ahead(self, last: Report) -> bool:
        """Whether a turn may begin behind those under way; `last` is the report before theirs.

        Only in a run of decode steps, which take about the same time each, and only if somebody
        outlasts those under way, or may enter after them.
        """
        ahead = self._scheduler.turns_under_way
        if ahead == 0:
            return True
        if last.prefill_calls or not last.outputs:
            return False
        most = min(int(self.rules.lead_s / max(last.seconds, 1e-6)), TURNS_UNDER_WAY_MAX - 1)
        if ahead > most or self._scheduler.is_on_trial:
            return False
        return self._scheduler.outlasts_what_is_under_way or len(self._queue) > 0

    def plan(self, now: float) -> Work:
        """The next turn, as `Scheduler.plan`; it also trims caches where that is due."""
        trim = self._is_trim_due(now)
        work = self._scheduler.plan(trim_caches=trim)
        if trim:
            self._trimmed_at = now
        return work

    def take_back(self, in_flight: Iterable[Sequence]) -> None:
        """After a fault of the batch loop, and `Scheduler.abandon`: the queue gets them back.

        Each with the tokens it has, unless its caller would miss some of them, or it was aboard
        of `FAULTS_MAX` faults: these end with `Ending.FAULT`.
        """
        for sequence in in_flight:
            if not sequence.is_batchable or sequence in self._queue:
                continue
            sequence.faults += 1
            if sequence.faults >= FAULTS_MAX or not sequence.is_whole:
                sequence.end(Ending.FAULT)
                continue
            if sequence.stage is not Stage.QUEUED:
                sequence.resumed += 1
                sequence.advance(Event.PREEMPTED)
            self._queue.add(sequence)

    def _has_room(self, head: Sequence, max_tokens: int, filling: Filling) -> bool:
        """Whether there is a slot and memory for it, if need be those of somebody less urgent."""
        scheduler = self._scheduler
        need = scheduler.ledger.need(prompt=len(head.prompt), max_tokens=max_tokens)
        if scheduler.free_slots == 0:
            return self._make_room(head, need, filling)
        if scheduler.ledger.fits(need):
            return True
        if not scheduler.ledger.fits_ever(need):
            head.end(Ending.TOO_LARGE)
        return False

    def _make_room(self, head: Sequence, need: int, filling: Filling) -> bool:
        """Preempt for an urgent head, if the rules allow and the head then has a slot and fits."""
        scheduler = self._scheduler
        victim = scheduler.victim_of(head) if self.rules.preempt else None
        if victim is None or len(scheduler.running) > scheduler.slots_now:
            return False
        if not scheduler.ledger.fits(need, instead_of=victim.request_id):
            return False
        self._preempt(victim, "priority", filling)
        victim.preempted += 1
        return True

    def _enter(self, head: Sequence, max_tokens: int, filling: Filling, now: float) -> None:
        if max_tokens < head.max_tokens:
            head.max_tokens = max_tokens
            head.degraded.append(DegradationStep.CAP_TOKENS)
        self._queue.take(head)
        if head.batched_at is None:
            filling.newcomers.append(head)
        self._scheduler.enter(head, now=now)
        filling.entered.append(head)

    def _allowed(self, head: Sequence) -> int:
        """Its `max_tokens`; under `cap_tokens` less, unless it has been in the batch before."""
        if DegradationStep.CAP_TOKENS in self._steps and head.batched_at is None:
            return min(head.max_tokens, self.rules.degraded_max_tokens)
        return head.max_tokens

    def _thin_out(self, filling: Filling) -> None:
        """Take the least urgent out, once for every reading that calls for it."""
        if self._gauge.readings == self._thinned_at_reading:
            return
        self._thinned_at_reading = self._gauge.readings
        victim = self._scheduler.least_urgent()
        if victim is not None:
            self._preempt(victim, "memory", filling)

    def _preempt(self, victim: Sequence, reason: str, filling: Filling) -> None:
        self._scheduler.preempt(victim)
        self._queue.add(victim)
        filling.preempted.append(Preemption(victim, reason))

    def _is_trim_due(self, now: float) -> bool:
        """While trimming is a step, regularly; in need of memory at once."""
        if self._gauge.level is Pressure.CRITICAL and self._scheduler.has_work:
            return True
        wanted = DegradationStep.TRIM_CACHES in self._steps or not self._scheduler.has_work
        return wanted and now - self._trimmed_at >= TRIM_INTERVAL_S


def queued_at_of(sequence: Sequence) -> float:
    """When it came into the queue, for the first time."""
    assert sequence.queued_at is not None
    return sequence.queued_at
