"""The running batch: sequences wait, prefill and decode together; any may come or go at any turn.

Built on the decoding half of mlx-lm's `BatchGenerator` rather than on the whole. The generator
bounds prefill per row and not per turn, samples row by row as soon as requests differ, and sets
Metal's wired limit when it is made, which has brought whole machines down (ml-explore/mlx#3186).

1. A sequence is in `_arriving` until its prompt is computed, then a row of `_decoding`.
2. A sequence that prefills has a cache of its own, so its chunks are exact and need no padding;
   those that become ready in one turn join the batch together.
3. A step is in flight on the device between turns: a turn takes its tokens and starts the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, StopSequences
from mlx_lm.models.cache import make_prompt_cache

from trio_worker.engine import heap
from trio_worker.engine.prefix import PrefixCache
from trio_worker.engine.sampling import Logprobs, Plan
from trio_worker.engine.text import Answer, Vocabulary
from trio_worker.frames import (
    AdmitFrame,
    FailureFrame,
    LogprobFrame,
    OutputFrame,
    PrefillFrame,
    SamplingFrame,
    Turn,
    TurnDone,
)

STOP, LENGTH = "stop", "length"

STEPS_BETWEEN_CLEARS = 512
"""The allocator's cache of freed buffers is emptied so often, as mlx-lm does."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence from its admission to its end."""

    request_id: str
    tokens: list[int]
    """Prompt, and what was produced before it was admitted."""
    prompt_length: int
    max_tokens: int
    sampling: SamplingFrame
    answer: Answer
    produced: int
    """Tokens of the answer so far."""
    done: int = 0
    """How many of `tokens` are computed, or came from the prefix cache."""
    cached: int = 0
    cache: list[Any] | None = None
    """Of the tokens that are done, from the first chunk until the sequence decodes."""


@dataclass(slots=True)
class _Outcome:
    """What one turn did, while it is being done."""

    outputs: list[OutputFrame] = field(default_factory=list)
    prefills: list[PrefillFrame] = field(default_factory=list)
    failures: list[FailureFrame] = field(default_factory=list)
    prefill_tokens: int = 0


class Decoding(GenerationBatch):  # type: ignore[misc]
    """mlx-lm's decoding batch, with every row's token drawn in one go.

    Its `uids` are request ids and its `samplers` the sequences themselves: the parent class
    carries both along when rows come and go. `_next_logprobs` holds each row's place in
    `Logprobs`, or None.
    """

    _plan: Plan | None = None
    _next_tokens: Any
    _next_logprobs: list[tuple[Logprobs, int] | None]

    def extend(self, batch: Decoding) -> None:
        super().extend(batch)
        self._plan = None

    def filter(self, keep: list[int]) -> None:
        super().filter(keep)
        self._plan = None

    def step(self) -> tuple[list[int], list[tuple[Logprobs, int] | None]]:
        """Take the tokens of the step in flight, and start the next one."""
        return self._step()

    def _step(self) -> tuple[list[int], list[tuple[Logprobs, int] | None]]:
        inputs, places = self._next_tokens, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, places
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        if self._plan is None:
            self._plan = Plan(self.samplers, self.tokens, logits.shape[-1])
        self._next_tokens, self._next_logprobs = self._plan.draw(logits, inputs, self.tokens)
        mx.async_eval(  # type: ignore[no-untyped-call]
            self._next_tokens, _arrays(self._next_logprobs)
        )

        mx.eval(inputs, _arrays(places))
        tokens: list[int] = inputs.tolist()
        for before, token in zip(self.tokens, tokens, strict=True):
            before.append(token)
        return tokens, places


class Batch:
    """Every sequence the engine holds. All calls must come from the thread that made it."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        *,
        end_tokens: Iterable[int],
        vocabulary_size: int,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._end_tokens = frozenset(end_tokens)
        self._vocabulary_size = vocabulary_size
        self._prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._arriving: list[Sequence] = []
        self._decoding = _decoding(model, [])
        self._steps = 0

    @property
    def residents(self) -> list[str]:
        return [s.request_id for s in self._arriving] + list(self._decoding.uids)

    def turn(self, turn: Turn) -> TurnDone:
        """Remove, admit, one decode step for the rows that decode, and some prefill."""
        started = time.perf_counter()
        outcome = _Outcome()
        self._remove(frozenset(turn.remove))
        if turn.trim_caches:
            # After the removal: what has just left for want of memory is not worth keeping.
            self._trim()
        for admit in turn.admit:
            self._admit(admit, outcome)
        self._decode(outcome)
        self._prefill(turn.prefill_tokens, outcome)
        return TurnDone(
            outputs=tuple(outcome.outputs),
            prefills=tuple(outcome.prefills),
            failures=tuple(outcome.failures),
            residents=tuple(self.residents),
            memory_active=mx.get_active_memory(),
            memory_cache=mx.get_cache_memory(),
            memory_peak=mx.get_peak_memory(),
            seconds=time.perf_counter() - started,
            prefill_tokens=outcome.prefill_tokens,
        )

    def _remove(self, leaving: frozenset[str]) -> None:
        if not leaving:
            return
        for sequence in [s for s in self._arriving if s.request_id in leaving]:
            self._arriving.remove(sequence)
            self._keep(sequence)
        rows = range(len(self._decoding))
        gone = [i for i in rows if self._decoding.uids[i] in leaving]
        # It may only have made room for a more urgent one, and then it comes back.
        self._leave(gone)

    def _trim(self) -> None:
        if self._prefixes is not None:
            self._prefixes.clear()
        mx.clear_cache()
        heap.give_back()

    def _keep(self, sequence: Sequence) -> None:
        """Let the next prompt that begins alike have what was computed for this one."""
        if self._prefixes is None or sequence.cache is None:
            return
        computed = min(sequence.done, len(sequence.tokens) - 1)
        # A copy, and without the room for more: a cache grows by hundreds of tokens at a time.
        cache = [layer.merge([layer]).extract(0) for layer in sequence.cache]
        self._prefixes.keep(sequence.tokens[:computed], cache)

    def _admit(self, admit: AdmitFrame, outcome: _Outcome) -> None:
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

    def _check(self, admit: AdmitFrame) -> None:
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

    def _decode(self, outcome: _Outcome) -> None:
        if not len(self._decoding):
            return
        tokens, places = self._decoding.step()
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEARS == 0:
            mx.clear_cache()
        finished = []
        for i, (sequence, token, place) in enumerate(
            zip(self._decoding.samplers, tokens, places, strict=True)
        ):
            try:
                output = self._hand_out(sequence, token, place)
            except Exception as exc:  # noqa: BLE001 - as above
                outcome.failures.append(_failure(sequence.request_id, exc))
                finished.append(i)
                continue
            outcome.outputs.append(output)
            if output.finish is not None:
                finished.append(i)
        self._leave(finished)

    def _hand_out(
        self, sequence: Sequence, token: int, place: tuple[Logprobs, int] | None
    ) -> OutputFrame:
        sequence.produced += 1
        finish = None
        if token in self._end_tokens:
            text, finish = "", STOP
        else:
            text, stopped = sequence.answer.feed(token)
            if stopped:
                return self._output(sequence, token, text, STOP, place)
            if sequence.produced >= sequence.max_tokens:
                finish = LENGTH
        if finish is not None:
            rest, stopped = sequence.answer.finish()
            text += rest
            finish = STOP if stopped else finish
        return self._output(sequence, token, text, finish, place)

    def _output(
        self,
        sequence: Sequence,
        token: int,
        text: str,
        finish: str | None,
        place: tuple[Logprobs, int] | None,
    ) -> OutputFrame:
        logprob = None
        if place is not None:
            logprobs, index = place
            value, top = logprobs.read(index, sequence.sampling.top_logprobs)
            name = self._vocabulary.token_text
            logprob = LogprobFrame(
                token=name(token),
                logprob=value,
                top=tuple((name(other), number) for other, number in top),
            )
        return OutputFrame(
            request_id=sequence.request_id,
            token=token,
            text=text,
            finish=finish,
            logprob=logprob,
        )

    def _leave(self, rows: list[int]) -> None:
        if not rows:
            return
        if self._prefixes is not None:
            for i in rows:
                # What was handed out last has gone through the model for the step in flight.
                self._prefixes.keep(self._decoding.tokens[i], self._decoding.extract_cache(i))
        leaving = frozenset(rows)
        self._decoding.filter([i for i in range(len(self._decoding)) if i not in leaving])

    def _prefill(self, budget: int, outcome: _Outcome) -> None:
        ready = []
        for sequence in self._arriving:
            if budget <= 0:
                break
            if sequence.cache is None:
                sequence.cache, sequence.cached = self._begin(sequence.tokens)
                sequence.done = sequence.cached
            chunk = sequence.tokens[sequence.done : sequence.done + budget]
            budget -= len(chunk)
            outcome.prefill_tokens += len(chunk)
            sequence.done += len(chunk)
            if sequence.done == len(sequence.tokens):
                # The last one goes through the model in the row's first decode step.
                ready.append(sequence)
                del chunk[-1:]
            if chunk:
                self._model(mx.array([chunk]), cache=sequence.cache)
                mx.eval([layer.state for layer in sequence.cache])
                if sequence in ready:
                    # At once, for the next in this loop may begin with the same tokens.
                    self._keep(sequence)
            outcome.prefills.append(
                PrefillFrame(
                    request_id=sequence.request_id,
                    done=sequence.done,
                    total=len(sequence.tokens),
                    cached=sequence.cached,
                )
            )
        if ready:
            self._arriving = [s for s in self._arriving if s not in ready]
            self._join(ready)

    def _begin(self, tokens: list[int]) -> tuple[list[Any], int]:
        """A cache for these tokens, and how many of them it holds already."""
        # The last one has to go through the model for the logits that follow it.
        if self._prefixes is not None and (found := self._prefixes.find(tokens[:-1])):
            return found
        return make_prompt_cache(self._model), 0

    def _join(self, ready: list[Sequence]) -> None:
        joining = _decoding(self._model, ready)
        if len(self._decoding):
            self._decoding.extend(joining)
        else:
            self._decoding = joining
        # Prompts leave behind buffers of sizes that decoding has no use for.
        mx.clear_cache()


def _decoding(model: Any, rows: list[Sequence]) -> Decoding:
    """Rows whose prompts are computed but for the last token; their first step is started."""
    caches = zip(*(row.cache or () for row in rows), strict=True)
    decoding = Decoding(
        model,
        uids=[row.request_id for row in rows],
        inputs=mx.array([row.tokens[-1] for row in rows], dtype=mx.uint32),
        prompt_cache=[layers[0].merge(list(layers)) for layers in caches],
        tokens=[row.tokens[:-1] for row in rows],
        samplers=list(rows),
        fallback_sampler=None,
        logits_processors=[() for _ in rows],
        stop_sequences=[StopSequences() for _ in rows],
        max_tokens=[0 for _ in rows],
    )
    for row in rows:
        row.cache = None
    return decoding


def _arrays(places: list[tuple[Logprobs, int] | None]) -> list[mx.array]:
    distinct = {id(place[0]): place[0] for place in places if place is not None}
    return [array for logprobs in distinct.values() for array in logprobs.arrays]


def _failure(request_id: str, exc: Exception) -> FailureFrame:
    return FailureFrame(request_id=request_id, message=f"{type(exc).__name__}: {exc}")
