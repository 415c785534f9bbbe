"""Priorities at work in the batch, and memory under pressure, in the whole worker."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import trio
from support.worker_rig import Reply, Rig, running_worker
from trio.testing import MockClock

from trio_worker.core.memory import DegradationStep, MemoryReading
from trio_worker.flow.door import DoorState
from trio_worker.ports import Turn
from trio_worker.protocol.turn import EngineMemory, Work
from trio_worker.simulated.engine import Faults
from trio_worker.simulated.speech import word

MB = 2**20
SOFT_MB, CRITICAL_MB = 1000, 2000
LIMITS = (
    f"worker.resource_limits.max_memory_mb={SOFT_MB}",
    f"worker.resource_limits.critical_memory_mb={CRITICAL_MB}",
    "worker.resource_limits.check_interval_ms=50",
)


def set_memory(rig: Rig, share: float) -> None:
    """Usage at this share of the band between the limits."""
    rig.probe.used = int((SOFT_MB + share * (CRITICAL_MB - SOFT_MB)) * MB)


async def test_an_urgent_request_takes_the_slot_of_the_least_urgent_and_gives_it_back(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=2") as rig:
        undisturbed = await rig.ask(prompt="low", max_tokens=100, seed=1)
        replies: dict[str, Reply] = {}

        async def ask(name: str, **fields: object) -> None:
            replies[name] = await rig.ask(prompt="low", seed=1, **fields)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask("first", max_tokens=100, priority="low"))
            await trio.sleep(0.1)
            nursery.start_soon(lambda: ask("second", max_tokens=100, priority="low"))
            await trio.sleep(0.5)
            began = trio.current_time()
            urgent = await rig.ask(prompt="now", max_tokens=5, priority="high", stream=True)
            assert urgent.times[1] - began < 4 * 0.02, "first token within a few turns"
            assert rig.snapshot().batch.preemptions == 1
    assert replies["first"].text == replies["second"].text == undisturbed.text
    assert replies["first"].worker["resumed"] == 0


async def test_nobody_gives_its_slot_away_more_than_twice(autojump_clock: MockClock) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=1") as rig:
        replies: list[Reply] = []

        async def low() -> None:
            replies.append(await rig.ask(prompt="low", max_tokens=50, priority="low"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(low)
            for _ in range(5):
                await trio.sleep(0.3)
                assert (await rig.ask(prompt="x", max_tokens=2, priority="high")).code == "ok"
        assert rig.snapshot().batch.preemptions == 2
    assert replies[0].code == "ok"


async def test_a_deadline_beyond_the_measured_rate_is_refused_at_once(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.continuous_batching.preempt=false"
    ) as rig:
        for _ in range(8):
            await rig.ask(prompt="x", max_tokens=50)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=50))
            await trio.sleep(0.1)
            began = trio.current_time()
            hasty = await rig.ask(prompt="x", max_tokens=50, timeout_ms=3000)
            assert trio.current_time() - began < 0.1
            assert hasty.error is not None
            assert hasty.error.details["stage"] == "admission"
            assert hasty.error.details["estimate_ms"] == pytest.approx(6 * 1020, rel=0.05)
            assert hasty.error.retryable


async def test_under_pressure_the_least_urgent_wait_and_are_served_afterwards(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS) as rig:
        set_memory(rig, 0.3)
        await trio.sleep(0.1)
        assert rig.snapshot().resources.steps == ["trim_caches", "hold_low"]
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def low() -> None:
                replies.append(await rig.ask(prompt="low", max_tokens=2, priority="low"))

            nursery.start_soon(low)
            await trio.sleep(1)
            assert (await rig.ask(prompt="x", max_tokens=2, priority="medium")).code == "ok"
            assert not replies
            assert rig.observed.readiness().ok, "soft pressure stays ready"
            set_memory(rig, -0.5)
        assert replies[0].code == "ok"
        assert rig.snapshot().resources.steps == []
        assert rig.snapshot().resources.degradations == {"trim_caches": 1, "hold_low": 1}


async def test_under_more_pressure_the_batch_shrinks_and_answers_are_capped(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS, "worker.resource_limits.degraded_max_tokens=10") as rig:
        async with trio.open_nursery() as nursery:
            running: list[Reply] = []

            async def early() -> None:
                running.append(await rig.ask(prompt="x", max_tokens=100))

            nursery.start_soon(early)
            await trio.sleep(0.5)
            set_memory(rig, 0.8)
            await trio.sleep(0.1)
            late: list[Reply] = []

            async def ask() -> None:
                late.append(await rig.ask(prompt="y", max_tokens=100))

            async with trio.open_nursery() as inner:
                for _ in range(8):
                    inner.start_soon(ask)
                await trio.sleep(0.1)
                assert rig.snapshot().batch.running == 4
    assert running[0].usage["completion_tokens"] == 100, "who runs keeps its tokens"
    assert running[0].worker["degraded"] == []
    assert {reply.usage["completion_tokens"] for reply in late} == {10}
    assert all(reply.worker["degraded"] == ["cap_tokens"] for reply in late)


async def test_over_the_hard_limit_the_running_are_thinned_out_and_finish_later(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS) as rig:
        undisturbed = await rig.ask(prompt="x", max_tokens=100, seed=3)
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def ask() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=100, seed=3))

            for _ in range(3):
                nursery.start_soon(ask)
            await trio.sleep(0.5)
            set_memory(rig, 1.1)
            await trio.sleep(0.12)
            assert 1 <= rig.snapshot().batch.preemptions <= 3
            assert (await rig.ask(prompt="y", max_tokens=1)).code == "RESOURCE_LIMIT_EXCEEDED"
            await trio.sleep(0.3)
            assert rig.snapshot().batch.running == 0
            set_memory(rig, 0.5)
            await trio.sleep(0.3)
            assert rig.snapshot().batch.running == 0, "resumes below the soft limit only"
            set_memory(rig, -0.1)
    assert [reply.text for reply in replies] == [undisturbed.text] * 3


async def test_a_request_that_could_never_fit_is_told_so_with_the_numbers(
    autojump_clock: MockClock,
) -> None:
    options = (*LIMITS, "worker.requests.max_tokens_limit=1000000")
    async with running_worker(*options, context_length=10_000_000) as rig:
        refused = await rig.ask(prompt="x y", max_tokens=500_000)
        assert (await rig.ask(prompt="x y", max_tokens=5)).code == "ok"
    assert refused.code == "RESOURCE_LIMIT_EXCEEDED"
    assert refused.error is not None
    assert not refused.error.retryable
    assert refused.error.details == {
        "need_mb": 1954.0,
        "room_mb": 1900.0,
        "prompt_tokens": 2,
        "max_tokens": 500_000,
    }


async def test_nobody_passes_a_head_of_the_queue_that_does_not_fit_yet(
    autojump_clock: MockClock,
) -> None:
    options = (*LIMITS, "worker.requests.max_tokens_limit=1000000")
    async with running_worker(*options, context_length=10_000_000) as rig:
        order: list[str] = []

        async def ask(name: str, max_tokens: int, **fields: object) -> None:
            await rig.ask(prompt=name, max_tokens=max_tokens, stop=word(0)[:1], **fields)
            order.append(name)

        async with trio.open_nursery() as nursery:
            for name, size in [("large", 300_000), ("larger", 400_000), ("small", 1)]:
                nursery.start_soon(ask, name, size)
                await trio.sleep(0.001)
            await trio.sleep(0.03)
            assert rig.snapshot().batch.running == 1
            assert rig.snapshot().queue.depth == 2
            assert rig.snapshot().resources.reserved_mb == pytest.approx(1172.0, abs=0.1)
    assert order == ["large", "larger", "small"]


async def test_memory_that_stays_critical_gets_the_engine_replaced(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS, "worker.resource_limits.relief_timeout_ms=2000") as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def ask() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=200))

            nursery.start_soon(ask)
            await trio.sleep(0.5)
            set_memory(rig, 1.2)
            await trio.sleep(3)
            assert rig.engine.restarts == 1
            set_memory(rig, -0.5)
    assert replies[0].code == "ok"


async def trims_at(rig: Rig, seconds: float) -> list[float]:
    """When turns trim the caches in the next so many seconds."""
    times: list[float] = []
    real = rig.engine.begin

    def begin(work: Work) -> Turn:
        if work.trim_caches:
            times.append(trio.current_time())
        return real(work)

    rig.engine.begin = begin  # type: ignore[method-assign]
    await trio.sleep(seconds)
    del rig.engine.begin
    return times


async def test_caches_are_trimmed_once_a_second_while_that_is_a_step(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=4000, timeout_ms=600_000))
        assert await trims_at(rig, 5) == []
        set_memory(rig, 0.1)
        times = await trims_at(rig, 10)
        assert len(times) == 10
        assert [b - a for a, b in pairwise(times)] == pytest.approx([1.0] * 9, abs=0.021)
        set_memory(rig, -1)
        await trio.sleep(1)
        assert await trims_at(rig, 5) == []
        nursery.cancel_scope.cancel()


async def test_in_need_of_memory_every_turn_trims(autojump_clock: MockClock) -> None:
    async with (
        running_worker(*LIMITS[:2], "worker.resource_limits.check_interval_ms=60000") as rig,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=4000, timeout_ms=600_000))
        await trio.sleep(1)
        rig.observed.parts.admission.gauge.read(
            MemoryReading(used=3000 * MB, available=9000 * MB, total=16_000 * MB)
        )
        before = rig.snapshot().batch.turns
        times = await trims_at(rig, 0.5)
        assert len(times) == pytest.approx(rig.snapshot().batch.turns - before, abs=1)
        assert len(times) > 20
        assert rig.snapshot().batch.preemptions == 1, "one for each reading"
        nursery.cancel_scope.cancel()


async def test_while_all_that_waits_is_held_back_there_are_no_turns(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*LIMITS) as rig, trio.open_nursery() as nursery:
        set_memory(rig, 0.3)
        await trio.sleep(1)
        nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=2, priority="low"))
        await trio.sleep(1)
        before = rig.snapshot().batch.turns
        await trio.sleep(8)
        assert rig.snapshot().queue.depth == 1
        assert rig.snapshot().batch.turns == before
        await trio.sleep(2)
        assert rig.snapshot().requests.completed == 1


async def test_a_request_that_can_never_fit_any_more_is_told_so_when_its_turn_comes(
    autojump_clock: MockClock,
) -> None:
    """The next engine leaves less room beside its caches than the one before."""
    async with running_worker(
        "worker.resource_limits.max_memory_mb=150",
        "worker.resource_limits.critical_memory_mb=160",
        "worker.resource_limits.check_interval_ms=100",
        "worker.requests.max_tokens_limit=100000",
        "worker.continuous_batching.max_batch_size=1",
        context_length=100_000,
    ) as rig:
        replies: dict[str, Reply] = {}

        async def ask(name: str, **fields: object) -> None:
            replies[name] = await rig.ask(prompt="x", timeout_ms=600_000, **fields)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask("small", max_tokens=100))
            await trio.sleep(0.1)
            nursery.start_soon(lambda: ask("large", max_tokens=40 * 256))
            await trio.sleep(0.1)
            rig.probe.used = 130 * MB
            rig.engine.crash()
        large = replies["large"].error
        assert large is not None
        assert (large.code, large.retryable) == ("RESOURCE_LIMIT_EXCEEDED", False)
        assert large.details["need_mb"] == 41.0
        assert replies["small"].code == "ok"
        assert rig.snapshot().batch.running == 0


async def test_a_shrunk_batch_that_is_still_too_large_gives_no_slot_away(
    autojump_clock: MockClock,
) -> None:
    async with (
        running_worker(*LIMITS, "worker.continuous_batching.max_batch_size=4") as rig,
        trio.open_nursery() as nursery,
    ):
        for _ in range(4):
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=200, priority="low"))
        await trio.sleep(0.5)
        set_memory(rig, 0.6)
        await trio.sleep(0.5)
        assert "shrink_batch" in rig.snapshot().resources.steps
        nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=2, priority="high"))
        await trio.sleep(1)
        assert (rig.snapshot().batch.running, rig.snapshot().queue.depth) == (4, 1)
        assert rig.snapshot().batch.preemptions == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("granules", "preempted"), [(10, 1), (13, 0)])
async def test_a_slot_is_taken_only_by_who_then_fits(
    autojump_clock: MockClock, granules: int, preempted: int
) -> None:
    """256 tokens are 1 MB; two of 10 run, and 25 MB are there: all rows count as the longest."""
    async with (
        running_worker(
            "worker.resource_limits.max_memory_mb=110",
            "worker.resource_limits.critical_memory_mb=125",
            "worker.requests.max_tokens_limit=100000",
            "worker.continuous_batching.max_batch_size=2",
            "worker.continuous_batching.turn_timeout_ms=60000",
            context_length=100_000,
            engine_options={"model_bytes": 0},
        ) as rig,
        trio.open_nursery() as nursery,
    ):
        stop = word(0)[:1]
        for _ in range(2):
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=10 * 256 - 1, priority="low"))
        await trio.sleep(0.1)
        assert rig.snapshot().batch.running == 2
        reply = await rig.ask(
            prompt="x",
            max_tokens=granules * 256 - 1,
            priority="high",
            timeout_ms=1000,
            stop=stop,
        )
        assert rig.snapshot().batch.preemptions == preempted
        stage = reply.error.details["stage"] if reply.error is not None else None
        assert (reply.code, stage) == (("ok", None) if preempted else ("REQUEST_TIMEOUT", "queued"))
        nursery.cancel_scope.cancel()


async def test_an_idle_engine_gives_kept_caches_back_for_a_request_that_needs_the_room(
    autojump_clock: MockClock,
) -> None:
    """20 MB of the first prompt are kept; the second request may need 45 of 60."""
    async with running_worker(
        "worker.resource_limits.max_memory_mb=55",
        "worker.resource_limits.critical_memory_mb=60",
        "worker.resource_limits.check_interval_ms=60000",
        "worker.requests.max_tokens_limit=100000",
        context_length=100_000,
        engine_options={"model_bytes": 0},
    ) as rig:
        rig.probe.used = 10 * MB
        rig.observed.parts.admission.gauge.read(rig.probe.read(None))
        rig.observed.parts.scheduler.ledger.reconcile(used=10 * MB, cached_tokens=0)
        assert (await rig.ask(prompt="x " * 5000, max_tokens=2)).code == "ok"
        assert rig.snapshot().resources.memory_mb == pytest.approx(19.6, abs=0.2)
        began_at = trio.current_time()
        reply = await rig.ask(prompt="y", max_tokens=45 * 256 - 1, timeout_ms=3000, stream=True)
        assert reply.error is not None
        assert reply.error.details["stage"] == "decode"
        first_token_at = next(
            at for at, chunk in zip(reply.times, reply.chunks, strict=False) if chunk.text
        )
        assert first_token_at - began_at < 0.2


async def test_what_the_engine_counts_decides_from_the_next_turn_on(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and what its allocator keeps: no look at the processes comes for a minute."""
    async with (
        running_worker(*LIMITS[:2], "worker.resource_limits.check_interval_ms=60000") as rig,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=4000, timeout_ms=600_000))
        await trio.sleep(1)
        assert rig.observed.readiness().ok
        memory = EngineMemory(active=1500 * MB, cache=600 * MB)
        monkeypatch.setattr(rig.engine, "_memory", lambda: memory)
        await trio.sleep(0.05)
        assert rig.snapshot().resources.memory_mb == 2100.0
        assert not rig.observed.readiness().ok
        assert rig.observed.parts.door.state.value is DoorState.PAUSED
        assert not rig.observed.parts.scheduler.ledger.fits(1)
        nursery.cancel_scope.cancel()


async def test_planned_replacements_put_nobody_on_trial(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, trio.open_nursery() as nursery:
        replies: list[Reply] = []

        async def ask() -> None:
            replies.append(await rig.ask(prompt="x", max_tokens=300))

        nursery.start_soon(ask)
        for _ in range(5):
            # Half a second to come back, and fewer tokens than acquit a suspect.
            await trio.sleep(0.7)
            rig.engine.recycle()
        await trio.sleep(10)
        assert [(reply.code, reply.worker["resumed"]) for reply in replies] == [("ok", 5)]


async def test_a_crash_that_one_request_is_guilty_of_costs_no_restart(
    autojump_clock: MockClock,
) -> None:
    faults = Faults(deadly_words=frozenset({"deadly"}))
    async with running_worker(faults=faults, max_restarts=3) as rig:
        for _ in range(4):
            assert (await rig.ask(prompt="deadly", max_tokens=5)).code == "ENGINE_FAILED"
        assert (await rig.ask(prompt="fine", max_tokens=5)).code == "ok"
        assert rig.engine.statistics().restarts_by_reason == {"crash": 12}


async def held_for(*overrides: str, levels: int, priority: object = None) -> float | None:
    """How long a request waits that arrives while the lowest level is held back for memory.

    None: until its deadline, a minute later.
    """
    async with running_worker(
        *LIMITS, f"worker.request_queue.priority_levels={levels}", *overrides
    ) as rig:
        set_memory(rig, 0.3)
        await trio.sleep(1)
        assert rig.snapshot().resources.steps == ["trim_caches", "hold_low"]
        reply = await rig.ask(
            prompt="x", max_tokens=2, stream=True, timeout_ms=60_000, priority=priority
        )
        return None if reply.error else round(reply.worker["queue_ms"] / 1000, 1)


@pytest.mark.parametrize(
    ("levels", "aging_ms", "priority", "expected_s"),
    [
        (3, "5000", 2, 10.0),
        (3, "5000", 1, 0.0),
        (8, "1000", 7, 7.0),
        (3, "null", 2, 10.0),
        (2, "5000", None, 0.0),
        (2, "5000", 1, 0.0),
        (1, "5000", None, 0.0),
    ],
)
async def test_pressure_holds_the_lowest_of_three_levels_back_for_what_aging_is_worth(
    autojump_clock: MockClock,
    levels: int,
    aging_ms: str,
    priority: object,
    expected_s: float,
) -> None:
    """A stream that names no priority is of the lower of two levels: that is no low one."""
    waited_s = await held_for(
        f"worker.request_queue.aging_ms={aging_ms}", levels=levels, priority=priority
    )
    assert waited_s == pytest.approx(expected_s, abs=0.3)


@pytest.mark.thorough
async def test_a_load_of_three_times_the_limit_stays_below_it_and_everyone_is_answered(
    autojump_clock: MockClock,
) -> None:
    """Ten virtual minutes; memory is the simulated engine's own count."""
    limits = (
        "worker.resource_limits.max_memory_mb=100",
        "worker.resource_limits.critical_memory_mb=200",
        "worker.resource_limits.check_interval_ms=100",
        "worker.resource_limits.degraded_max_tokens=20",
        "worker.continuous_batching.max_batch_size=8",
        "worker.simulated.turn_ms=20",
    )
    memory = {"model_bytes": 50 * MB, "cache_bytes_per_token": MB // 8, "prefix_cache_tokens": 300}
    rng = random.Random(7)
    async with running_worker(*limits, engine_options=memory) as rig:
        codes: Counter[str] = Counter()
        peak_mb = 0.0
        combinations: list[list[str]] = []

        async def one(max_tokens: int, priority: str) -> None:
            reply = await rig.ask(
                prompt="w " * 100, max_tokens=max_tokens, priority=priority, timeout_ms=120_000
            )
            codes[reply.code] += 1

        async def watch() -> None:
            nonlocal peak_mb
            gauge = rig.observed.parts.admission.gauge
            while True:
                # Beside the caches, something else of the processes grows and shrinks.
                other = 40 * (1 + math.sin(2 * math.pi * trio.current_time() / 240))
                rig.probe.used = rig.engine._memory().active + int(other * MB)
                peak_mb = max(peak_mb, gauge.used / MB)
                steps = [step.value for step in DegradationStep if step in gauge.steps]
                if not combinations or combinations[-1] != steps:
                    combinations.append(steps)
                await trio.sleep(0.05)

        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            async with trio.open_nursery() as nursery:
                sent = 0
                while trio.current_time() < 600:
                    # Eight of the largest at once would take 8 x 512 x 1/8 = 512 MB.
                    size, priority = rng.randint(10, 400), rng.choice(["high", "medium", "low"])
                    nursery.start_soon(one, size, priority)
                    sent += 1
                    # Waves: a calm minute after each busy one.
                    busy = int(trio.current_time() / 60) % 2 == 0
                    await trio.sleep(rng.expovariate(1.0 if busy else 0.05))
            watching.cancel_scope.cancel()
    assert sum(codes.values()) == sent > 200
    assert codes["ok"] > 0.7 * sent
    assert set(codes) <= {"ok", "QUEUE_FULL", "REQUEST_TIMEOUT", "RESOURCE_LIMIT_EXCEEDED"}
    assert peak_mb <= 200 + 8, "the hard limit and one turn's growth"
    order = [each.value for each in DegradationStep]
    assert all(steps == order[: len(steps)] for steps in combinations)
    assert order in combinations
    assert combinations.count([]) > 3, "engaged and disengaged again and again"
