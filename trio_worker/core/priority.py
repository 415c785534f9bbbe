"""Priority levels: 0 is the most urgent; `high`, `medium` and `low` name three of them."""

from __future__ import annotations

NAMES = ("high", "medium", "low")


def level_of(name: str, levels: int) -> int:
    """The level that `name` stands for when there are `levels` of them. Raises `KeyError`."""
    return {"high": 0, "medium": levels // 2, "low": levels - 1}[name]


def name_of(level: int, levels: int) -> str:
    """The name of `level` where it has one, otherwise its number: a bounded set of labels."""
    for name in NAMES:
        if level_of(name, levels) == level:
            return name
    return str(level)
