"""Nothing grows at a gateway whose callers come, go and fail: a short run of `chaos.gateway`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chaos.gateway import ROUNDS, Sample, growth, run_soak

SECONDS = 24.0
FLAT = Sample(
    at_s=0.0,
    objects=1000,
    rss_mb=100.0,
    descriptors=10,
    tasks=5,
    subscriptions=2,
    inboxes=0,
    worker_rss_mb=50.0,
    worker_descriptors=9,
)


@pytest.mark.thorough
@pytest.mark.nats
@pytest.mark.process
async def test_nothing_grows_with_callers_that_come_and_go(tmp_path: Path) -> None:
    summary = await run_soak(tmp_path, seconds=SECONDS, seed=7)
    assert "calls: " in summary


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objects", 1021),
        ("rss_mb", 109.0),
        ("worker_rss_mb", 59.0),
        ("descriptors", 11),
        ("tasks", 6),
        ("subscriptions", 3),
        ("inboxes", 1),
        ("worker_descriptors", 10),
    ],
)
def test_what_grows_is_noticed(name: str, value: float) -> None:
    samples = [FLAT] * ROUNDS
    assert growth(samples) == []
    grew: dict[str, Any] = {name: value}
    (grown,) = growth([*samples, replace(FLAT, **grew)])
    assert grown.startswith(name)
