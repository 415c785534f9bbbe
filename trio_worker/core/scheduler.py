"""Who is in the batch: plans each turn and books what it did.

Rule 1: the engine holds exactly the running sequences, and those withdrawn since the last plan.
Rule 2: a sequence that left the running set gets no further output.
Rule 3: after a loss of the engine every running sequence comes back with the tokens it has; when
two crashes in a row had the same sequences aboard, these return alone, newest first, each until
it is `PROOF_TOKENS` past where it was, so that only the one that brings the engine down fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.request import RequestId
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.core.turn import Admit, Output, Report, SequenceFailure, Work

SUSPECT_CRASHES = 2
PROOF_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An output for the token channel of its sequence."""

    sequence: Sequence
    output: Output | SequenceFailure


class Scheduler:
    """All its state: the running sequences, which of them are resident, and who is on trial."""

    def __init__(self, *, slots: int, prefill: PrefillBudget) -> None:
        self.slots = slots
        self.running: dict[RequestId, Sequence] = {}
        """In the order in which they entered."""
        self._prefill = prefill
        self._resident: set[RequestId] = set()
        self._leaving: set[RequestId] = set()
        self._trial: list[Sequence] = []
        """Suspects still to be tried, the one being tried last."""
        self._trial_until = 0
        """The number of produced tokens at which the one being tried is cleared."""

    @property
    def free_slots(self) -> int:
        """How many sequences may enter now: none while suspects are on trial."""
        return 0 if self._trial else self.slots - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether a turn would change anything."""
        return bool(self.running or self._leaving)

    def enter(self, sequence: Sequence, *, now: float) -> None:
        """Give a free slot to a sequence that has just been taken from the queue."""
        assert self.free_slots > 0
        sequence.advance(Event.BATCHED)
        sequence.batched_at = now
        self.running[sequence.request_id] = sequence

    def withdraw(self, sequence: Sequence) -> None:
        """Take a sequence out at any time; its slot is free from the next plan on."""
        if self.running.get(sequence.request_id) is not sequence:
            return
        del self.running[sequence.request_id]
        self._acquit(sequence)
        if sequence.request_id in self._resident:
            self._leaving.add(sequence.request_id)

    def plan(self) -> Work:
        """The next turn. What it removes and admits counts as done from here on."""
        removed = tuple(self._leaving)
        self._resident -= self._leaving
        self._leaving.clear()
        active = self._trial[-1:] or list(self.running.values())
        admitted = [each for each in active if each.request_id not in self._resident]
        for each in admitted:
            if each.stage is Stage.RESUMING:
                each.advance(Event.BATCHED)
            each.prefilled = 0
        self._resident.update(each.request_id for each in admitted)
        return Work(
            admit=tuple(
                Admit(
                    request_id=each.request_id,
                    prompt=each.prompt,
                    produced=tuple(each.produced),
                    max_tokens=each.max_tokens,
                    sampling=each.request.sampling,
                    stop=each.request.stop,
                )
                for each in admitted
            ),
            remove=removed,
            prefill_tokens=self._prefill.chunk,
        )

    def book(self, report: Report, *, now: float) -> list[Delivery]:
        """Take in what a turn did; returns what is to be handed out, in order."""
        for progress in report.prefills:
            if (sequence := self.running.get(progress.request_id)) is not None:
                sequence.prefilled = progress.done
                sequence.cached = max(sequence.cached, progress.cached)
        deliveries = [
            *(self._book_output(output, now) for output in report.outputs),
            *(self._book_failure(failure) for failure in report.failures),
        ]
        self._prefill.record(
            seconds=report.seconds, prefilled=report.prefill_tokens, decoded=len(report.outputs)
        )
        assert report.residents == self._resident, (
            f"the engine holds {sorted(report.residents)}, not {sorted(self._resident)}"
        )
        return [delivery for delivery in deliveries if delivery is not None]

    def _book_output(self, output: Output, now: float) -> Delivery | None:
        ended = output.finish is not None
        if ended:
            self._resident.discard(output.request_id)
            self._leaving.discard(output.request_id)
        sequence = self.running.get(output.request_id)
        if sequence is None:
            return None
        sequence.advance(Event.DECODED)
        sequence.produced.append(output.token)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.last_token_at = now
        if ended:
            del self.running[sequence.request_id]
        if sequence in self._trial and (ended or len(sequence.produced) >= self._trial_until):
            self._acquit(sequence)
        return Delivery(sequence=sequence, output=output)

    def _book_failure(self, failure: SequenceFailure) -> Delivery | None:
        self._resident.discard(failure.request_id)
        self._leaving.discard(failure.request_id)
        sequence = self.running.pop(failure.request_id, None)
        if sequence is None:
            return None
        self._acquit(sequence)
        return Delivery(sequence=sequence, output=failure)

    def lost(self, *, blameless: bool) -> list[Delivery]:
        """The engine is gone with all it held; returns the failure of the guilty, if found.

        `blameless`: the loss was planned, and no sequence can have caused it.
        """
        aboard = [each for each in self.running.values() if each.request_id in self._resident]
        self._resident.clear()
        self._leaving.clear()
        self._prefill.restarted()
        for each in aboard:
            each.advance(Event.ENGINE_LOST)
            each.resumed += 1
        if blameless:
            return []
        if self._trial:
            guilty = self._trial[-1]
            if guilty not in aboard:
                return []
            for each in self._trial:
                each.crashes = 0
            self._trial.clear()
            del self.running[guilty.request_id]
            failure = SequenceFailure(
                request_id=guilty.request_id,
                message="the engine ended each time it computed this request, the last time alone",
            )
            return [Delivery(sequence=guilty, output=failure)]
        for each in aboard:
            each.crashes += 1
        self._trial = [each for each in aboard if each.crashes >= SUSPECT_CRASHES]
        self._call_next()
        return []

    def _acquit(self, sequence: Sequence) -> None:
        """This sequence is no suspect any more, if it was one; its successor is tried next."""
        if sequence not in self._trial:
            return
        sequence.crashes = 0
        was_tried = sequence is self._trial[-1]
        self._trial.remove(sequence)
        if was_tried and self._trial:
            self._call_next()
            if sequence.request_id in self.running and sequence.request_id in self._resident:
                # The next one is tried alone; the acquitted come back when all have been tried.
                self._leaving.add(sequence.request_id)
                sequence.advance(Event.ENGINE_LOST)

    def _call_next(self) -> None:
        if self._trial:
            self._trial_until = len(self._trial[-1].produced) + PROOF_TOKENS
