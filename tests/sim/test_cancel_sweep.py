"""Cancelled at whatever step, in whichever scope: every admitted request gets its last word."""

from __future__ import annotations

import pytest

from sim.checkers import outcomes_of, violations
from sim.plan import Happening
from sim.scenes import call, scene
from sim.sweep import Pick, all_requests, intake, one_request, services, sweep, whole_run
from sim.world import simulate
from trio_worker.simulated.engine import Faults

PLACES = scene(
    "worker.continuous_batching.max_batch_size=1",
    "worker.request_queue.max_depth=1",
    "worker.request_queue.reject_when_full=false",
    calls=(
        call(0.01, "running", stream=True),
        call(0.02, "queued"),
        call(0.02, "waiting", stream=True),
    ),
    disturbed=True,
)
"""One request runs, one is queued, one waits for a place."""

ENGINE_LOST = scene(
    calls=(
        call(0.01, "first", max_tokens=4, stream=True),
        call(0.01, "second", max_tokens=4),
    ),
    happenings=(Happening(at=0.05, what="crash"),),
    restart_s=0.1,
    faults=Faults(slow_tokenise=1.0, slow_tokenise_s=0.01),
    disturbed=True,
)

PREEMPTED = scene(
    "worker.continuous_batching.max_batch_size=1",
    calls=(
        call(0.01, "low", priority=2, max_tokens=4),
        call(0.05, "high", priority=0, stream=True),
    ),
    disturbed=True,
)

DRAINED = scene(
    "worker.continuous_batching.max_batch_size=1",
    calls=(
        call(0.01, "running", max_tokens=6),
        call(0.01, "queued"),
    ),
    happenings=(Happening(at=0.06, what="stop"),),
    disturbed=True,
)

THINNED = scene(
    "worker.resource_limits.check_interval_ms=100",
    calls=(
        call(0.01, "first", max_tokens=8),
        call(0.01, "second", max_tokens=8, priority=2),
    ),
    happenings=(
        Happening(at=0.08, what="memory", value=10_300),
        Happening(at=0.35, what="memory", value=100),
    ),
    disturbed=True,
)
"""Critical memory takes the running requests out of the batch, and lets them in again."""

TRIED = scene(
    calls=(
        call(0.01, "innocent", max_tokens=4, stream=True),
        call(0.01, "guilty", prompt="w1 poison", max_tokens=4),
    ),
    restart_s=0.02,
    faults=Faults(deadly_words=frozenset({"poison"})),
    disturbed=True,
)
"""Two crashes put both on trial; the third one tells."""

BROKER_CLOSED = scene(
    "worker.continuous_batching.max_batch_size=1",
    calls=(
        call(0.01, "running", max_tokens=6, stream=True, priority=0),
        call(0.02, "queued"),
    ),
    happenings=(Happening(at=0.06, what="close"),),
    disturbed=True,
)
"""The connection ends for good: nobody can be told, and everything ends all the same."""

BUDGET_SPENT = scene(
    calls=(
        call(0.01, "first", max_tokens=8, stream=True),
        call(0.01, "second", max_tokens=8),
        call(0.12, "while_down"),
    ),
    happenings=(Happening(at=0.05, what="crash"), Happening(at=0.15, what="crash")),
    restart_s=0.05,
    max_restarts=1,
    disturbed=True,
)
"""The second end of the engine is one too many: every caller is told, and the worker ends."""

CHOICES = scene(
    "worker.continuous_batching.max_batch_size=2",
    "worker.request_queue.max_depth=3",
    "worker.request_queue.reject_when_full=false",
    calls=(
        call(0.01, "three", n=3, max_tokens=4, stream=True),
        call(0.02, "two", n=2, max_tokens=3),
        call(0.02, "one", stream=True),
    ),
    happenings=(Happening(at=0.09, what="crash"),),
    restart_s=0.05,
    disturbed=True,
)
"""Two of three choices run, and one is queued; then the engine is lost."""

SCENARIOS = {
    "places": PLACES,
    "engine lost": ENGINE_LOST,
    "preempted": PREEMPTED,
    "drained": DRAINED,
    "thinned out": THINNED,
    "tried": TRIED,
    "broker closed": BROKER_CLOSED,
    "budget spent": BUDGET_SPENT,
    "choices": CHOICES,
}
SCOPES: dict[str, Pick] = {
    "first request": one_request(0),
    "second request": one_request(1),
    "intake": intake,
    "all requests": all_requests,
    "services": services,
    "whole run": whole_run,
}


@pytest.mark.parametrize(
    ("name", "outcomes", "ended"),
    [
        ("broker closed", ["WORKER_DRAINING"] * 2, "ended for good"),
        ("budget spent", ["WORKER_DRAINING"] * 3, "ended 2 times"),
    ],
)
def test_whoever_is_there_when_the_worker_fails_is_told(
    name: str, outcomes: list[str], ended: str
) -> None:
    """Without a cancelled scope: otherwise the sweep would sweep nothing of interest."""
    record = simulate(SCENARIOS[name])
    assert not violations(SCENARIOS[name], record)
    assert list(outcomes_of(record)) == outcomes
    assert ended in (record.ended or "")


STRIDE = 5
"""Usually each scope is cancelled at one step in five, another one in every scenario."""


@pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_wherever_a_scope_is_cancelled_all_promises_are_kept(
    name: str, scope: str, stride: int
) -> None:
    first = 1 + (list(SCENARIOS).index(name) + list(SCOPES).index(scope)) % stride
    steps = 0
    found = []
    for k, wrong in sweep(SCENARIOS[name], SCOPES[scope], stride=stride, first=first):
        steps += stride
        if wrong:
            found.append(f"cancelled at step {k}: {wrong[0]}")
    assert not found, "\n".join(found)
    assert 3 < steps < 500


def test_choices_left_alone_come_to_their_ends() -> None:
    """So that what is swept is the life of all of them."""
    record = simulate(CHOICES)
    assert not violations(CHOICES, record)
    assert list(outcomes_of(record)) == ["ok"] * 3
    assert record.losses == 1
    assert max(len(aboard) for _, aboard in record.turns) == 2
