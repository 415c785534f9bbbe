"""Levels, and the names that some of them have."""

from __future__ import annotations

import pytest

from trio_worker.core.priority import level_of, name_of


def test_names_of_levels() -> None:
    assert [level_of(name, 3) for name in ("high", "medium", "low")] == [0, 1, 2]
    assert [name_of(level, 5) for level in range(5)] == ["high", "1", "medium", "3", "low"]
    assert name_of(0, 1) == "high"


@pytest.mark.parametrize(
    ("levels", "names"),
    [
        (1, ["high"]),
        (2, ["high", "medium"]),
        (3, ["high", "medium", "low"]),
        (4, ["high", "1", "medium", "low"]),
        (5, ["high", "1", "medium", "3", "low"]),
    ],
)
def test_the_levels_that_have_names(levels: int, names: list[str]) -> None:
    assert [name_of(level, levels) for level in range(levels)] == names
    assert (level_of("high", levels), level_of("low", levels)) == (0, levels - 1)
    with pytest.raises(KeyError):
        level_of("urgent", levels)
