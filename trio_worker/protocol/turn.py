"""What goes into one turn of the engine and what comes out of it.

A turn is a bounded amount of prefill and one decode step for every running sequence, or two where
prompts have ended: the first of these is the one that takes the last of their tokens.
These values are also what goes over the line between the two processes (`frames.py`).
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import NewType

from trio_worker.protocol.prompt import FREE, Form, Piece
from trio_worker.protocol.value import Value

RequestId = NewType("RequestId", str)

TURNS_UNDER_WAY_MAX = 8
"""Turns that may have begun before the report of the first is taken."""


class FinishReason(StrEnum):
    """Why a completed answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """It calls tools, and is complete."""


class Sampling(Value, frozen=True, kw_only=True):
    """How tokens are chosen. The defaults switch everything off: greedy decoding."""

    temperature: float = 0.0
    """0…2; 0 is greedy."""
    top_p: float = 1.0
    """(0, 1]; 1 is off."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """0 is off."""
    repetition_penalty: float = 1.0
    """1 is off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, added to its logit)."""
    seed: int = 0
    """0 ≤ seed < 2^53. A token is a function of (seed, position) and the logits alone."""
    logprobs: bool = False
    top_logprobs: int = 0
    """How many alternatives to report beside each token; 0…20, only with `logprobs`."""


class Admit(Value, frozen=True, kw_only=True):
    """A sequence that enters the batch, or comes back to it after the engine was lost."""

    request_id: RequestId
    prompt: tuple[int, ...]
    produced: tuple[int, ...]
    """Tokens handed out before; they are computed again silently and not handed out again."""
    max_tokens: int
    """Counted from the end of the prompt, `produced` included."""
    sampling: Sampling
    stop: tuple[str, ...]
    """Looked for in the answer's text, not in what it reasons or calls."""
    form: Form = FREE


class Work(Value, frozen=True, kw_only=True, tag=True):
    """What one turn is to do: remove, then admit, then one decode step and some prefill."""

    admit: tuple[Admit, ...] = ()
    remove: tuple[RequestId, ...] = ()
    """Unknown ids are ignored."""
    prefill_tokens: int = 512
    """At most this many prompt tokens are computed in this turn, over all rows together."""
    trim_caches: bool = False
    """Give back what the engine holds for reuse only: kept prefixes, and its allocator's cache."""


class TokenLogprob(Value, frozen=True, kw_only=True):
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Output(Value, frozen=True, kw_only=True):
    """One token of one sequence."""

    request_id: RequestId
    token: int
    text: str
    """What may be shown now; may be empty while a character or a stop string is incomplete.

    The texts of a sequence add up to a function of its tokens; a stop string is not part, nor is
    what it reasons and calls.
    """
    finish: FinishReason | None = None
    """Set on the last token; the sequence has left the engine."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of tokens of the text, if they were asked for: mostly of this one. One that may yet turn
    out to be part of a call waits until that is clear."""
    beside: tuple[Piece, ...] = ()
    """What the token adds to the reasoning and to the calls, in order."""
    is_reasoning: bool = False
    """The token is part of the reasoning, its marks included."""


class Prefill(Value, frozen=True, kw_only=True):
    """How far the prefill of one sequence has come."""

    request_id: RequestId
    done: int
    total: int
    cached: int = 0
    """Tokens taken from the prefix cache rather than computed."""


class SequenceFailure(Value, frozen=True, kw_only=True):
    """This sequence cannot be computed; it has left the engine, the others are unharmed."""

    request_id: RequestId
    message: str
    is_askers_fault: bool = False
    """What was asked for shows only now that it cannot be had."""


class EngineMemory(Value, frozen=True, kw_only=True):
    """Bytes as the engine's own allocator counts them."""

    active: int
    cache: int


class Report(Value, frozen=True, kw_only=True, tag=True):
    """What one turn did."""

    outputs: tuple[Output, ...]
    prefills: tuple[Prefill, ...]
    failures: tuple[SequenceFailure, ...]
    residents: frozenset[RequestId]
    """The sequences the engine holds after this turn."""
    memory: EngineMemory
    seconds: float
    """Time spent inside the engine."""
    prefill_tokens: int
    """Prompt tokens computed in this turn."""
    prefill_calls: int
    """Of the model; each has to read its weights."""
    prefill_seconds: float

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many sequences got a token from each decode step; mostly there is one step."""
        if len({output.request_id for output in self.outputs}) == len(self.outputs):
            return (len(self.outputs),) if self.outputs else ()
        tokens = Counter(output.request_id for output in self.outputs)
        return tuple(
            sum(count > step for count in tokens.values()) for step in range(max(tokens.values()))
        )


class EngineInfo(Value, frozen=True, kw_only=True, tag=True):
    """What is known once the model is loaded and prewarmed."""

    model: str
    """Its name on the wire."""
    context_length: int
    """Tokens of prompt and answer together."""
    cache_bytes_per_token: int
    vocabulary_size: int
    """Tokens are the numbers below it."""
    device: str
    """For people: the chip, the number type, and the BLAS where that matters."""
    accelerator: str = "cpu"
    """`metal`, `cuda` or `cpu`."""
