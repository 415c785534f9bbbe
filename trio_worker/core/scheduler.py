"""Who is in the batch: plans each turn and books what it did.

Rule 1: the engine holds exactly the running sequences, and those withdrawn since the last plan,
once the turns under way are done.
Rule 2: a sequence that left the running set gets no further output, also not of turns that were
under way then; if it comes back, the first it gets is of the turn that admits it.
Rule 3: every running sequence holds a reservation, from when it enters until it leaves.
Rule 4: after a loss of the engine every running sequence comes back with the tokens it has, on
trial alone (core/trial.py) if it may be what the engine was lost for.
Rule 5: what is computed is booked with the caller it is computed for (core/fair_shares.py), each
token once: what a preempted sequence computes again is on nobody's account.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from trio_worker.core.fair_shares import FairShares
from trio_worker.core.memory import ReservationLedger
from trio_worker.core.prefill import CHUNK_MIN, PrefillBudget
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.core.trial import Trial
from trio_worker.protocol.turn import Admit, Output, Report, RequestId, SequenceFailure, Work

PREEMPTIONS_MAX = 2
"""How often at most a request gives its slot to a more urgent one."""


class Delivery(NamedTuple):
    """An output for the answer of its sequence."""

    sequence: Sequence
    output: Output | SequenceFailure
    last_at: float | None = None
    """When the token before came; None if there was none."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a turn that is under way changes."""

    admitted: frozenset[RequestId]
    removed: tuple[Sequence, ...]

    def held_after(self, held: frozenset[RequestId], report: Report) -> frozenset[RequestId]:
        """Whom the engine holds after this turn, of which this is the report."""
        ended = [each.request_id for each in report.outputs if each.finish is not None]
        failed = [each.request_id for each in report.failures]
        if not (self.admitted or self.removed or ended or failed):
            return held
        removed = [each.request_id for each in self.removed]
        return held.difference(removed).union(self.admitted).difference(ended, failed)


class Scheduler:
    """All its state: the running sequences, which of them are resident, and the trial."""

    def __init__(
        self,
        *,
        slots: int,
        prefill: PrefillBudget,
        ledger: ReservationLedger,
        shares: FairShares | None = None,
    ) -> None:
        self.slots = slots
        self.ledger = ledger
        self.shares = FairShares() if shares is None else shares
        """The queue's: it serves by what is booked here."""
        self.shrunk = False
        """Under pressure: half the slots, half the prefill."""
        self.freed_at = float("-inf")
        """When the last request that was withdrawn gave its slot back, within a turn."""
        self.removed: tuple[Sequence, ...] = ()
        """Those whose removal was part of the turn booked last."""
        self.running: dict[RequestId, Sequence] = {}
        """In the order in which they entered."""
        self._prefill = prefill
        self._resident: set[RequestId] = set()
        """Whom the engine holds once all that is planned is done, as far as is known."""
        self._held: frozenset[RequestId] = frozenset()
        """Whom it held after the turn booked last."""
        self._planned: deque[_Planned] = deque()
        """The turns that have been planned and not booked; bound: those under way."""
        self._leaving: dict[RequestId, Sequence] = {}
        self._trial = Trial()

    @property
    def free_slots(self) -> int:
        """How many sequences may enter now: none while suspects are on trial."""
        return 0 if self._trial.is_on else max(0, self.slots_now - len(self.running))

    @property
    def slots_now(self) -> int:
        return max(1, self.slots // 2) if self.shrunk else self.slots

    @property
    def cached_tokens(self) -> int:
        """Tokens in the caches of the resident sequences."""
        return sum(
            each.prefilled + len(each.produced)
            for request_id, each in self.running.items()
            if request_id in self._resident
        )

    @property
    def turns_under_way(self) -> int:
        """Turns that have been planned and not booked."""
        return len(self._planned)

    @property
    def is_on_trial(self) -> bool:
        """Then it has to be clear which turn a crash comes from: none begins ahead."""
        return self._trial.is_on

    @property
    def outlasts_what_is_under_way(self) -> bool:
        """Whether somebody gets a token of another turn, whatever those under way bring."""
        ahead = len(self._planned)
        return any(len(each.produced) + ahead < each.max_tokens for each in self.running.values())

    @property
    def has_work(self) -> bool:
        """Whether a turn would change anything."""
        return bool(self.running or self._leaving)

    def enter(self, sequence: Sequence, *, now: float) -> None:
        """Give a free slot to a sequence that has just been taken from the queue."""
        assert self.free_slots > 0
        sequence.advance(Event.BATCHED)
        if sequence.batched_at is None:
            sequence.batched_at = now
        self.running[sequence.request_id] = sequence
        self.ledger.reserve(sequence.request_id, self.need(sequence))
        self._book_prompt(sequence, len(sequence.prompt) - sequence.cached)

    def need(self, sequence: Sequence) -> int:
        """Bytes to reserve for a sequence."""
        return self.ledger.need(prompt=len(sequence.prompt), max_tokens=sequence.max_tokens)

    def victim_of(self, sequence: Sequence) -> Sequence | None:
        """Whose slot this sequence may take: the latest key of a less urgent level.

        None if there is none, or if those have been preempted often enough. Since keys age, one
        that has waited its bound cannot be pushed aside.
        """
        if self._trial.is_on:
            return None
        candidates = [
            each
            for each in self.running.values()
            if each.level > sequence.level
            and each.key > sequence.key
            and each.preempted < PREEMPTIONS_MAX
        ]
        return max(candidates, key=lambda each: each.key, default=None)

    def least_urgent(self) -> Sequence | None:
        """The running sequence with the latest key."""
        return max(self.running.values(), key=lambda each: each.key, default=None)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence out, with the tokens it has; it belongs into the queue again."""
        self._leave(sequence)
        sequence.advance(Event.PREEMPTED)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a sequence out at any time; its slot is free from the next plan on."""
        if self.running.get(sequence.request_id) is sequence:
            self._leave(sequence)
            if sequence.left_at is not None:
                self.freed_at = sequence.left_at

    def _leave(self, sequence: Sequence) -> None:
        self._forget(sequence)
        if sequence.request_id in self._resident:
            self._leaving[sequence.request_id] = sequence

    def _forget(self, sequence: Sequence) -> None:
        """It is not running any more, for whatever reason."""
        del self.running[sequence.request_id]
        self.ledger.release(sequence.request_id)
        self._book_prompt(sequence, 0)
        self._acquit(sequence)

    def _book_prompt(self, sequence: Sequence, tokens: int) -> None:
        """Its caller is charged with so many of its prompt, or with what is computed, if more."""
        tokens = max(tokens, sequence.computed)
        self.shares.charge(sequence.level, sequence.caller, tokens - sequence.booked)
        sequence.booked = tokens

    def plan(self, *, trim_caches: bool = False) -> Work:
        """The next turn. What it removes and admits counts as done from here on."""
        removed = tuple(self._leaving)
        leaving = tuple(self._leaving.values())
        self._resident.difference_update(removed)
        self._leaving.clear()
        tried = self._trial.tried
        active = list(self.running.values()) if tried is None else [tried]
        admitted = [each for each in active if each.request_id not in self._resident]
        for each in admitted:
            if each.stage is Stage.RESUMING:
                each.advance(Event.BATCHED)
            each.prefilled = 0
        coming = frozenset(each.request_id for each in admitted)
        self._resident |= coming
        self._planned.append(_Planned(coming, leaving))
        return Work(
            admit=tuple(
                Admit(
                    request_id=each.request_id,
                    prompt=each.prompt,
                    produced=tuple(each.produced),
                    max_tokens=each.max_tokens,
                    sampling=each.sampling,
                    stop=each.request.stop,
                    form=each.form,
                )
                for each in admitted
            ),
            remove=removed,
            prefill_tokens=self._chunk(),
            trim_caches=trim_caches,
        )

    def _chunk(self) -> int:
        waiting = [each for each in self.running.values() if each.stage is not Stage.DECODE]
        chunk = self._prefill.chunk(
            decoding=len(self.running) - len(waiting),
            waiting=len(waiting),
            left=sum(len(each.prompt) + len(each.produced) - each.prefilled for each in waiting),
        )
        return max(CHUNK_MIN, chunk // 2) if self.shrunk else chunk

    def book(self, report: Report, *, now: float) -> list[Delivery]:
        """Take in what a turn did; returns what is to be handed out, in order."""
        planned = self._planned.popleft()
        self.removed = planned.removed
        for progress in report.prefills:
            if (sequence := self._aboard(progress.request_id)) is not None:
                sequence.prefilled = progress.done
                sequence.cached = max(sequence.cached, progress.cached)
                computed = min(progress.done, len(sequence.prompt)) - progress.cached
                sequence.computed = max(sequence.computed, computed)
                self._book_prompt(sequence, len(sequence.prompt) - sequence.cached)
        deliveries = [
            *(self._book_output(output, now) for output in report.outputs),
            *(self._book_failure(failure) for failure in report.failures),
        ]
        self._book_answers(delivery for delivery in deliveries if delivery is not None)
        self._measure(report)
        held = planned.held_after(self._held, report)
        assert report.residents == held, (
            f"the engine holds {sorted(report.residents)}, not {sorted(held)}"
        )
        self._held = held
        return [delivery for delivery in deliveries if delivery is not None]

    def _book_answers(self, deliveries: Iterable[Delivery]) -> None:
        """A token for each that has got one, to its caller's account."""
        tokens = Counter(
            (each.sequence.level, each.sequence.caller)
            for each in deliveries
            if isinstance(each.output, Output)
        )
        for (level, caller), count in tokens.items():
            self.shares.charge(level, caller, count)

    def _measure(self, report: Report) -> None:
        if report.prefill_calls:
            # The first step of those who join is slower than others, and is left out.
            self._prefill.prefilled(
                seconds=report.prefill_seconds,
                tokens=report.prefill_tokens,
                calls=report.prefill_calls,
            )
        elif report.outputs:
            self._prefill.decoded(seconds=report.seconds / len(report.batch_sizes))

    def _book_output(self, output: Output, now: float) -> Delivery | None:
        ended = output.finish is not None
        sequence = self._aboard(output.request_id)
        if ended:
            self._left_by_itself(output.request_id)
        if sequence is None:
            return None
        if sequence.stage is not Stage.DECODE:
            sequence.advance(Event.DECODED)
        sequence.produced.append(output.token)
        last_at = sequence.last_token_at
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.last_token_at = now
        if ended:
            self._forget(sequence)
        elif self._trial.is_on and self._trial.has_proof(sequence):
            self._acquit(sequence)
        return Delivery(sequence=sequence, output=output, last_at=last_at)

    def _book_failure(self, failure: SequenceFailure) -> Delivery | None:
        sequence = self._aboard(failure.request_id)
        self._left_by_itself(failure.request_id)
        if sequence is None:
            return None
        self._forget(sequence)
        return Delivery(sequence=sequence, output=failure)

    def _is_coming(self, request_id: RequestId) -> bool:
        """Whether a turn that is under way admits it: then what is reported is another's."""
        return any(request_id in each.admitted for each in self._planned)

    def _aboard(self, request_id: RequestId) -> Sequence | None:
        """Whose output of the turn being booked this is; None if it has left meanwhile."""
        return None if self._is_coming(request_id) else self.running.get(request_id)

    def _left_by_itself(self, request_id: RequestId) -> None:
        if not self._is_coming(request_id):
            self._resident.discard(request_id)
            self._leaving.pop(request_id, None)

    def lost(self, *, blameless: bool) -> list[Delivery]:
        """The engine is gone with all it held; returns the failure of the guilty, if found.

        The guilty's `crashes` are then those that it caused. `blameless`: the loss was planned,
        and no sequence can have caused it.
        """
        aboard = [each for each in self.running.values() if each.request_id in self._resident]
        self._engine_is_empty()
        self._prefill.restarted()
        for each in aboard:
            each.advance(Event.ENGINE_LOST)
            each.resumed += 1
        guilty = None if blameless else self._trial.crashed(aboard)
        if guilty is None:
            return []
        self._forget(guilty)
        failure = SequenceFailure(
            request_id=guilty.request_id,
            message="the engine ended each time it computed this request, the last time alone",
        )
        return [Delivery(sequence=guilty, output=failure)]

    def abandon(self) -> None:
        """Forget everybody: a fault may have left anything half done. The engine has to go too."""
        self.running.clear()
        self._engine_is_empty()
        self._trial = Trial()
        self.ledger.release_all()
        self._prefill.restarted()

    def _engine_is_empty(self) -> None:
        self.removed = ()
        self._resident.clear()
        self._held = frozenset()
        self._planned.clear()
        self._leaving.clear()

    def _acquit(self, sequence: Sequence) -> None:
        """It is no suspect any more; it makes room if the next one is to be tried alone."""
        another_is_tried = self._trial.acquit(sequence)
        is_aboard = sequence.request_id in self.running and sequence.request_id in self._resident
        if another_is_tried and is_aboard:
            # The acquitted come back when all have been tried.
            self._leaving[sequence.request_id] = sequence
            sequence.advance(Event.ENGINE_LOST)
