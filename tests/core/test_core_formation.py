"""How long an idle engine waits for company."""

from __future__ import annotations

import pytest

from trio_worker.core.formation import Formation, Trigger, Wait


@pytest.mark.parametrize(
    ("waiting", "now", "gap", "adaptive", "expected"),
    [
        (4, 0.0, None, True, Trigger.SIZE),
        (1, 1.0, None, True, Trigger.TIMEOUT),
        (1, 0.0, None, True, Wait(until=1.0, trigger=Trigger.TIMEOUT)),
        (1, 0.0, 5.0, True, Trigger.SINGLE),
        (1, 0.0, 5.0, False, Wait(until=1.0, trigger=Trigger.TIMEOUT)),
        (1, 0.0, 0.1, True, Wait(until=0.2, trigger=Trigger.SINGLE)),
        (1, 0.9, 0.1, True, Wait(until=1.0, trigger=Trigger.TIMEOUT)),
    ],
)
def test_how_long_an_idle_engine_waits(
    *, waiting: int, now: float, gap: float | None, adaptive: bool, expected: Trigger | Wait
) -> None:
    formation = Formation(min_batch_size=4, timeout_s=1.0, adaptive=adaptive)
    assert formation.decide(now=now, waiting=waiting, first_at=0.0, mean_gap_s=gap) == expected
