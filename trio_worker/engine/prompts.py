"""Computes prompts: parts of one by themselves, and the ends of several in one call of the model.

A row's end is what is left of its prompt, but for the last token: that one goes through the model
in the row's first decode step. Which calls are made is planned in `prefill_plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from trio_worker.engine.caches import RowsCache, is_plain, share_positions
from trio_worker.engine.prefill_plan import Prompt
from trio_worker.engine.row import Row, in_groups


@dataclass(slots=True, eq=False)
class ReadyRows:
    """Rows whose prompts are computed but for the last token, and their caches, merged."""

    rows: list[Row]
    caches: list[Any]

    @property
    def lengths(self) -> list[int]:
        """Of each row, in tokens after its stem, before any padding."""
        return [len(row.tokens) - row.stem_length for row in self.rows]

    def held(self, index: int) -> list[int]:
        """The tokens of a row that are in the caches."""
        return self.rows[index].tokens[:-1]

    def extend(self, other: ReadyRows) -> None:
        """Take over the rows of `other`; those that begin with the same stem follow each other."""
        rows = [*self.rows, *other.rows]
        order = in_groups(rows)
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.extend(theirs)
            if order is not None:
                mine.filter(order)
        self.rows = rows if order is None else [rows[i] for i in order]


def lengths_of(row: Row) -> Prompt:
    """What the plan of a turn must know of a row that has a cache."""
    return Prompt(
        request_id=row.request_id,
        length=len(row.tokens),
        done=row.done,
        stem=row.stem_length,
        is_plain=is_plain(row.cache or ()),
    )


def compute_part(model: Any, row: Row, count: int) -> None:
    """Put the next `count` tokens of a row into its cache."""
    if count:
        model(mx.array([row.tokens[row.done : row.done + count]]), cache=row.cache)
        mx.eval([layer.state for layer in row.cache or ()])
    row.done += count


def compute_ends(model: Any, rows: Sequence[Row]) -> ReadyRows:
    """Compute what is left of the rows' prompts; takes their caches.

    One row, or several whose caches are plain.
    """
    if all(is_plain(row.cache or ()) for row in rows):
        order = in_groups(rows)
        rows = rows if order is None else [rows[i] for i in order]
        caches = _compute_aligned(model, rows)
    else:
        (row,) = rows
        compute_part(model, row, row.left - 1)
        caches = [layer.merge([layer]) for layer in row.cache or ()]
    for row in rows:
        row.done, row.cache = len(row.tokens), None
    return ReadyRows(list(rows), caches)


def _compute_aligned(model: Any, rows: Sequence[Row]) -> list[Any]:
    """All ends end together, so that the padding is where decoding wants it, on the left.

    A row with less to compute than another does the end of its cached part again, which takes
    what padding would.
    """
    width = max(row.left for row in rows) - 1
    # Of what comes after a row's stem.
    behind = [len(row.tokens) - row.stem_length - 1 - width for row in rows]
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
