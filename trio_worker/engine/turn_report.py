"""What one turn did, while it is being done, in the words that the worker is told it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trio_worker.engine.logprobs import Place
from trio_worker.engine.row import Row
from trio_worker.grammar import GrammarRefused
from trio_worker.protocol.turn import (
    Output,
    Prefill,
    RequestId,
    SequenceFailure,
    TokenLogprob,
)


@dataclass(slots=True)
class TurnReport:
    """Tokens handed out, prompts computed, and sequences that failed."""

    outputs: list[Output] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    failures: list[SequenceFailure] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_calls: int = 0

    def prefill(self, row: Row) -> None:
        """How far a row's prompt is computed."""
        self.prefills.append(
            Prefill(
                request_id=row.request_id,
                done=row.done,
                total=len(row.tokens),
                cached=row.cached,
            )
        )

    def failure(self, request_id: RequestId, exc: Exception) -> None:
        """A sequence that cannot be computed, or whose token could not be handed out."""
        is_askers_fault = isinstance(exc, GrammarRefused)
        self.failures.append(
            SequenceFailure(
                request_id=request_id,
                message=str(exc) if is_askers_fault else f"{type(exc).__name__}: {exc}",
                is_askers_fault=is_askers_fault,
            )
        )


def logprob_of(place: Place, token: int, top: int, name: Callable[[int], str]) -> TokenLogprob:
    """The log-probability of a row's token and of the `top` likeliest.

    `name` gives a token as text.
    """
    logprobs, index = place
    value, likeliest = logprobs.read(index, top)
    return TokenLogprob(
        token=name(token),
        logprob=value,
        top=tuple((name(other), number) for other, number in likeliest),
    )
