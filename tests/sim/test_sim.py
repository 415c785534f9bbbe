"""The worker in virtual time under loads and faults drawn from seeds: `just sim` runs more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import trio
from support.paths import TESTS
from support.worker_rig import running_worker
from trio.testing import MockClock

from sim.checkers import outcomes_of, violations
from sim.plan import Happening, make_plan, without_trouble
from sim.scenes import call, scene
from sim.world import simulate
from trio_worker.errors import ErrorCode
from trio_worker.ports import Message
from trio_worker.stages.intake import SUBSCRIPTION_DRAIN_S

SEEDS = 30
THOROUGH_SEEDS = 300
SEEDS_AT_ONCE = 10


@pytest.mark.parametrize(
    "first",
    [
        *range(0, SEEDS, SEEDS_AT_ONCE),
        *(
            pytest.param(first, marks=pytest.mark.thorough)
            for first in range(SEEDS, THOROUGH_SEEDS, SEEDS_AT_ONCE)
        ),
    ],
)
def test_no_schedule_of_faults_cancels_and_stops_breaks_a_promise(first: int) -> None:
    failed = []
    for seed in range(first, first + SEEDS_AT_ONCE):
        plan = make_plan(seed)
        failed += [f"just sim seed={seed}: {each}" for each in violations(plan, simulate(plan))]
    assert not failed, "\n".join(failed)


@pytest.mark.thorough
def test_the_seeds_meet_every_outcome_and_every_kind_of_trouble() -> None:
    """Otherwise they would prove little."""
    outcomes: set[str] = set()
    preempted = lost = resumed = cut_short = 0
    for seed in range(70):
        record = simulate(make_plan(seed))
        outcomes.update(outcomes_of(record))
        preempted += record.preemptions
        lost += record.losses
        resumed += sum(each.sequence.resumed for each in record.admitted)
        cut_short += len(record.stops_at) > 1
    assert outcomes == {"ok", *ErrorCode} - {ErrorCode.INTERNAL}
    assert min(preempted, lost, resumed) > 3
    assert cut_short


@pytest.mark.parametrize("seed", [3, 17, 42])
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    digests = {simulate(make_plan(seed)).digest() for _ in range(5)}
    assert len(digests) == 1


@pytest.mark.process
def test_the_same_seed_is_the_same_run_in_another_process() -> None:
    """Sets and dictionaries of strings are in another order there."""
    said = [
        subprocess.run(
            [sys.executable, "-m", "sim", "digests=10"],
            cwd=TESTS,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout.split()
        for hash_seed in ("1", "2", "random")
    ]
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) == 10


@pytest.mark.parametrize("seed", range(5))
def test_another_schedule_of_the_same_load_keeps_the_promises_too(seed: int) -> None:
    plan = make_plan(seed)
    for schedule in range(1000, 1004):
        assert not violations(plan, simulate(plan, schedule=schedule))


@pytest.mark.parametrize("seed", range(10))
def test_without_trouble_nothing_is_lost_late_or_failed(seed: int) -> None:
    plan = without_trouble(make_plan(seed))
    record = simulate(plan)
    assert not violations(plan, record)
    assert record.losses == 0
    assert ErrorCode.INTERNAL not in outcomes_of(record)


# --- what the seeds have found ------------------------------------------------------------


def test_a_worker_whose_connection_is_gone_stops_all_the_same() -> None:
    plan = scene(
        "worker.continuous_batching.max_batch_size=1",
        "worker.request_queue.max_depth=4",
        "worker.drain_timeout_ms=1000",
        calls=tuple(call(0.01, f"r{number}", max_tokens=10) for number in range(4)),
        happenings=(Happening(at=0.1, what="disconnect"),),
        drain_timeout_s=1.0,
    )
    record = simulate(plan)
    assert not violations(plan, record)
    assert list(outcomes_of(record)) == ["ok"] * 4
    assert record.ended_at is not None
    # Idle by then: neither the drain nor the close waits for a connection that is not there.
    assert record.ended_at - record.stops_at[0] < SUBSCRIPTION_DRAIN_S


def test_requests_that_gave_their_slot_away_at_every_level_fit_into_the_queue() -> None:
    plan = scene(
        "worker.continuous_batching.max_batch_size=1",
        "worker.request_queue.max_depth=1",
        calls=(
            call(0.01, "low", priority=2, max_tokens=50),
            call(0.10, "medium", priority=1, max_tokens=50),
            call(0.20, "high", priority=0, max_tokens=50),
            call(0.30, "later", priority=2, max_tokens=1),
        ),
    )
    assert not violations(plan, simulate(plan))


@pytest.mark.parametrize("way", ["control", "broadcast"])
def test_a_cancel_that_follows_its_request_at_once_ends_it(way: str) -> None:
    plan = scene(calls=(call(0.01, "regretted", max_tokens=50, cancel=way),))
    assert list(outcomes_of(simulate(plan))) == ["CANCELLED"]


async def test_a_ping_cannot_aim_the_worker_at_any_subject(autojump_clock: MockClock) -> None:
    seen: list[Message] = []
    async with running_worker() as rig:
        await rig.caller.subscribe("orders.new", seen.append)
        rig.caller.publish(Message(subject="worker.w1.ping", reply="orders.new"))
        await trio.sleep(1)
    assert not seen
