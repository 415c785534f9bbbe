"""Rows that decode together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from trio_worker.engine.caches import share_positions
from trio_worker.engine.guide import allowed
from trio_worker.engine.logprobs import Place
from trio_worker.engine.row import Row, in_groups
from trio_worker.engine.sampling import Masks, Plan


class Decoding:
    """Rows that decode together over caches that they have in common, a step ahead of who reads.

    Its state: the rows, the tokens that each has in the caches, and the caches; the step in
    flight on the device, whose tokens nobody has seen yet; and how to draw for just these rows.
    """

    def __init__(self, model: Any, rows: Sequence[Row], caches: list[Any]) -> None:
        """Rows whose prompts are computed but for the last token, which their first step takes.

        Takes over their caches, which are merged already. Nothing is computed yet: the rows make
        their first step with all others that they are put together with.
        """
        self.rows = list(rows)
        self.tokens = [row.tokens[:-1] for row in rows]
        self.caches = caches
        self._model = model
        self._next_tokens = mx.array([row.tokens[-1] for row in rows], dtype=mx.uint32)
        self._next_places: list[Place | None] = [None for _ in rows]
        self._plan: Plan | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Of each row, in tokens after its stem, before any padding."""
        return [
            len(tokens) - row.stem_length
            for row, tokens in zip(self.rows, self.tokens, strict=True)
        ]

    def extend(self, other: Decoding) -> None:
        """Take over the rows of `other`; those that begin with the same stem follow each other."""
        self.rows += other.rows
        self.tokens += other.tokens
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.extend(theirs)
        self._next_tokens = mx.concatenate([self._next_tokens, other._next_tokens])
        self._next_places += other._next_places
        self._plan = None
        if (order := in_groups(self.rows)) is not None:
            self.keep(order)

    def keep(self, indices: list[int]) -> None:
        """Let go of all rows but these, which stand in this order from now on."""
        self.rows = [self.rows[i] for i in indices]
        self.tokens = [self.tokens[i] for i in indices]
        self._next_places = [self._next_places[i] for i in indices]
        self._plan = None
        if indices:
            self._next_tokens = self._next_tokens[indices]
            for layer in self.caches:
                layer.filter(indices)
        else:
            # mlx-lm's caches do not know how to keep no row.
            self._next_tokens, self.caches = mx.array([], dtype=mx.uint32), []

    def held(self, index: int) -> list[int]:
        """The tokens of a row that are in the caches."""
        return self.tokens[index]

    def extract(self, index: int) -> list[Any]:
        """A copy of what a row has in the caches."""
        return [layer.extract(index) for layer in self.caches]

    def step(self) -> tuple[list[int], list[Place | None]]:
        """Take the tokens of the step in flight, and start the next one.

        A token has a place in the log-probabilities if its row has asked for them.
        Rows that have just started have none in flight: theirs are the last of their prompts.
        Where a row has a guide, the next step is started in two parts: all that hangs on no
        mask, and, once the tokens in flight are known, the choice.
        """
        inputs, places = self._next_tokens, self._next_places
        share_positions(self.caches)
        logits = self._model(inputs[:, None], cache=self.caches)[:, -1, :]
        if self._plan is None:
            self._plan = Plan(self.rows, self.tokens, logits.shape[-1])
        masks = None
        if any(row.guide is not None for row in self.rows):
            # What may come next hangs on what is in flight. The device computes on meanwhile.
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
            mx.eval(inputs)
            masks = self._masks(inputs.tolist(), logits.shape[-1])
        drawn = self._plan.draw(logits, inputs, self.tokens, masks)
        self._next_tokens, self._next_places = drawn
        mx.async_eval(  # type: ignore[no-untyped-call]
            self._next_tokens, _arrays(self._next_places)
        )

        mx.eval(inputs, _arrays(places))
        tokens: Any = inputs.tolist()
        for before, token in zip(self.tokens, tokens, strict=True):
            before.append(token)
        return tokens, places

    def _masks(self, tokens: Any, size: int) -> Masks | None:
        """What may be drawn after the tokens in flight; None: whatever there is, for every row."""
        for row, token in zip(self.rows, tokens, strict=True):
            # Of a row that has just started, it is the prompt's, or was known when it came.
            if row.guide is not None and row.started:
                row.guide.consume(token)
        guides = {
            i: row.guide
            for i, row in enumerate(self.rows)
            if row.guide is not None and row.guide.limits
        }
        return Masks([*guides], allowed([*guides.values()], size)) if guides else None


def _arrays(places: list[Place | None]) -> list[mx.array]:
    distinct = {id(place[0]): place[0] for place in places if place is not None}
    return [array for logprobs in distinct.values() for array in logprobs.arrays]
