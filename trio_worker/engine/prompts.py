"""Computes the ends of several prompts in one call of the model, for each call reads its weights.

A row's end is what is left of its prompt, but for the last token: that one goes through the model
in the row's first decode step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from trio_worker.engine.caches import RowsCache, is_plain, share_positions
from trio_worker.engine.decoding import in_groups, own_length
from trio_worker.engine.shared_prefixes import Stem

CALL = 32
"""Tokens that take about as long as one more call (38 to 60 on a CPU of two cores)."""


class Row(Protocol):
    """What must be known of a sequence whose prompt is being computed."""

    tokens: list[int]
    done: int
    cache: list[Any] | None
    stem: Stem | None


@dataclass(slots=True, eq=False)
class Computed:
    """Rows whose prompts are computed but for the last token, and their caches, merged."""

    rows: list[Any]
    caches: list[Any]

    @property
    def lengths(self) -> list[int]:
        """Of each row, in tokens after its stem, before any padding."""
        return [own_length(row, len(row.tokens)) for row in self.rows]

    def extend(self, other: Computed) -> None:
        """Take over the rows of `other`."""
        rows = [*self.rows, *other.rows]
        order = in_groups(rows)
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.extend(theirs)
            if order is not None:
                mine.filter(order)
        self.rows = rows if order is None else [rows[i] for i in order]


def cost(rows: Sequence[Row]) -> int:
    """Tokens that computing these ends in one call takes, each padded to the longest."""
    return len(rows) * max((left(row) for row in rows), default=0)


def left(row: Row) -> int:
    """Tokens of the prompt that are not computed yet."""
    return len(row.tokens) - row.done


def fit_together(rows: Sequence[Row], padding_max: int) -> bool:
    """Whether one call for these ends is faster than one for each.

    `padding_max` is what the rows may be apart in all, in tokens, to decode together.
    """
    lengths = [own_length(row, len(row.tokens)) for row in rows]
    return (
        _are_plain(rows)
        and cost(rows) - sum(map(left, rows)) <= CALL * (len(rows) - 1)
        and len(rows) * max(lengths) - sum(lengths) <= padding_max
    )


def _are_plain(rows: Sequence[Row]) -> bool:
    return all(is_plain(row.cache or ()) for row in rows)


def compute_ends(model: Any, rows: Sequence[Row]) -> Computed:
    """Compute what is left of the rows' prompts, which `fit_together`; takes their caches."""
    if _are_plain(rows):
        order = in_groups(rows)
        rows = rows if order is None else [rows[i] for i in order]
        caches = _compute_aligned(model, rows)
    else:
        (row,) = rows
        compute(model, row, left(row) - 1)
        caches = [layer.merge([layer]) for layer in row.cache or ()]
    for row in rows:
        row.done, row.cache = len(row.tokens), None
    return Computed(list(rows), caches)


def compute(model: Any, row: Row, count: int) -> None:
    """Put the next `count` tokens of a row into its cache."""
    if count:
        model(mx.array([row.tokens[row.done : row.done + count]]), cache=row.cache)
        mx.eval([layer.state for layer in row.cache or ()])


def _compute_aligned(model: Any, rows: Sequence[Row]) -> list[Any]:
    """All ends end together, so that the padding is where decoding wants it, on the left.

    A row with less to compute than another does the end of its cached part again, which takes
    what padding would.
    """
    width = max(left(row) for row in rows) - 1
    # Of what comes after a row's stem.
    behind = [own_length(row, len(row.tokens)) - 1 - width for row in rows]
    held, missing = [max(count, 0) for count in behind], [max(-count, 0) for count in behind]
    stems = [row.stem for row in rows]
    caches = [
        RowsCache.of(layers, held, missing, room=width + 1, stems=stems, layer=i)
        for i, layers in enumerate(zip(*(row.cache or () for row in rows), strict=True))
    ]
    if width:
        ends = [
            [0] * absent + row.tokens[len(row.tokens) - 1 - width + absent : -1]
            for row, absent in zip(rows, missing, strict=True)
        ]
        share_positions(caches)
        model(mx.array(ends), cache=caches)
        mx.eval([layer.state for layer in caches])
    return caches
