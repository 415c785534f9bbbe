"""What padding rows to the longest costs, and which rows are computed together for it.

Rows of one batch are padded to the longest of them, in memory and in the attention of every step;
rows that are computed apart read the model's weights once more. All of it is decided by lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar


class Batched(Protocol):
    """Rows that have their caches in common."""

    @property
    def lengths(self) -> list[int]:
        """Of each row, in tokens that may need padding."""

    def extend(self, other: Any) -> None:
        """Take over the rows of `other`."""


_Batched = TypeVar("_Batched", bound=Batched)


def padding(lengths: Sequence[int]) -> int:
    """How many tokens of padding it takes to make all of them as long as the longest."""
    return len(lengths) * max(lengths, default=0) - sum(lengths)


def padding_max(weights_bytes: int, bytes_per_token: int) -> int:
    """Tokens of padding that a decode step may compute rather than read the weights again.

    Attention reads its cache as a step reads the weights; half of their size is where two batches
    become faster than one on a CPU (0.4), and what padding may take of the memory.
    """
    return weights_bytes // 2 // max(bytes_per_token, 1)


def merge_alike(batches: Iterable[_Batched], padding_max: int) -> list[_Batched]:
    """As few as `padding_max` allows: each costs a reading of the weights at every step.

    Padding the rows of one to its longest takes at most that many tokens. What has been put
    together stays together, since rows grow at the same pace.
    """
    merged: list[_Batched] = []
    for batch in sorted(batches, key=lambda each: max(each.lengths)):
        if merged and padding([*merged[-1].lengths, *batch.lengths]) <= padding_max:
            merged[-1].extend(batch)
        else:
            merged.append(batch)
    return merged
