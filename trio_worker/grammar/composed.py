"""One grammar for a whole answer: its reasoning, and then what was asked for, or calls of tools.

What a model thinks is not constrained, but that it comes to an end; and while it thinks, its answer
cannot end. What is a token of its own in a mark is referred to by its number, since in a grammar
such a token is no text; the rest is text, and may be cut into tokens in any way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from trio_worker.grammar.rules import quoted, slashed

ANY_TEXT = "(.|\\n)*"
GAP = "/[ \\t\\r\\n]{0,8}/"
"""Between the reasoning and what follows it; whoever takes the answer apart leaves it out."""


class Marks(Protocol):
    """What stands before and after a model's reasoning."""

    @property
    def start(self) -> str: ...

    @property
    def end(self) -> str: ...


def composed(
    *,
    answer: str = "",
    calls: str = "",
    marks: Marks | None = None,
    starts_in_reasoning: bool = False,
    parts_of: Callable[[str], Sequence[str | int]],
) -> str:
    """Lark for an answer that keeps to the rules `answer`, or to `calls`, or to either.

    Each is Lark whose first rule has that name. With `marks`, reasoning may come before it; it is
    begun already, or may begin. `parts_of` takes a mark apart into texts and tokens.
    """
    wanted = " | ".join(name for name, rules in (("answer", answer), ("calls", calls)) if rules)
    if marks is None:
        return f"start: {wanted}\n{answer}{calls}"
    reasoned, before = _reasoned(parts_of(marks.end)), "reasoned"
    if not starts_in_reasoning:
        before = f"({' '.join(map(_part, parts_of(marks.start)))} reasoned)?"
    return f"start: {before} ({wanted})\n{reasoned}gap: {GAP}\n{answer}{calls}"


def _reasoned(end: Sequence[str | int]) -> str:
    """Rules of which `reasoned` is any text to the first end mark, and the gap after it."""
    first, *others = end
    rest = " ".join([*map(_part, others), "gap"])
    if isinstance(first, int):
        return f"reasoned: /{ANY_TEXT}/ {_part(first)} {rest}\n"
    # A pattern of Lark's stands on one line. Lazy: it is over as soon as it matches.
    until = ANY_TEXT + re.escape(first).replace("\\\n", "\\n")
    return f"reasoned: reasoning {rest}\nreasoning[lazy]: {slashed(until)}\n"


def _part(part: str | int) -> str:
    return quoted(part) if isinstance(part, str) else f"<[{part}]>"
