"""`trio-worker bench`: that it measures a worker, and that its figures are true."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
from support.commands import command
from support.worker_rig import make_config, running_worker
from trio.testing import MockClock

from trio_worker.bench import priorities
from trio_worker.bench.figures import p95, print_comparison
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.parts import PARTS
from trio_worker.bench.setup import Setup, run_parts
from trio_worker.cli.bench import PARTS_OF
from trio_worker.config import Config
from trio_worker.launch import EngineKind
from trio_worker.simulated.engine import PREFIX_CACHE_TOKENS


def test_the_command_line_knows_every_part() -> None:
    assert tuple(PARTS) == tuple(itertools.chain.from_iterable(PARTS_OF.values()))


@pytest.mark.nats
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
    # One each, and of forms what those beside them pay as well.
    assert len(figures) == len(PARTS_OF["engine"]) + 1
    for words, required in (
        ("together against one at a time", "4.0 required"),
        ("mlx-lm's own loop", "not with a simulated engine"),
        ("without and with reuse", "4.0 required"),
        ("half of the requests seeded", "0.95 required"),
        ("a newcomer with a long prompt", "200 wanted"),
        ("sampling of its own", "ratio"),
        ("every request held to a schema", "0.85 required"),
        ("half of the requests held to a schema", "0.9 required"),
    ):
        (figure,) = (line for line in figures if words in line)
        assert required in figure


@pytest.mark.process
def test_when_nobody_reads_on_it_ends_quietly() -> None:
    """As in `trio-worker bench overhead | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-m", "trio_worker", "bench", "overhead"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


# --- the figures, in virtual time -----------------------------------------------------------


@asynccontextmanager
async def open_virtual_worker(
    config: Config, _engine: EngineKind, _program: Sequence[str]
) -> AsyncIterator[MeasuredWorker]:
    """No server, no process, and no clock but the test's."""
    worker = config.worker
    reuse = PREFIX_CACHE_TOKENS if worker.engine.prefix_cache_mb else 0
    async with running_worker(
        f"worker.request_queue.priority_levels={worker.request_queue.priority_levels}",
        f"worker.request_queue.max_depth={worker.request_queue.max_depth}",
        f"worker.continuous_batching.max_batch_size={worker.continuous_batching.max_batch_size}",
        f"worker.simulated.turn_ms={worker.simulated.turn_ms}",
        f"worker.simulated.prefill_ms_per_token={worker.simulated.prefill_ms_per_token}",
        engine_options={"prefix_cache_tokens": reuse},
    ) as rig:
        yield MeasuredWorker(rig.client, "w1", rig.observed, nats_url="nats://nowhere")


async def figures(part: str, capsys: pytest.CaptureFixture[str], *changes: str) -> list[str]:
    """What this part prints of an engine whose every turn takes 20 ms."""
    config = make_config(
        "worker.simulated.turn_ms=20", "worker.simulated.prefill_ms_per_token=0", *changes
    )
    setup = Setup(
        config=config,
        engine="simulated",
        max_tokens=16,
        rounds=2,
        open_worker=open_virtual_worker,
    )
    await run_parts(setup, [PARTS[part]])
    return capsys.readouterr().out.splitlines()


async def test_eight_together_are_seven_times_as_fast_as_one_by_one(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """One by one 50 tokens a second; together 128 in 16 turns and up to two to begin with."""
    line, device = await figures("batching", capsys)
    pattern = (
        r"8 requests together against one at a time, tokens/s: (\S+) to 50\.0, "
        r"ratio (\S+) \(.*\); 4\.0 required"
    )
    found = re.fullmatch(pattern, line)
    assert found is not None
    assert 128 / (18 * 0.02) <= float(found[1]) + 0.05 <= 128 / (16 * 0.02) + 0.1
    assert float(found[2]) == pytest.approx(float(found[1]) / 50, abs=0.01)
    assert device == "  on simulated; the largest batch had 8 requests"


@pytest.mark.parametrize("part", ["seeds", "mixing"])
async def test_sampling_costs_nothing_where_it_takes_no_time(
    part: str,
    autojump_clock: MockClock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = await figures(part, capsys)
    found = re.search(r": (\S+) to (\S+), ratio", line)
    assert found is not None
    for rate in found.groups():
        assert 128 / (18 * 0.02) <= float(rate) + 0.05 <= 128 / (16 * 0.02) + 0.1


async def test_a_newcomers_prompt_takes_what_the_target_leaves_of_each_turn(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """4000 tokens of 1 ms, at most 180 of them beside a step of 20 ms: 23 turns."""
    *_, line = await figures("newcomer", capsys, "worker.simulated.prefill_ms_per_token=1")
    assert line.startswith(
        "gaps beside a newcomer with a long prompt: median 200 ms, p95 200 ms, largest"
    )
    rounds = await figures("newcomer", capsys)
    assert "median, p95 and largest, 20, 20 and 20 ms; 20, 20 and 20 ms while" in rounds[0]
    assert rounds[-1].endswith("median 20 ms, p95 20 ms, largest 20 ms; 200 wanted")


async def test_a_preemption_costs_what_has_to_be_computed_again(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what is kept the last token; otherwise the prompt's 11 and the 40 that were there."""
    beyond = "beyond both requests alone (2 rounds)"
    assert await figures("preemption", capsys, "worker.simulated.prefill_ms_per_token=1") == [
        f"a preemption after 40 tokens, cache kept: 1 ms {beyond}",
        f"a preemption after 40 tokens, cache computed again: 51 ms {beyond}",
    ]


async def test_the_urgent_wait_for_the_turn_under_way_and_their_own(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(priorities, "HIGH_REQUESTS", 5)
    *_, line = await figures("priority", capsys)
    assert line.startswith("time to first token of HIGH, median: 40 ms (2.0 turns; required")


async def test_a_figure_is_the_median_of_the_rounds_which_take_turns_in_going_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    values = {"one1": 8.0, "one2": 9.0, "one3": 20.0, "other1": 2.0, "other2": 3.0, "other3": 5.0}

    async def measure(name: str, number: int) -> float:
        asked.append(f"{name}{number}")
        return values[asked[-1]]

    one, other = partial(measure, "one"), partial(measure, "other")
    await print_comparison("title", one, other, rounds=3, required="4.0")
    await print_comparison("title", one, other, rounds=1, required=None)
    assert asked[:6] == ["one1", "other1", "other2", "one2", "one3", "other3"]
    assert capsys.readouterr().out.splitlines() == [
        "title: 9.0 to 3.0, ratio 4.00 (3.00 to 4.00); 4.0 required",
        "title: 8.0 to 2.0, ratio 4.00 (4.00 to 4.00)",
    ]


def test_the_95th_percentile_is_one_of_the_values() -> None:
    assert p95([float(value) for value in range(100)]) == 94
    assert p95([3.0, 1.0]) == 1
    assert p95([7.0]) == 7
