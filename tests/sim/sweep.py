"""Cancel one scope of the nursery tree at every step that the worker takes in it.

What a step finds it writes down; the judgement comes after the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import trio

from .checkers import violations
from .plan import Plan
from .world import World, simulate

Pick: TypeAlias = Callable[["CancelAt"], trio.CancelScope | None]
"""The scope to cancel, or None while there is none."""

STEPS_MOST = 2000


class CancelAt(trio.abc.Instrument):
    """Counts the steps of the worker's tasks while there is a scope; cancels it at the k-th."""

    def __init__(self, world: World, pick: Pick, k: int) -> None:
        self.world = world
        self.fired = False
        self.tasks: dict[str, trio.lowlevel.Task] = {}
        """The latest of each name."""
        self._pick = pick
        self._left = k
        self._family: set[trio.lowlevel.Task] = set()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        parent = nursery.parent_task if nursery is not None else None
        if parent is not None and (parent is self.world.root or parent in self._family):
            self._family.add(task)
            self.tasks[task.name.rpartition(".")[2]] = task

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._family.discard(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.fired or (task is not self.world.root and task not in self._family):
            return
        scope = self._pick(self)
        if scope is None:
            return
        self._left -= 1
        if self._left <= 0:
            self.fired = True
            self.world.record.log("SWEEP", "cancelled")
            scope.cancel()


def one_request(number: int) -> Pick:
    def pick(sweep: CancelAt) -> trio.CancelScope | None:
        admitted = sweep.world.record.admitted
        if len(admitted) <= number or admitted[number].ended_at is not None:
            return None
        scope = admitted[number].sequence.scope
        assert isinstance(scope, trio.CancelScope)
        return scope

    return pick


def intake(sweep: CancelAt) -> trio.CancelScope | None:
    task = sweep.tasks.get("intake")
    # Before it has reported that it has started, only its starter could end it.
    if task is None or not task.child_nurseries or not sweep.world.record.is_ready:
        return None
    return task.child_nurseries[0].cancel_scope


def all_requests(sweep: CancelAt) -> trio.CancelScope | None:
    return _nursery_of(sweep.tasks.get("respond"))


def services(sweep: CancelAt) -> trio.CancelScope | None:
    return _nursery_of(sweep.tasks.get("batcher"))


def whole_run(sweep: CancelAt) -> trio.CancelScope | None:
    return sweep.world.scope if not sweep.world.finished.is_set() else None


def _nursery_of(task: trio.lowlevel.Task | None) -> trio.CancelScope | None:
    nursery = task.parent_nursery if task is not None else None
    return nursery.cancel_scope if nursery is not None else None


def sweep(
    plan: Plan, pick: Pick, *, stride: int = 1, first: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """For each step of the scope: its number, and what was wrong after cancelling there."""
    for k in range(first, STEPS_MOST, stride):
        made: list[CancelAt] = []

        def instruments(world: World, k: int = k, made: list[CancelAt] = made) -> list[CancelAt]:
            made.append(CancelAt(world, pick, k))
            return made

        record = simulate(plan, instruments=instruments)
        if not made[0].fired:
            return
        yield k, violations(plan, record)
    raise AssertionError("more steps than a scenario should have")
