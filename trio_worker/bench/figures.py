"""Figures: what is computed from several rounds, and how it is printed."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

Measurement: TypeAlias = Callable[[int], Awaitable[float]]
"""Of the round with this number."""


async def print_comparison(
    title: str, one: Measurement, other: Measurement, *, rounds: int, required: str | None
) -> None:
    """Print the median of the ratios of `one` to `other`, which take turns in going first."""
    pairs: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        if number % 2:
            first = await one(number)
            pairs.append((first, await other(number)))
        else:
            second = await other(number)
            pairs.append((await one(number), second))
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    say(
        f"{title}: {medians[0]:.1f} to {medians[1]:.1f}, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        + (f"; {required} required" if required else "")
    )


def p95(values: Sequence[float]) -> float:
    """The 95th percentile: one of the values."""
    return sorted(values)[int(0.95 * (len(values) - 1))]


def p99(values: Sequence[float]) -> float:
    """The 99th percentile: one of the values."""
    return sorted(values)[int(0.99 * (len(values) - 1))]


def ms(seconds: float) -> int:
    """Whole milliseconds."""
    return round(1000 * seconds)


def say(line: str) -> None:
    """A line on standard output, at once. Raises `BrokenPipeError` when nobody reads on."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
