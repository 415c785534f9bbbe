"""A fleet in virtual time under loads and faults drawn from seeds: `just sim fleets=200` runs more.

At the end bugs are planted, and each has to be found by the first seeds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio
import trio.lowlevel

from sim.fleet_checkers import fleet_outcomes, fleet_violations
from sim.fleet_plan import make_fleet_plan
from sim.fleet_world import simulate_fleet
from trio_worker.core import hand_on, jobs
from trio_worker.flow.hand_on import HandOn
from trio_worker.flow.job import Job
from trio_worker.jetstream import api
from trio_worker.ports import Message
from trio_worker.stages.job import _Doing

SEEDS = 12
THOROUGH_SEEDS = 72
SEEDS_AT_ONCE = 6

Patch = AbstractContextManager[object]


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
def test_nothing_that_befalls_a_fleet_breaks_a_promise(first: int) -> None:
    failed = []
    for seed in range(first, first + SEEDS_AT_ONCE):
        plan = make_fleet_plan(seed)
        found = fleet_violations(plan, simulate_fleet(plan))
        failed += [f"just sim fleet={seed}: {each}" for each in found]
    assert not failed, "\n".join(failed)


@pytest.mark.thorough
def test_the_seeds_meet_all_that_can_befall_a_fleet() -> None:
    """Otherwise they would prove little."""
    outcomes: Counter[str] = Counter()
    for seed in range(60):
        plan = make_fleet_plan(seed)
        outcomes += fleet_outcomes(plan, simulate_fleet(plan))
    assert outcomes.keys() >= {"ok", "QUEUE_FULL", "lost", "handed on", "job answered", "job dead"}


@pytest.mark.parametrize("seed", range(6))
def test_without_trouble_every_request_and_job_is_answered(seed: int) -> None:
    plan = replace(make_fleet_plan(seed), befallings=())
    record = simulate_fleet(plan)
    assert not fleet_violations(plan, record)
    assert not record.dead
    assert "lost" not in fleet_outcomes(plan, record)


@pytest.mark.parametrize("seed", [1, 8])
def test_the_same_seed_is_the_same_fleet(seed: int) -> None:
    plan = make_fleet_plan(seed)
    said = [[str(each) for each in simulate_fleet(plan).entries] for _ in range(2)]
    assert said[0] == said[1]


# --- planted bugs -------------------------------------------------------------------------


def answers_are_stored_without_a_guard() -> Patch:
    return mock.patch.object(api, "EXPECTED_LAST", "X-Expected")


def jobs_are_acknowledged_when_they_come() -> Patch:
    run = _Doing.run

    async def eager(self: _Doing) -> None:
        self._job._say(api.ACK)
        await run(self)

    return mock.patch.object(_Doing, "run", eager)


def nobody_says_that_a_job_goes_on() -> Patch:
    return mock.patch.object(Job, "progress", return_value=None)


def a_job_is_never_given_up() -> Patch:
    async def overlook(_self: _Doing) -> None:
        await trio.lowlevel.checkpoint()

    return mock.patch.object(_Doing, "_bury", overlook)


def seeds_are_drawn_at_each_delivery() -> Patch:
    numbers = itertools.count()
    return mock.patch.object(jobs, "seed_of", side_effect=numbers)


def what_comes_back_is_dropped() -> Patch:
    returned = HandOn.returned

    def deaf(self: HandOn, status: Message) -> None:
        returned(self, status)

    return mock.patch.object(HandOn, "returned", deaf)


def what_is_passed_on_is_kept_too() -> Patch:
    pass_on = HandOn.pass_on

    def greedy(self: HandOn, *args: Any, **more: Any) -> bool:
        pass_on(self, *args, **more)
        return False

    return mock.patch.object(HandOn, "pass_on", greedy)


def full_workers_ask_nobody() -> Patch:
    return mock.patch.object(HandOn, "pass_on", return_value=False)


def nobody_looks_at_the_route() -> Patch:
    next_hop = hand_on.next_hop

    def forgetful(asking: Any, *args: Any, **more: Any) -> str | None:
        return next_hop(replace(asking, route=()), *args, **more)

    return mock.patch("trio_worker.flow.hand_on.next_hop", forgetful)


def find(seeds: int) -> str | None:
    for seed in range(seeds):
        plan = make_fleet_plan(seed)
        found = fleet_violations(plan, simulate_fleet(plan))
        if found:
            return found[0]
    return None


@pytest.mark.parametrize(
    ("plant", "seeds"),
    [
        (answers_are_stored_without_a_guard, 40),
        (jobs_are_acknowledged_when_they_come, 40),
        (nobody_says_that_a_job_goes_on, 40),
        (seeds_are_drawn_at_each_delivery, 3),
        (a_job_is_never_given_up, 40),
        (what_comes_back_is_dropped, 40),
        (what_is_passed_on_is_kept_too, 3),
        (full_workers_ask_nobody, 10),
        (nobody_looks_at_the_route, 10),
    ],
)
@pytest.mark.thorough
def test_a_bug_of_a_fleet_is_found_by_the_first_seeds(
    plant: Callable[[], Patch], seeds: int
) -> None:
    with plant():
        assert find(seeds) is not None
