"""What a whole worker counts: each story in virtual time, and exactly what it changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from support.metric_values import samples_in
from support.worker_rig import MB, Reply, Rig, running_worker, subject_of
from trio.testing import MockClock

from trio_worker.core.memory import DegradationStep
from trio_worker.monitoring.prometheus import exposition
from trio_worker.ports import Message
from trio_worker.simulated.engine import Faults

TURN_S = 1 / 8
TOKEN_S = 1 / 64
"""Of prefill. These and what they add up to are exact in binary."""
FORMING_S = 1 / 4
"""A lone request waits so long for a second one."""
OPTIONS = (
    "worker.model_name=tiny",
    "worker.continuous_batching.max_batch_size=2",
    "worker.continuous_batching.min_batch_size=2",
    f"worker.continuous_batching.batch_timeout_ms={1000 * FORMING_S:.0f}",
    "worker.continuous_batching.adaptive_timeout=false",
    "worker.request_queue.max_depth=2",
    "worker.requests.refuse_unmeetable=false",
    "worker.resource_limits.max_memory_mb=1000",
    "worker.resource_limits.critical_memory_mb=2000",
    "worker.resource_limits.check_interval_ms=125",
    f"worker.simulated.turn_ms={1000 * TURN_S}",
    f"worker.simulated.prefill_ms_per_token={1000 * TOKEN_S}",
)

Samples = dict[str, float]


def samples(rig: Rig) -> Samples:
    """Every sample, named as in a query without quotes; buckets and the loop's pulse apart."""
    body, _ = exposition(rig.observed)
    return {
        name: value
        for name, value in samples_in(body.decode()).items()
        if "_bucket{" not in name and not name.startswith("event_loop_lag")
    }


def changed(before: Samples, after: Samples) -> Samples:
    return {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if value != before.get(name, 0)
    }


class Story:
    """A worker, those who ask it, and what has changed since it was last looked at."""

    def __init__(self, rig: Rig, nursery: trio.Nursery) -> None:
        self.rig = rig
        self.replies: dict[str, Reply] = {}
        self._nursery = nursery
        self._before = samples(rig)

    def start(self, *names: str, **fields: Any) -> None:
        for name in names:
            self._nursery.start_soon(self.ask, name, fields)

    async def ask(self, name: str, fields: dict[str, Any]) -> None:
        self.replies[name] = await self.rig.ask(prompt="x", request_id=name, **fields)

    def cancel(self, name: str) -> None:
        self.rig.caller.publish(Message(subject=subject_of(name), body=b"cancel"))

    def changes(self) -> Samples:
        """All but the engine's own memory, and how long a batch took to form behind another."""
        before, self._before = self._before, samples(self.rig)
        agree(self.rig, self._before)
        return {
            name: value
            for name, value in changed(before, self._before).items()
            if name != "memory_bytes{kind=engine_active}"
            and not name.startswith("batch_formation_seconds_sum")
        }


@asynccontextmanager
async def story(*overrides: str, **options: Any) -> AsyncIterator[Story]:
    await trio.sleep(8)
    async with (
        running_worker(*OPTIONS, *overrides, restart_s=0.5, **options) as rig,
        trio.open_nursery() as nursery,
    ):
        yield Story(rig, nursery)


def agree(rig: Rig, found: Samples) -> None:
    """What both the snapshot and the metrics say is the same."""

    def total(name: str) -> float:
        return sum(value for key, value in found.items() if key.partition("{")[0] == name)

    said = rig.snapshot()
    expected = {
        "requests_in_flight": said.requests.in_flight,
        "queue_depth": sum(said.queue.by_priority.values()),
        "queue_promotions_total": said.queue.promotions,
        "preemptions_total": said.batch.preemptions,
        "turn_seconds_count": said.batch.turns,
        "batch_formation_seconds_count": sum(said.batch.by_trigger.values()),
        "degradations_total": sum(said.resources.degradations.values()),
        "memory_pressure": ["normal", "soft", "critical"].index(said.resources.pressure),
        "engine_restarts_total": said.engine.restarts,
        "requests_resumed_total": said.engine.resumed,
        "prompt_tokens_total": said.tokens.prompt,
        "prefix_cache_hit_tokens_total": said.tokens.cached,
        "generated_tokens_total": said.tokens.generated,
        "nats_connected": said.nats.connected,
        "nats_reconnects_total": said.nats.reconnects,
        "nats_slow_consumer_total": said.nats.slow_consumers,
        "requests_total": sum(said.requests.by_outcome.values()) - total("rejections_total"),
        "request_seconds_count": total("requests_total"),
        "ready": rig.observed.readiness().ok,
    }
    assert {name: total(name) for name in expected} == expected


async def test_a_request_alone_and_once_more(autojump_clock: MockClock) -> None:
    """The second time all of the prompt but its last token is still there."""
    counted = {
        "batch_formation_seconds_count{trigger=timeout}": 1,
        "batch_size_count": 4,
        "batch_size_sum": 4,
        "generated_tokens_total": 4,
        "inter_token_seconds_count": 3,
        "inter_token_seconds_sum": 3 * TURN_S,
        "prompt_tokens_total": 32,
        "queue_wait_seconds_count{priority=high}": 1,
        "queue_wait_seconds_sum{priority=high}": FORMING_S,
        "request_seconds_count{outcome=ok}": 1,
        "requests_total{outcome=ok,priority=high}": 1,
        "time_to_first_token_seconds_count{priority=high}": 1,
        "turn_seconds_count": 5,
    }
    async with story() as it:
        for computed in (32, 1):
            reply = await it.rig.ask(prompt="word " * 32, max_tokens=4)
            turns_s = 4 * TURN_S + computed * TOKEN_S
            first_s = FORMING_S + computed * TOKEN_S + TURN_S
            assert it.changes() == counted | {
                "request_seconds_sum{outcome=ok}": FORMING_S + turns_s,
                "time_to_first_token_seconds_sum{priority=high}": first_s,
                "turn_seconds_sum": turns_s,
            } | ({"prefix_cache_hit_tokens_total": 31} if computed == 1 else {})
            assert reply.usage["completion_tokens"] == 4
        snapshot = it.rig.snapshot()
    assert snapshot.batch.last_formation_ms == 1000 * FORMING_S
    assert snapshot.requests.queue_wait_ms.p99 == 1000 * FORMING_S
    assert snapshot.requests.inter_token_ms.p50 == 1000 * TURN_S
    assert snapshot.requests.time_to_first_token_ms.p99 == 1000 * (FORMING_S + TURN_S + 0.5)
    assert snapshot.requests.request_ms.p99 == 1000 * (FORMING_S + 4 * TURN_S + 0.5)
    assert snapshot.tokens.per_second == 8 / 10
    assert snapshot.batch.mean_batch_size == snapshot.batch.max_batch_seen == 1


async def test_two_run_and_an_urgent_one_takes_a_slot(autojump_clock: MockClock) -> None:
    async with story() as it:
        it.start("one", "two", max_tokens=8, priority="low")
        await trio.sleep(0.5)
        # Two prompts of a token and three steps have been computed, and the fourth is under way.
        assert it.changes() == {
            "batch_formation_seconds_count{trigger=size}": 1,
            "batch_size_count": 3,
            "batch_size_sum": 6,
            "inter_token_seconds_count": 4,
            "inter_token_seconds_sum": 4 * TURN_S,
            "memory_reserved_bytes": 2 * 256 * 4096,
            "queue_wait_seconds_count{priority=low}": 2,
            "requests_in_flight": 2,
            "time_to_first_token_seconds_count{priority=low}": 2,
            "time_to_first_token_seconds_sum{priority=low}": 2 * (2 * TOKEN_S + TURN_S),
            "turn_seconds_count": 4,
            "turn_seconds_sum": 2 * TOKEN_S + 3 * TURN_S,
        }
        it.start("urgent", max_tokens=2, priority="high")
        await trio.sleep(0.25)
        # It enters when that step ends; the next turn reads its prompt while the other decodes.
        assert it.changes() == {
            "batch_formation_seconds_count{trigger=running}": 1,
            "batch_size_count": 2,
            "batch_size_sum": 3,
            "inter_token_seconds_count": 3,
            "inter_token_seconds_sum": 2 * TURN_S + (TURN_S + TOKEN_S),
            "preemptions_total{reason=priority}": 1,
            "queue_depth{priority=low}": 1,
            "queue_wait_seconds_count{priority=high}": 1,
            "queue_wait_seconds_sum{priority=high}": 0.53125 - 0.5,
            "requests_in_flight": 1,
            "turn_seconds_count": 2,
            "turn_seconds_sum": TURN_S + (TURN_S + TOKEN_S),
        }
        await trio.sleep(10)
        after = it.changes()
    assert after["queue_depth{priority=low}"] == -1
    assert after["requests_total{outcome=ok,priority=low}"] == 2
    assert after["requests_total{outcome=ok,priority=high}"] == 1
    assert after["generated_tokens_total"] == 18
    assert "queue_wait_seconds_count{priority=low}" not in after, "it waited once"
    assert "time_to_first_token_seconds_count{priority=low}" not in after


async def test_one_that_has_waited_is_served_before_a_more_urgent_one(
    autojump_clock: MockClock,
) -> None:
    async with story("worker.request_queue.aging_ms=500") as it:
        it.start("one", "two", max_tokens=16, priority="high")
        await trio.sleep(0.125)
        it.start("low", max_tokens=2, priority="low")
        await trio.sleep(1.5)
        it.start("late", max_tokens=2, priority="high")
        await trio.sleep(10)
        assert it.changes().items() >= {
            ("queue_promotions_total", 1),
            ("requests_total{outcome=ok,priority=low}", 1),
            ("requests_total{outcome=ok,priority=high}", 3),
        }


async def test_requests_that_do_not_come_in(autojump_clock: MockClock) -> None:
    async with story() as it:
        it.start("one", "two", max_tokens=8)
        await trio.sleep(0.0625)
        it.start("three", "four", max_tokens=8)
        await trio.sleep(0.03125)
        it.changes()
        it.start("full", max_tokens=8)
        it.start("wrong", max_tokens=0)
        it.start("one")
        it.start("unknown", model="another")
        it.rig.caller.publish(Message(subject="inference.w1", body=b"{}"))
        await trio.sleep(0.03125)
        assert it.changes() == {
            "rejections_total{code=DUPLICATE_REQUEST}": 1,
            "rejections_total{code=INVALID_REQUEST}": 1,
            "rejections_total{code=MODEL_NOT_FOUND}": 1,
            "rejections_total{code=QUEUE_FULL}": 1,
        }
        snapshot = it.rig.snapshot()
        assert snapshot.queue.is_full
        assert (snapshot.queue.depth, snapshot.requests.dropped) == (2, 1)
        assert snapshot.requests.by_stage == {"prefill": 2, "queued": 2}


async def test_requests_that_end_before_their_answer(autojump_clock: MockClock) -> None:
    async with story() as it:
        it.start("decoding", max_tokens=100, priority="medium")
        it.start("late", max_tokens=100, priority="low", timeout_ms=1000)
        await trio.sleep(0.125)
        it.start("queued", max_tokens=100, priority="low")
        await trio.sleep(0.375)
        it.changes()
        it.cancel("decoding")
        it.cancel("queued")
        await trio.sleep(1.5)
        # The step under way ends 1/32 s later and was of both; one each follows until 1 s.
        assert it.changes() == {
            "batch_size_count": 5,
            "batch_size_sum": 6,
            "cancel_latency_seconds_count": 2,
            "cancel_latency_seconds_sum": (0.65625 - 0.5) + (1.15625 - 1),
            "cancellations_total{source=cancelled,stage=decode}": 1,
            "cancellations_total{source=cancelled,stage=queued}": 1,
            "generated_tokens_total": 3 + 7,
            "inter_token_seconds_count": 4,
            "inter_token_seconds_sum": 4 * TURN_S,
            "memory_reserved_bytes": -2 * 256 * 4096,
            "prompt_tokens_total": 2,
            "queue_depth{priority=low}": -1,
            "request_seconds_count{outcome=CANCELLED}": 2,
            "request_seconds_count{outcome=REQUEST_TIMEOUT}": 1,
            "request_seconds_sum{outcome=CANCELLED}": 0.5 + 0.375,
            "request_seconds_sum{outcome=REQUEST_TIMEOUT}": 1,
            "requests_in_flight": -3,
            "requests_total{outcome=CANCELLED,priority=low}": 1,
            "requests_total{outcome=CANCELLED,priority=medium}": 1,
            "requests_total{outcome=REQUEST_TIMEOUT,priority=low}": 1,
            "turn_seconds_count": 6,
            "turn_seconds_sum": 6 * TURN_S,
        }
        assert it.rig.snapshot().requests.cancel_ms.p99 == 156.25


async def test_the_ends_of_the_engine(autojump_clock: MockClock) -> None:
    async with story(engine_options={"turn_timeout_s": 1.0}) as it:
        it.start("one", "two", max_tokens=4)
        await trio.sleep(0.25)
        it.changes()
        it.rig.engine.crash()
        await trio.sleep(0.25)
        assert it.changes() == {"engine_restarts_total{reason=crash}": 1, "ready": -1}
        assert it.rig.snapshot().worker.state == "restarting"
        await trio.sleep(2)
        # The turn that was lost is no turn; the gap between two tokens is as the caller sees it.
        gap_s = (0.75 + 4 * TOKEN_S + TURN_S) - 0.15625
        assert it.changes() == {
            "batch_size_count": 3,
            "batch_size_sum": 6,
            "generated_tokens_total": 8,
            "inter_token_seconds_count": 6,
            "inter_token_seconds_sum": 2 * (gap_s + 2 * TURN_S),
            "memory_reserved_bytes": -2 * 256 * 4096,
            "prompt_tokens_total": 2,
            "ready": 1,
            "request_seconds_count{outcome=ok}": 2,
            "request_seconds_sum{outcome=ok}": 2 * (0.15625 + gap_s + 2 * TURN_S),
            "requests_in_flight": -2,
            "requests_resumed_total": 2,
            "requests_total{outcome=ok,priority=high}": 2,
            "turn_seconds_count": 4,
            "turn_seconds_sum": 4 * TOKEN_S + 3 * TURN_S,
        }
        it.rig.engine.recycle()
        await trio.sleep(1)
        assert it.changes() == {"engine_restarts_total{reason=planned}": 1}
        it.rig.engine.hang()
        it.start("three", max_tokens=1)
        await trio.sleep(3)
        after = it.changes()
    assert after["engine_restarts_total{reason=hang}"] == 1
    assert after["requests_resumed_total"] == 1
    assert after["turn_seconds_count"] == 2


async def test_a_request_that_the_engine_cannot_compute(autojump_clock: MockClock) -> None:
    async with story(faults=Faults(failing_words=frozenset({"x"}))) as it:
        it.start("bad", max_tokens=4)
        await trio.sleep(2)
        assert it.changes() == {
            "batch_formation_seconds_count{trigger=timeout}": 1,
            "prompt_tokens_total": 1,
            "queue_wait_seconds_count{priority=high}": 1,
            "queue_wait_seconds_sum{priority=high}": FORMING_S,
            "request_seconds_count{outcome=ENGINE_FAILED}": 1,
            "request_seconds_sum{outcome=ENGINE_FAILED}": FORMING_S + TURN_S,
            "requests_total{outcome=ENGINE_FAILED,priority=high}": 1,
            "turn_seconds_count": 1,
            "turn_seconds_sum": TURN_S,
        }


async def test_memory_that_becomes_critical_and_comes_back(autojump_clock: MockClock) -> None:
    async with story() as it:
        it.start("one", "two", max_tokens=8)
        await trio.sleep(0.5625)
        it.changes()
        it.rig.probe.used, it.rig.probe.available = 2000 * MB, 7000 * MB
        await trio.sleep(0.3125)
        # Read at 0.625 and 0.75; after the turns that end at 0.65625 and 0.78125 one leaves.
        assert it.changes() == {
            "batch_size_count": 2,
            "batch_size_sum": 3,
            **{f"degradations_total{{step={step}}}": 1 for step in DegradationStep},
            "inter_token_seconds_count": 3,
            "inter_token_seconds_sum": 3 * TURN_S,
            "memory_bytes{kind=available}": -1000 * MB,
            "memory_bytes{kind=used}": 1900 * MB,
            "memory_pressure": 2,
            "memory_reserved_bytes": -2 * 256 * 4096,
            "preemptions_total{reason=memory}": 2,
            "queue_depth{priority=high}": 2,
            "ready": -1,
            "turn_seconds_count": 2,
            "turn_seconds_sum": 2 * TURN_S,
        }
        it.rig.probe.used = 100 * MB
        await trio.sleep(10)
        after = it.changes()
    assert after["memory_pressure"] == -2
    assert after["memory_bytes{kind=used}"] == -1900 * MB
    assert after["ready"] == 1
    assert after["requests_total{outcome=ok,priority=high}"] == 2
    assert not any(name.startswith("degradations_total") for name in after)


async def test_a_connection_that_is_away(autojump_clock: MockClock) -> None:
    async with story() as it:
        it.rig.broker.disconnect()
        assert it.changes() == {"nats_connected": -1, "ready": -1}
        it.rig.broker.reconnect()
        it.rig.broker.slow_consumers = 3
        assert it.changes() == {
            "nats_connected": 1,
            "nats_reconnects_total": 1,
            "nats_slow_consumer_total": 3,
            "ready": 1,
        }


async def test_the_engines_memory_is_that_of_its_last_turn(autojump_clock: MockClock) -> None:
    held = "memory_bytes{kind=engine_active}"
    async with story() as it:
        it.start("one", "two", max_tokens=8)
        await trio.sleep(0.5)
        # The model, and of each the prompt and three tokens.
        assert samples(it.rig)[held] == 64 * MB + 2 * 4 * 4096
        await trio.sleep(10)
        assert samples(it.rig)[held] == 64 * MB
