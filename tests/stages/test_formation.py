"""How long a batch takes to form: from its first request or the free slot to the turn it is in."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from support.metric_values import histogram_of
from support.worker_rig import Rig, running_worker, subject_of
from trio.testing import MockClock

from trio_worker.monitoring.metrics import INTER_TOKEN
from trio_worker.ports import Message
from trio_worker.simulated.engine import Faults

ONE_SLOT = "worker.continuous_batching.max_batch_size=1"
LONG_TURNS = "worker.simulated.turn_ms=100"
FREE_PREFILL = "worker.simulated.prefill_ms_per_token=0"
MB = 2**20


async def ask(rig: Rig, request_id: str, **fields: object) -> None:
    await rig.ask(prompt="x", request_id=request_id, timeout_ms=600_000, **fields)


def last_ms(rig: Rig) -> float:
    return rig.snapshot().batch.last_formation_ms


async def test_an_idle_engine_takes_a_request_at_once(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        for _ in range(3):
            await ask(rig, "one", max_tokens=3)
            assert last_ms(rig) == 0
            await trio.sleep(100)


async def test_waiting_for_company_counts_from_the_first_of_the_batch(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        "worker.continuous_batching.min_batch_size=3",
        "worker.continuous_batching.batch_timeout_ms=500",
        "worker.continuous_batching.adaptive_timeout=false",
    ) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(rig, "first", max_tokens=3, priority="low"))
            await trio.sleep(0.2)
            nursery.start_soon(lambda: ask(rig, "urgent", max_tokens=3, priority="high"))
        assert last_ms(rig) == pytest.approx(500)


async def test_waiting_ends_when_two_gaps_have_brought_nobody(autojump_clock: MockClock) -> None:
    async with running_worker(
        "worker.continuous_batching.min_batch_size=3",
        "worker.continuous_batching.batch_timeout_ms=2000",
    ) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(partial(ask, rig, f"{number}", max_tokens=1))
                await trio.sleep(0.3)
        assert rig.snapshot().batch.by_trigger == {"size": 1}
        await ask(rig, "lonely", max_tokens=1)
        gap_s = rig.observed.parts.admission.arrivals.mean_gap_s
        assert gap_s is not None
        assert rig.snapshot().batch.by_trigger == {"size": 1, "single": 1}
        assert last_ms(rig) == pytest.approx(2000 * gap_s)
        assert 500 < last_ms(rig) < 1500


async def test_who_gives_up_while_a_batch_forms_leaves_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        "worker.continuous_batching.min_batch_size=3",
        "worker.continuous_batching.batch_timeout_ms=2000",
        "worker.continuous_batching.adaptive_timeout=false",
    ) as rig:
        gone = await rig.ask(prompt="x", max_tokens=1, timeout_ms=500)
        assert gone.code == "REQUEST_TIMEOUT"
        await trio.sleep(100)
        assert rig.snapshot().batch.by_trigger == {}
        await ask(rig, "next", max_tokens=1)
        assert last_ms(rig) == pytest.approx(2000)


async def test_a_wait_behind_a_full_batch_is_no_formation(autojump_clock: MockClock) -> None:
    """The slot comes free at the end of a turn, and the next turn has the next request."""
    async with running_worker(ONE_SLOT) as rig:
        async with trio.open_nursery() as nursery:
            for name in ("first", "second", "third"):
                nursery.start_soon(partial(ask, rig, name, max_tokens=200))
        assert last_ms(rig) == 0
        assert rig.snapshot().requests.queue_wait_ms.p95 == pytest.approx(8040, abs=50)


async def test_a_slot_that_comes_free_within_a_turn_waits_for_the_next(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(ONE_SLOT, LONG_TURNS, FREE_PREFILL) as rig:
        async with trio.open_nursery() as nursery:
            began_at = trio.current_time()
            nursery.start_soon(lambda: ask(rig, "long", max_tokens=4000))
            await trio.sleep(0.01)
            nursery.start_soon(lambda: ask(rig, "next", max_tokens=3))
            await trio.sleep_until(began_at + 2.03)
            assert rig.snapshot().batch.running == 1
            rig.caller.publish(Message(subject=subject_of("long"), body=b"cancel"))
            await trio.sleep(0.5)
            assert 50 < last_ms(rig) < 100
            nursery.cancel_scope.cancel()


async def test_who_comes_while_there_is_room_waits_for_the_next_turn(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(LONG_TURNS, FREE_PREFILL) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(rig, "long", max_tokens=50))
            await trio.sleep(1.03)
            await ask(rig, "joins", max_tokens=1)
            assert 50 < last_ms(rig) < 100
            assert rig.snapshot().batch.by_trigger == {"size": 1, "running": 1}
            nursery.cancel_scope.cancel()


async def test_two_tokens_of_one_turn_have_no_time_between_them(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(faults=Faults(duplicate_output=1.0)) as rig:
        await ask(rig, "one", max_tokens=5)
        gaps = histogram_of(rig.observed, INTER_TOKEN)
        # Four tokens are handed out twice, the last one once: nine, and four turns between them.
        assert sum(gaps.counts[()]) == 8
        assert gaps.sums[()] == pytest.approx(4 * 0.02)


async def test_a_preempted_request_that_comes_back_forms_a_batch_anew(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(ONE_SLOT) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(rig, "low", max_tokens=100, priority="low"))
            await trio.sleep(1)
            await ask(rig, "high", max_tokens=20, priority="high")
        assert rig.snapshot().batch.preemptions == 1
        assert last_ms(rig) == 0


async def test_the_time_without_memory_is_no_formation(autojump_clock: MockClock) -> None:
    async with running_worker("worker.resource_limits.check_interval_ms=50") as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(rig, "first", max_tokens=50))
            await trio.sleep(0.1)
            rig.probe.used = 20_000 * MB
            await trio.sleep(5)
            rig.probe.used = 100 * MB
        assert rig.snapshot().batch.preemptions == 1
        assert last_ms(rig) == 0
