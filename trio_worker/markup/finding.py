"""Finds marks in a text that is still being written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` with which `mark` begins, all of it excepted."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def overlap_of(text: str, marks: Iterable[str]) -> int:
    """How much of the end of `text` may become one of `marks`."""
    return max((overlap(text, mark) for mark in marks), default=0)


def first_of(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """The first of `marks` in `text`, and where; none of them is empty."""
    found = [(at, mark) for mark in marks if (at := text.find(mark, start)) >= 0]
    return min(found, default=None)


def may_become(text: str, mark: str) -> bool:
    """Whether `text` is the beginning of `mark`, but not all of it."""
    return len(text) < len(mark) and mark.startswith(text)


def whole_pattern(*atoms: str) -> re.Pattern[str]:
    """Matches these atoms in a row."""
    return re.compile("".join(atoms))


def begun_pattern(*atoms: str) -> re.Pattern[str]:
    """Matches any beginning of such a text, with `fullmatch`.

    An atom is a pattern that is whole as soon as it has begun: a character, or a class that may
    be repeated.
    """
    unnamed = (re.sub(r"\(\?P<\w+>", "(?:", atom) for atom in atoms)
    return re.compile("".join(f"(?:{atom}" for atom in unnamed) + ")?" * len(atoms))


def literally(text: str) -> tuple[str, ...]:
    """The atoms of a text that stands for itself."""
    return tuple(re.escape(char) for char in text)
