"""Plans which calls of the model a turn makes to compute prompts: a decision about lengths.

1. A call for the ends of prompts computes all that is left of several, each padded to the longest.
   The last token of a prompt is not part of it, since that one goes through the model in the
   first decode step.
2. A prompt that does not end in this turn is computed by itself, as far as the bound allows, and
   is the last of the turn.
3. The first call is what the turn is for; every further one is paid from the bound, and one for
   the beginning of a prompt must be worth it.
4. Rows are added in the order in which they have come. What a row can begin with may be what
   another one of the turn computes, so calls can be taken out and run before the next is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from trio_worker.engine import stem_lengths
from trio_worker.engine.padding import padding
from trio_worker.protocol.turn import RequestId

CALL_TOKENS = 32
"""Tokens that take about as long as one more call (38 to 60 on a CPU of two cores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The lengths of a row whose prompt is to be computed, in tokens."""

    request_id: RequestId
    length: int
    done: int
    """Computed already, or found."""
    stem: int
    """Of what it begins with apart from its own cache."""
    is_plain: bool = True
    """Whether its cache can be put together with others before its end is computed."""

    @property
    def left(self) -> int:
        return self.length - self.done

    @property
    def own(self) -> int:
        """What comes after the stem."""
        return self.length - self.stem


@dataclass(frozen=True, slots=True)
class ComputePart:
    """The next `count` tokens of one prompt, in a call of its own."""

    request_id: RequestId
    count: int
    ends_later: bool
    """Whether the prompt ends in a later turn, rather than with a call of this one."""


@dataclass(frozen=True, slots=True)
class ComputeEnds:
    """All that is left of these prompts, in one call."""

    request_ids: tuple[RequestId, ...]


ModelCall: TypeAlias = ComputePart | ComputeEnds


class PrefillPlan:
    """The calls of one turn, as far as its rows have been added.

    Its state: what is left of the turn's bound, how many calls were planned, those of them that
    nobody has taken yet, and the ends that will be computed in one call.
    """

    def __init__(self, budget: int, *, padding_max: int, share: bool) -> None:
        """At most `budget` tokens are computed, padding and further calls included.

        Rows whose ends are computed together decode together, so their padding is bounded by
        `padding_max`. `share`: whether rows may begin with stems.
        """
        self._budget = budget
        self._padding_max = padding_max
        self._share = share
        self._calls = 0
        self._untaken: list[ModelCall] = []
        self._ends: list[Prompt] = []

    @property
    def is_full(self) -> bool:
        return self._budget <= _cost(self._ends)

    @property
    def open_ids(self) -> list[RequestId]:
        """Those whose ends are computed in a call that others may still join."""
        return [prompt.request_id for prompt in self._ends]

    def add(self, prompt: Prompt) -> None:
        """Plan for one more row: its end, or as much as the bound allows, or nothing."""
        if self._ends and not self._fits(prompt):
            self.close()
        if prompt.left <= self._budget:
            self._ends.append(self._settled(prompt))
        elif self._budget >= (CALL_TOKENS if self._calls else 1):
            part = ComputePart(prompt.request_id, self._budget, ends_later=True)
            self._untaken.append(part)
            self._calls += 1
            self._budget = 0

    def close(self) -> None:
        """Let nobody join the ends that are open."""
        if not self._ends:
            return
        # What is left of a prompt may be its last token alone, which no call computes.
        calls = int(max(prompt.left for prompt in self._ends) > 1)
        self._budget -= _cost(self._ends) + calls * CALL_TOKENS
        self._calls += calls
        self._untaken.append(ComputeEnds(tuple(self.open_ids)))
        self._ends = []

    def take(self) -> list[ModelCall]:
        """The calls that were planned since the last time, but for the open one."""
        taken, self._untaken = self._untaken, []
        return taken

    def _fits(self, prompt: Prompt) -> bool:
        """Whether one call for it and the open ends is faster than two."""
        together = [*self._ends, prompt]
        return (
            all(each.is_plain for each in together)
            and _cost(together) <= self._budget
            and padding([each.left for each in together]) <= CALL_TOKENS * len(self._ends)
            and padding([each.own for each in together]) <= self._padding_max
        )

    def _settled(self, prompt: Prompt) -> Prompt:
        """Most of a long end has a call of its own, and becomes part of the row's stem."""
        if not self._share or prompt.own < stem_lengths.ALONE:
            return prompt
        done = prompt.done
        if prompt.left > stem_lengths.SHORTEST:
            count = prompt.left - 1
            self._untaken.append(ComputePart(prompt.request_id, count, ends_later=False))
            self._calls += 1
            self._budget -= count + CALL_TOKENS
            done += count
        return replace(prompt, done=done, stem=stem_lengths.lengthened(prompt.stem, done))


def _cost(prompts: Sequence[Prompt]) -> int:
    """Tokens that computing these ends in one call takes, each padded to the longest."""
    return len(prompts) * max((prompt.left for prompt in prompts), default=0)
