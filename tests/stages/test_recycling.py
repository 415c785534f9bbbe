"""An engine on Metal is replaced before the system's count of its buffers runs out."""

from __future__ import annotations

from unittest import mock

import pytest
import trio
from msgspec.structs import replace
from support.worker_rig import Reply, Rig, running_worker
from trio.testing import MockClock

from trio_worker.core.scheduler import Scheduler

AFTER = 1000
OPTIONS = (
    "worker.simulated.turn_ms=125",
    "worker.simulated.prefill_ms_per_token=0",
    f"worker.engine.recycle_after_tokens={AFTER}",
)


def put_on(rig: Rig, accelerator: str) -> list[int]:
    """The engine says that it computes there; returns how many tokens it had made when replaced."""
    engine = rig.engine
    engine._info = replace(engine._info, accelerator=accelerator)
    made: list[int] = []
    recycle = engine.recycle

    def noting() -> None:
        made.append(rig.observed.parts.batches.decoded)
        recycle()

    engine.recycle = noting  # type: ignore[method-assign]
    return made


async def ask(rig: Rig, max_tokens: int) -> Reply:
    return await rig.ask(prompt="x", max_tokens=max_tokens, seed=1, timeout_ms=600_000)


async def test_it_is_replaced_after_so_many_tokens_and_nobody_loses_one(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*OPTIONS, restart_s=0.5) as rig:
        made = put_on(rig, "metal")
        replies: list[Reply] = []
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(lambda: _collect(rig, replies))
        # Two rows a step, or one while the other's prompt is read: the count may pass by one.
        first, second, third = made
        assert {first, second - first, third - second} <= {AFTER, AFTER + 1}
        assert rig.engine.statistics().restarts_by_reason == {"planned": 3}
        assert replies[0].text == replies[1].text
        assert [reply.worker["resumed"] for reply in replies] == [3, 3]
        undisturbed = await ask(rig, 900)
        assert len(made) == 3, "only what the last engine has made counts"
        assert replies[0].text.startswith(undisturbed.text)


async def _collect(rig: Rig, replies: list[Reply]) -> None:
    replies.append(await ask(rig, 1520))


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
async def test_elsewhere_it_is_never_replaced(autojump_clock: MockClock, accelerator: str) -> None:
    async with running_worker(*OPTIONS) as rig:
        made = put_on(rig, accelerator)
        await ask(rig, AFTER + 100)
    assert not made


async def test_a_lost_engines_tokens_are_not_counted_for_the_next(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*OPTIONS, restart_s=0.5) as rig:
        made = put_on(rig, "metal")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, rig, 999)
            await trio.sleep(599.5 / 8)
            rig.engine.crash()
        assert rig.observed.parts.batches.decoded == 999
        await ask(rig, 599)
        assert not made
        await ask(rig, 1)
        assert made == [599 + AFTER]


async def test_nor_those_of_one_that_was_lost_while_nobody_was_aboard(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*OPTIONS, restart_s=0.5) as rig:
        made = put_on(rig, "metal")
        await ask(rig, 600)
        rig.engine.crash()
        await trio.sleep(5)
        await ask(rig, AFTER - 1)
        assert not made
        await ask(rig, 1)
        assert made == [600 + AFTER]


async def test_nor_those_of_one_that_a_fault_of_the_batch_loop_has_cost(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*OPTIONS, restart_s=0.5) as rig:
        made = put_on(rig, "metal")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, rig, 999)
            await trio.sleep(599.5 / 8)
            with mock.patch.object(Scheduler, "plan", side_effect=RuntimeError("planted")):
                await trio.sleep(0.125)
            (before,) = made
            made.clear()
        assert rig.observed.parts.batches.decoded == 999
        await ask(rig, before)
        assert not made
        await ask(rig, 1)
        assert made == [before + AFTER]


async def test_one_that_is_replaced_when_nobody_is_aboard_is_replaced_once(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*OPTIONS, restart_s=0.5) as rig:
        made = put_on(rig, "metal")
        await ask(rig, AFTER)
        await ask(rig, AFTER - 1)
        assert made == [AFTER]
