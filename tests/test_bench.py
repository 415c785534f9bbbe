"""`trio-worker bench`: that it measures and says what is wanted; how fast is no test's matter."""

from __future__ import annotations

import pytest
from commands import command

from trio_worker.__main__ import BENCH_PARTS
from trio_worker.bench import PARTS
from trio_worker.bench_scheduling import PARTS as SCHEDULING

pytestmark = pytest.mark.nats


def test_the_command_line_knows_every_part() -> None:
    assert tuple(PARTS) == BENCH_PARTS["engine"]
    assert tuple(SCHEDULING) == BENCH_PARTS["scheduling"]


async def test_every_part_measures_a_whole_worker() -> None:
    """On the simulated engine, where mlx-lm has nothing to be compared with."""
    outcome = await command(
        *("bench", "engine", "--engine", "simulated", "--rounds", "1", "--max-tokens", "2"),
        *(
            "--set",
            "worker.simulated.turn_ms=1",
            "--set",
            "worker.simulated.prefill_ms_per_token=0",
        ),
    )
    assert outcome.returncode == 0, outcome.stderr
    lines = outcome.stdout.decode().splitlines()
    figures = [line for line in lines if not line.startswith(" ")]
    assert len(figures) == len(PARTS)
    for words, required in (
        ("together against one at a time", "4.0 required"),
        ("mlx-lm's own loop", "not with a simulated engine"),
        ("without and with reuse", "4.0 required"),
        ("half of the requests seeded", "0.95 required"),
        ("a newcomer with a long prompt", "200 wanted"),
        ("sampling of its own", "ratio"),
    ):
        (figure,) = (line for line in figures if words in line)
        assert required in figure
