"""The running batch: sequences wait, prefill and decode together; any may come or go at any turn.

Built on the decoding half of mlx-lm's `BatchGenerator` rather than on the whole. The generator
bounds prefill per row and not per turn, samples row by row as soon as requests differ, and sets
Metal's wired limit when it is made, which has brought whole machines down (ml-explore/mlx#3186).

1. A sequence is in `_arriving` until its prompt is computed, then a row of one of `_decodings`.
2. A sequence whose prompt takes several turns has a cache of its own until its last chunk; those
   whose prompts end in one turn are computed in one call and join together (`prompts.py`).
3. The rows of one `Decoding` are padded to the longest, what they begin with in common apart
   (`stems.py`). Rows of very different lengths decode apart, for their padding would take longer
   than reading the weights once more, and would take memory that nobody has reserved.
4. A step is in flight on the device between turns: a turn takes its tokens and starts the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from trio_worker.engine import freed_memory as heap
from trio_worker.engine import shared_prefixes as stems
from trio_worker.engine.caches import RowsCache, can_share
from trio_worker.engine.decoding import Decoding, merge_alike, own_length
from trio_worker.engine.prefix_cache import (
    NEARLY_ALL,
    SHORTEST,
    Found,
    PrefixCache,
    TokenArray,
    as_array,
    common,
)
from trio_worker.engine.prompts import (
    CALL,
    Computed,
    compute,
    compute_ends,
    cost,
    fit_together,
    left,
)
from trio_worker.engine.sampling import Logprobs
from trio_worker.engine.shared_prefixes import Stem
from trio_worker.engine.text import Answer, Vocabulary
from trio_worker.protocol.turn import (
    Admit,
    EngineMemory,
    FinishReason,
    Output,
    Prefill,
    Report,
    RequestId,
    Sampling,
    SequenceFailure,
    TokenLogprob,
    Work,
)

STEPS_BETWEEN_CLEARS = 512
"""The allocator's cache of freed buffers is emptied so often, as mlx-lm does."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence from its admission to its end."""

    request_id: RequestId
    tokens: list[int]
    """Prompt, and what was produced before it was admitted."""
    prompt_length: int
    max_tokens: int
    sampling: Sampling
    answer: Answer
    produced: int
    """Tokens of the answer so far."""
    done: int = 0
    """How many of `tokens` are computed, or came from the prefix cache."""
    cached: int = 0
    cache: list[Any] | None = None
    """Of the tokens that are done, from the first chunk until the sequence decodes."""
    started: bool = False
    """Whether its first decode step is in flight, or done."""
    stem: Stem | None = None
    """What it begins with, in common with other rows or so that they need not be padded to it."""
    prefix: TokenArray = field(init=False)
    """The tokens that a kept cache may hold: the last has to give the logits that follow it."""

    def __post_init__(self) -> None:
        self.prefix = as_array(self.tokens[:-1])


@dataclass(slots=True)
class _Outcome:
    """What one turn did, while it is being done."""

    outputs: list[Output] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    failures: list[SequenceFailure] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_calls: int = 0

    def prefill(self, sequence: Sequence, count: int, done: int) -> None:
        """Of a sequence, `count` tokens more are computed, `done` in all."""
        self.prefill_tokens += count
        self.prefills.append(
            Prefill(
                request_id=sequence.request_id,
                done=done,
                total=len(sequence.tokens),
                cached=sequence.cached,
            )
        )


class Batch:
    """Every sequence the engine holds. All calls must come from the thread that made it."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        *,
        end_tokens: Iterable[int],
        vocabulary_size: int,
        padding_max: int,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._end_tokens = frozenset(end_tokens)
        self._vocabulary_size = vocabulary_size
        self._share = can_share(model)
        self._prefixes = (
            PrefixCache(prefix_cache_bytes, share=self._share) if prefix_cache_bytes else None
        )
        self._arriving: list[Sequence] = []
        self._decodings: list[Decoding] = []
        self._padding_max = padding_max
        self._steps = 0

    @property
    def residents(self) -> list[RequestId]:
        decoding = [request_id for each in self._decodings for request_id in each.uids]
        return [s.request_id for s in self._arriving] + decoding

    def turn(self, work: Work) -> Report:
        """Remove, admit, some prefill, and one decode step for the rows that decode by then.

        Where prompts have ended there are two, since in the first those rows have no token yet.
        """
        started = time.perf_counter()
        outcome = _Outcome()
        self._remove(frozenset(work.remove))
        if work.trim_caches:
            # After the removal: what has just left for want of memory is not worth keeping.
            self._trim()
        for admit in work.admit:
            self._admit(admit, outcome)
        # In this order, whoever's prompt ends now gives its first token before more is prefilled.
        prefill_began_at = time.perf_counter()
        self._prefill(work.prefill_tokens, outcome)
        prefill_s = time.perf_counter() - prefill_began_at
        if self._decode(outcome):
            self._decode(outcome)
        return Report(
            outputs=tuple(outcome.outputs),
            prefills=tuple(outcome.prefills),
            failures=tuple(outcome.failures),
            residents=frozenset(self.residents),
            memory=EngineMemory(active=mx.get_active_memory(), cache=mx.get_cache_memory()),
            seconds=time.perf_counter() - started,
            prefill_tokens=outcome.prefill_tokens,
            prefill_calls=outcome.prefill_calls,
            prefill_seconds=prefill_s,
        )

    def _remove(self, leaving: frozenset[RequestId]) -> None:
        if not leaving:
            return
        for sequence in [s for s in self._arriving if s.request_id in leaving]:
            self._arriving.remove(sequence)
            self._keep(sequence)
        for decoding in self._decodings:
            rows = [i for i, uid in enumerate(decoding.uids) if uid in leaving]
            # They may only have made room for more urgent ones, and then they come back.
            self._leave(decoding, rows, may_return=True)
        self._close_ranks()

    def _trim(self) -> None:
        if self._prefixes is not None:
            self._prefixes.clear()
        mx.clear_cache()
        heap.give_back()

    def _keep(self, sequence: Sequence) -> None:
        """Let the next prompt that begins alike have what was computed for this one."""
        if self._prefixes is None or sequence.cache is None or not sequence.done:
            return
        computed = min(sequence.done, len(sequence.tokens) - 1)
        self._prefixes.keep(sequence.tokens[:computed], _compact(sequence.cache))

    def _admit(self, admit: Admit, outcome: _Outcome) -> None:
        if admit.request_id in self.residents:
            raise ValueError(f"{admit.request_id} is in the batch already")
        try:
            self._check(admit)
            answer = Answer(self._vocabulary, admit.stop)
            for token in admit.produced:
                answer.feed(token)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it concerns this sequence only
            outcome.failures.append(_failure(admit.request_id, exc))
            return
        self._arriving.append(
            Sequence(
                request_id=admit.request_id,
                tokens=[*admit.prompt, *admit.produced],
                prompt_length=len(admit.prompt),
                max_tokens=admit.max_tokens,
                sampling=admit.sampling,
                answer=answer,
                produced=len(admit.produced),
            )
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

    def _decode(self, outcome: _Outcome) -> bool:
        """Returns whether there were rows whose first step this has only started."""
        if not self._decodings:
            return False
        starting = any(not row.started for each in self._decodings for row in each.samplers)
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEARS == 0:
            mx.clear_cache()
        finished = [self._step(decoding, outcome) for decoding in self._decodings]
        if any(finished):
            for decoding, rows in zip(self._decodings, finished, strict=True):
                self._leave(decoding, rows, may_return=False)
            self._close_ranks()
        return starting

    def _step(self, decoding: Decoding, outcome: _Outcome) -> list[int]:
        """One token for each row; returns the rows that have ended."""
        tokens, places = decoding.step()
        finished = []
        for i, (sequence, token, place) in enumerate(
            zip(decoding.samplers, tokens, places, strict=True)
        ):
            if not sequence.started:
                sequence.started = True
                continue
            try:
                output = self._hand_out(sequence, token, place)
            except Exception as exc:  # noqa: BLE001 - as above
                outcome.failures.append(_failure(sequence.request_id, exc))
                finished.append(i)
                continue
            outcome.outputs.append(output)
            if output.finish is not None:
                finished.append(i)
        return finished

    def _hand_out(
        self, sequence: Sequence, token: int, place: tuple[Logprobs, int] | None
    ) -> Output:
        sequence.produced += 1
        finish = None
        if token in self._end_tokens:
            text, finish = "", FinishReason.STOP
        else:
            text, stopped = sequence.answer.feed(token)
            if stopped:
                return self._output(sequence, token, text, FinishReason.STOP, place)
            if sequence.produced >= sequence.max_tokens:
                finish = FinishReason.LENGTH
        if finish is not None:
            rest, stopped = sequence.answer.finish()
            text += rest
            finish = FinishReason.STOP if stopped else finish
        return self._output(sequence, token, text, finish, place)

    def _output(
        self,
        sequence: Sequence,
        token: int,
        text: str,
        finish: FinishReason | None,
        place: tuple[Logprobs, int] | None,
    ) -> Output:
        logprob = None
        if place is not None:
            logprobs, index = place
            value, top = logprobs.read(index, sequence.sampling.top_logprobs)
            name = self._vocabulary.token_text
            logprob = TokenLogprob(
                token=name(token),
                logprob=value,
                top=tuple((name(other), number) for other, number in top),
            )
        return Output(
            request_id=sequence.request_id,
            token=token,
            text=text,
            finish=finish,
            logprob=logprob,
        )

    def _leave(self, decoding: Decoding, rows: list[int], *, may_return: bool) -> None:
        if not rows:
            return
        if self._prefixes is not None:
            for i in rows:
                # What was handed out last has gone through the model for the step in flight.
                tokens, stem = decoding.tokens[i], decoding.samplers[i].stem
                if not may_return and self._prefixes.adds_little(tokens):
                    continue
                if stem is not None and stem.length >= NEARLY_ALL * len(tokens):
                    # With the rest it would have to be copied, into memory that nobody reserved.
                    self._prefixes.keep(tokens[: stem.length], stem.handles())
                else:
                    self._prefixes.keep(tokens, decoding.extract_cache(i))
        leaving = frozenset(rows)
        decoding.filter([i for i in range(len(decoding)) if i not in leaving])

    def _close_ranks(self) -> None:
        """After rows have come or gone."""
        self._decodings = merge_alike([d for d in self._decodings if len(d)], self._padding_max)

    def _prefill(self, budget: int, outcome: _Outcome) -> None:
        """Compute the ends of prompts, several in one call, and the beginning of one more.

        The first call is what the turn is for; every further one is paid from the budget, and one
        for a beginning must be worth it.
        """
        ready: list[Computed] = []
        ends: list[Sequence] = []
        for sequence in self._arriving:
            if budget <= cost(ends):
                break
            if sequence.cache is None:
                found = self._find(sequence, ready, ends)
                if found is None:
                    budget -= self._compute(ends, ready, outcome)
                    ends = []
                    found = self._find(sequence, ready, ends)
                assert found is not None
                sequence.cache, sequence.cached, sequence.stem = found
                sequence.done = sequence.cached
            if ends and not self._fits([*ends, sequence], budget):
                budget -= self._compute(ends, ready, outcome)
                ends = []
            if left(sequence) <= budget:
                budget -= self._settle_stem(sequence, outcome)
                ends.append(sequence)
            elif budget >= (CALL if outcome.prefill_calls else 1):
                compute(self._model, sequence, budget)
                outcome.prefill_calls += 1
                sequence.done += budget
                outcome.prefill(sequence, budget, sequence.done)
                budget = 0
        self._compute(ends, ready, outcome)
        if ready:
            self._arriving = [s for s in self._arriving if s.done < len(s.tokens)]
            self._join(ready)

    def _settle_stem(self, sequence: Sequence, outcome: _Outcome) -> int:
        """Before its end is computed; returns what computing most of a long end has cost."""
        if not self._share or own_length(sequence, len(sequence.tokens)) < stems.ALONE:
            return 0
        spent = 0
        if left(sequence) > stems.SHORTEST:
            count = left(sequence) - 1
            compute(self._model, sequence, count)
            outcome.prefill_calls += 1
            sequence.done += count
            outcome.prefill_tokens += count
            spent = count + CALL
        assert sequence.cache is not None
        sequence.stem = stems.lengthened(sequence.stem, sequence.cache, sequence.done)
        return spent

    def _fits(self, ends: list[Sequence], budget: int) -> bool:
        return cost(ends) <= budget and fit_together(ends, self._padding_max)

    def _find(
        self, sequence: Sequence, ready: list[Computed], ends: list[Sequence]
    ) -> Found | None:
        """A cache for a sequence's tokens, and how many of them it holds already.

        None if it is worth waiting until the `ends` have been computed, to begin with one's.
        """
        if self._prefixes is None:
            return Found(make_prompt_cache(self._model), 0, None)
        wanted = sequence.prefix
        kept = self._prefixes.longest(wanted)
        length, caches, index, row = self._longest_running(wanted, ready)
        stem = row.stem if row else None
        enough = max(kept, length) + SHORTEST
        if any(common(end.prefix, wanted) >= enough for end in ends):
            return None
        if stem is not None and length >= stem.length >= max(kept, length - stems.STEP):
            return Found(stem.handles(), stem.length, stem)
        if length >= kept + SHORTEST:
            self._prefixes.keep(sequence.tokens[:length], _beginning(caches, index, length))
        found = self._prefixes.find(wanted) or Found(make_prompt_cache(self._model), 0, None)
        if row and stem is None and found.stem and found.stem.length <= length:
            for layer in caches:
                layer.adopt(index, found.stem)
            row.stem = found.stem
        return found

    def _longest_running(
        self, wanted: TokenArray, ready: list[Computed]
    ) -> tuple[int, list[Any], int, Sequence | None]:
        """The row with the most of these tokens at its beginning: how many, and where it is."""
        rows = [
            (_shared(row, tokens, wanted), each.prompt_cache, i, row)
            for each in self._decodings
            for i, (row, tokens) in enumerate(zip(each.samplers, each.tokens, strict=True))
        ] + [
            (common(row.prefix, wanted), each.caches, i, row)
            for each in ready
            for i, row in enumerate(each.rows)
        ]
        shareable = [row for row in rows if can_trim_prompt_cache(row[1])]
        return max(shareable, key=lambda row: row[0], default=(0, [], 0, None))

    def _compute(self, ends: list[Sequence], ready: list[Computed], outcome: _Outcome) -> int:
        """Returns what it has cost, in tokens: padding and one more call included."""
        if not ends:
            return 0
        width = max(map(left, ends))
        # The last token of each prompt waits for the first decode step.
        calls = int(width > 1)
        outcome.prefill_calls += calls
        took = cost(ends) + calls * CALL
        for sequence in ends:
            outcome.prefill(sequence, left(sequence), len(sequence.tokens))
        computed = compute_ends(self._model, ends)
        ready.append(computed)
        if self._prefixes is not None and not can_trim_prompt_cache(computed.caches):
            for i, sequence in enumerate(ends):
                # From others it can be taken while they run, by whoever begins with the same.
                self._prefixes.keep(sequence.tokens[:-1], _beginning(computed.caches, i))
        return took

    def _join(self, ready: list[Computed]) -> None:
        for computed in merge_alike(ready, self._padding_max):
            self._decodings.append(Decoding.start(self._model, computed.rows, computed.caches))
        self._close_ranks()
        # Prompts leave behind buffers of sizes that decoding has no use for.
        mx.clear_cache()


def _shared(row: Sequence, tokens: list[int], wanted: TokenArray) -> int:
    """How many of a decoding row's tokens, `tokens` by now, are the first of `wanted`."""
    shared = common(row.prefix, wanted)
    # Only who goes on from its whole prompt makes it worth looking at its answer.
    return shared if shared < len(row.prefix) else common(as_array(tokens), wanted)


def _beginning(caches: list[Any], index: int, length: int | None = None) -> list[Any]:
    """A copy of one row's cache, of its first `length` tokens."""
    if all(isinstance(layer, RowsCache) for layer in caches):
        return [layer.beginning(index, length) for layer in caches]
    cache = [layer.extract(index) for layer in caches]
    if length is None or length == cache[0].size():
        return cache
    trim_prompt_cache(cache, cache[0].size() - length)
    # Once more: what was trimmed still takes its memory.
    return _compact(cache)


def _compact(cache: list[Any]) -> list[Any]:
    """A copy without the room for more: a cache grows by hundreds of tokens at a time."""
    return [layer.merge([layer]).extract(0) for layer in cache]


def _failure(request_id: RequestId, exc: Exception) -> SequenceFailure:
    return SequenceFailure(request_id=request_id, message=f"{type(exc).__name__}: {exc}")
