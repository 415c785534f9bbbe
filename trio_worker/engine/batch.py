"""The running batch: rows wait, prefill and decode together; any may come or go at any turn.

Built on mlx-lm's models and caches rather than on its `BatchGenerator`, which bounds prefill per
row and not per turn, samples row by row as soon as requests differ, and sets Metal's wired limit
when it is made, which has brought whole machines down (ml-explore/mlx#3186).

1. A row is in `_arriving` until its prompt is computed, then in one of `_decodings`.
2. A row whose prompt takes several turns has a cache of its own until its last chunk; those whose
   prompts end in one turn are computed in one call and join together (`prompts.py`).
3. The rows of one `Decoding` are padded to the longest, what they begin with in common apart
   (`shared_prefixes.py`). Rows of very different lengths decode apart, for their padding would
   take longer than reading the weights once more, and memory that nobody has reserved.
4. A step is in flight on the device between turns: a turn takes its tokens and starts the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from trio_worker.engine import freed_memory
from trio_worker.engine.beginnings import Beginnings
from trio_worker.engine.caches import can_share
from trio_worker.engine.decoding import Decoding
from trio_worker.engine.guide import Guides
from trio_worker.engine.logprobs import Place
from trio_worker.engine.padding import merge_alike
from trio_worker.engine.prefill_plan import ComputePart, ModelCall, PrefillPlan
from trio_worker.engine.prompts import ReadyRows, compute_ends, compute_part, lengths_of
from trio_worker.engine.read_answer import Answers
from trio_worker.engine.row import Row
from trio_worker.engine.shared_prefixes import lengthened
from trio_worker.engine.turn_report import TurnReport, logprob_of
from trio_worker.protocol.turn import (
    Admit,
    EngineMemory,
    Report,
    RequestId,
    TokenLogprob,
    Work,
)

STEPS_BETWEEN_CLEARS = 512
"""After this many the allocator's cache of freed buffers is emptied, as mlx-lm does."""


class Batch:
    """Every row the engine holds. All calls must come from the thread that made it."""

    def __init__(
        self,
        model: Any,
        answers: Answers,
        *,
        end_tokens: Iterable[int],
        vocabulary_size: int,
        padding_max: int,
        prefix_cache_bytes: int = 0,
        guides: Guides,
    ) -> None:
        self._model = model
        self._answers = answers
        self._end_tokens = frozenset(end_tokens)
        self._vocabulary_size = vocabulary_size
        self._guides = guides
        self._share = can_share(model)
        self._beginnings = Beginnings(model, prefix_cache_bytes, share=self._share)
        self._arriving: dict[RequestId, Row] = {}
        self._decodings: list[Decoding] = []
        self._padding_max = padding_max
        self._steps = 0

    @property
    def residents(self) -> list[RequestId]:
        decoding = [row.request_id for each in self._decodings for row in each.rows]
        return [*self._arriving, *decoding]

    def turn(self, work: Work) -> Report:
        """Remove, admit, some prefill, and one decode step for the rows that decode by then.

        Where prompts have ended there are two, since in the first those rows have no token yet.
        """
        started = time.perf_counter()
        report = TurnReport()
        self._remove(frozenset(work.remove))
        if work.trim_caches:
            # After the removal: what has just left for want of memory is not worth keeping.
            self._trim()
        for admit in work.admit:
            self._admit(admit, report)
        # In this order, whoever's prompt ends now gives its first token before more is prefilled.
        prefill_began_at = time.perf_counter()
        self._prefill(work.prefill_tokens, report)
        prefill_s = time.perf_counter() - prefill_began_at
        if self._decode(report):
            self._decode(report)
        return Report(
            outputs=tuple(report.outputs),
            prefills=tuple(report.prefills),
            failures=tuple(report.failures),
            residents=frozenset(self.residents),
            memory=EngineMemory(active=mx.get_active_memory(), cache=mx.get_cache_memory()),
            seconds=time.perf_counter() - started,
            prefill_tokens=report.prefill_tokens,
            prefill_calls=report.prefill_calls,
            prefill_seconds=prefill_s,
        )

    def _remove(self, leaving: frozenset[RequestId]) -> None:
        if not leaving:
            return
        for request_id in [each for each in self._arriving if each in leaving]:
            self._beginnings.keep_prompt(self._arriving.pop(request_id))
        for decoding in self._decodings:
            rows = [i for i, row in enumerate(decoding.rows) if row.request_id in leaving]
            # They may only have made room for more urgent ones, and then they come back.
            self._leave(decoding, rows, may_return=True)
        self._close_ranks()

    def _trim(self) -> None:
        self._beginnings.clear()
        mx.clear_cache()
        freed_memory.give_back()

    def _admit(self, admit: Admit, report: TurnReport) -> None:
        if admit.request_id in self.residents:
            raise ValueError(f"{admit.request_id} is in the batch already")
        try:
            self._check(admit)
            answer = self._answers.open(admit.stop, admit.form)
            answer.recall(admit.produced)
            guide = self._guides.open(admit.form, admit.produced)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it concerns this sequence only
            report.failure(admit.request_id, exc)
            return
        self._arriving[admit.request_id] = Row(
            request_id=admit.request_id,
            tokens=[*admit.prompt, *admit.produced],
            prompt_length=len(admit.prompt),
            max_tokens=admit.max_tokens,
            sampling=admit.sampling,
            answer=answer,
            produced=len(admit.produced),
            guide=guide,
        )

    def _check(self, admit: Admit) -> None:
        """Refuse what the device would not notice: it reads beyond an array without a word."""
        if not admit.prompt:
            raise ValueError("the prompt has no tokens")
        if admit.max_tokens <= len(admit.produced):
            raise ValueError(f"max_tokens {admit.max_tokens} leaves no token to produce")
        size = self._vocabulary_size
        for token in (*admit.prompt, *admit.produced):
            if not 0 <= token < size:
                raise ValueError(f"token {token} is not one of the model's {size}")
        for token, _ in admit.sampling.logit_bias:
            if not 0 <= token < size:
                raise ValueError(f"logit_bias: token {token} is not one of the model's {size}")

    # --- prefill ---------------------------------------------------------------------------

    def _prefill(self, budget: int, report: TurnReport) -> None:
        """Compute the ends of prompts, several in one call, and the beginning of one more."""
        if not self._arriving:
            return
        plan = PrefillPlan(budget, padding_max=self._padding_max, share=self._share)
        ready: list[ReadyRows] = []
        for row in self._arriving.values():
            if plan.is_full:
                break
            if row.cache is None:
                self._begin(row, plan, ready, report)
            plan.add(lengths_of(row))
        plan.close()
        self._run(plan.take(), ready, report)
        if ready:
            self._join(ready)

    def _begin(
        self, row: Row, plan: PrefillPlan, ready: list[ReadyRows], report: TurnReport
    ) -> None:
        """Give a row a cache, with what is computed of its prompt by then.

        If what is planned serves it better than what there is, that is computed before.
        """
        self._run(plan.take(), ready, report)
        longest = self._beginnings.longest(row, [*self._decodings, *ready])
        coming = [self._arriving[request_id] for request_id in plan.open_ids]
        if self._beginnings.is_worth_waiting(row, longest, coming):
            plan.close()
            self._run(plan.take(), ready, report)
            longest = self._beginnings.longest(row, [*self._decodings, *ready])
        row.cache, row.cached, row.stem = self._beginnings.find(row, longest)
        row.done = row.cached

    def _run(self, calls: Iterable[ModelCall], ready: list[ReadyRows], report: TurnReport) -> None:
        """Compute what was planned; rows whose prompts are computed by then become `ready`."""
        for call in calls:
            if isinstance(call, ComputePart):
                row = self._arriving[call.request_id]
                compute_part(self._model, row, call.count)
                report.prefill_calls += 1
                report.prefill_tokens += call.count
                if call.ends_later:
                    report.prefill(row)
            else:
                ready.append(self._compute_ends(call.request_ids, report))

    def _compute_ends(self, request_ids: Iterable[RequestId], report: TurnReport) -> ReadyRows:
        rows = [self._arriving[request_id] for request_id in request_ids]
        if self._share:
            for row in rows:
                assert row.cache is not None
                row.stem = lengthened(row.stem, row.cache, row.done)
        left = [row.left for row in rows]
        # The last token of each prompt waits for the first decode step.
        report.prefill_calls += int(max(left) > 1)
        report.prefill_tokens += sum(left)
        computed = compute_ends(self._model, rows)
        for row in rows:
            report.prefill(row)
        self._beginnings.keep_computed(computed)
        return computed

    def _join(self, ready: list[ReadyRows]) -> None:
        for rows in ready:
            for row in rows.rows:
                del self._arriving[row.request_id]
        for rows in merge_alike(ready, self._padding_max):
            self._decodings.append(Decoding(self._model, rows.rows, rows.caches))
        self._close_ranks()
        # Prompts leave behind buffers of sizes that decoding has no use for.
        mx.clear_cache()

    # --- decoding --------------------------------------------------------------------------

    def _decode(self, report: TurnReport) -> bool:
        """Returns whether there were rows whose first step this has only started."""
        if not self._decodings:
            return False
        starting = any(not row.started for each in self._decodings for row in each.rows)
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEARS == 0:
            mx.clear_cache()
        finished = [self._step(decoding, report) for decoding in self._decodings]
        if any(finished):
            for decoding, rows in zip(self._decodings, finished, strict=True):
                self._leave(decoding, rows, may_return=False)
            self._close_ranks()
        return starting

    def _step(self, decoding: Decoding, report: TurnReport) -> list[int]:
        """One token for each row; returns the rows that have ended."""
        tokens, places = decoding.step()
        outputs, end_tokens = report.outputs, self._end_tokens
        finished = []
        for i, (row, token, place) in enumerate(zip(decoding.rows, tokens, places, strict=True)):
            if not row.started:
                row.started = True
                continue
            if row.guide is not None and (failure := row.guide.failure) is not None:
                report.failure(row.request_id, failure)
                finished.append(i)
                continue
            try:
                logprobs = () if place is None else (self._logprob(row, token, place),)
                output = row.take(token, end_tokens, logprobs)
            except Exception as exc:  # noqa: BLE001 - as above
                report.failure(row.request_id, exc)
                finished.append(i)
                continue
            outputs.append(output)
            if output.finish is not None:
                finished.append(i)
        return finished

    def _logprob(self, row: Row, token: int, place: Place) -> TokenLogprob:
        return logprob_of(
            place, token, row.sampling.top_logprobs, self._answers.vocabulary.token_text
        )

    def _leave(self, decoding: Decoding, rows: list[int], *, may_return: bool) -> None:
        if not rows:
            return
        for i in rows:
            self._beginnings.keep_answer(decoding, i, may_return=may_return)
        leaving = frozenset(rows)
        decoding.keep([i for i in range(len(decoding)) if i not in leaving])

    def _close_ranks(self) -> None:
        """After rows have come or gone."""
        self._decodings = merge_alike([d for d in self._decodings if len(d)], self._padding_max)
