"""How much of what rows begin with is worth holding apart from them, as a stem.

In tokens, and decided by lengths alone; `shared_prefixes.py` has the stems.
"""

from __future__ import annotations

STEP = 32
"""Lengths are multiples of it, so that rows whose prompts differ a little later share one."""
SHORTEST = 256
"""Of a stem that others may come to share."""
ALONE = 1024
"""Of one that nobody shares: below, another set of products at every step takes longer than
padding does."""


def stem_length(done: int) -> int:
    """Of the stem of a row that has computed `done` tokens; 0 if they are too few."""
    length = done // STEP * STEP
    return length if length >= SHORTEST else 0


def lengthened(length: int, done: int) -> int:
    """Of the stem that a row which has `done` tokens, and a stem of `length`, had better have.

    A longer one if many were computed since: what comes after a stem is copied, and padded to.
    """
    return length if done - length < ALONE else stem_length(done)
