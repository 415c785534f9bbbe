"""Trio with its shuffling seeded, on the mock clock: the same seed is the same schedule.

The only place that touches Trio's private names; trio/_tests/test_scheduler_determinism.py does the
same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import trio
from loguru import logger
from trio._core import _run
from trio.testing import MockClock

T = TypeVar("T")

_run_internals: Any = _run


def run_deterministic(
    main: Callable[[], Awaitable[T]],
    *,
    seed: int,
    instruments: Iterable[trio.abc.Instrument] = (),
) -> T:
    """Run `main` in virtual time, with the schedule that belongs to `seed`."""
    allowed = _run_internals._ALLOW_DETERMINISTIC_SCHEDULING
    state = _run_internals._r.getstate()
    _run_internals._ALLOW_DETERMINISTIC_SCHEDULING = True
    _run_internals._r.seed(seed)
    logger.disable("trio_worker")
    try:
        return trio.run(main, clock=MockClock(autojump_threshold=0), instruments=list(instruments))
    finally:
        logger.enable("trio_worker")
        _run_internals._ALLOW_DETERMINISTIC_SCHEDULING = allowed
        _run_internals._r.setstate(state)
