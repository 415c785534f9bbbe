"""Priority levels: 0 is the most urgent; `high`, `medium` and `low` name three of them."""

from __future__ import annotations

NAMES = ("high", "medium", "low")


HELD_MOST_S = 10.0
"""Where levels do not age, the longest that pressure of memory holds the least urgent back."""


def held_most_s(levels: int, aging_s: float | None) -> float:
    """How long after its arrival pressure of memory may hold a request of the lowest level back.

    A held request ages like any other: once it has waited for what all levels are worth, it is
    as urgent as a request of the highest that comes just then. 0 with fewer than three levels:
    of two the lower is the usual one.
    """
    if levels < len(NAMES):
        return 0.0
    return HELD_MOST_S if aging_s is None else (levels - 1) * aging_s


def level_of(name: str, levels: int) -> int:
    """The level that `name` stands for when there are `levels` of them. Raises `KeyError`."""
    return {"high": 0, "medium": levels // 2, "low": levels - 1}[name]


def name_of(level: int, levels: int) -> str:
    """The name of `level` where it has one, otherwise its number: a bounded set of labels."""
    for name in NAMES:
        if level_of(name, levels) == level:
            return name
    return str(level)
