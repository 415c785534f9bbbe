"""A whole worker as a member of mlx-serving's clusters, with a scripted controller."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import trio
from support.scripted_controller import Answered, NoWorkers, ScriptedController, running_controller
from support.worker_rig import Rig, decode, running_worker

from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.engine import Faults
from trio_worker.stages import controller as stage
from trio_worker.wire.mlx_serving import member_id

BOTH = "nats.dialects=[native, mlx-serving]"
MEMBER = member_id("w1")
SHORT: dict[str, Any] = {"maxTokens": 4}
LONG: dict[str, Any] = {"maxTokens": 1000}


def wall_clock() -> float:
    return 1_700_000_000.0 + trio.current_time()


@asynccontextmanager
async def cluster(
    *overrides: str, lag_s: float = 0.0, faults: Faults | None = None, delay_s: float = 0.001
) -> AsyncIterator[tuple[Rig, ScriptedController]]:
    """A worker that a controller knows."""
    server = MemoryServer(random=random.Random(0), delay_s=delay_s)
    async with (
        open_memory_broker(server, name="controller") as broker,
        running_controller(broker, wall_clock=wall_clock, lag_s=lag_s) as controller,
        running_worker(
            BOTH, *overrides, server=server, wall_clock=wall_clock, faults=faults
        ) as rig,
    ):
        await controller.until(lambda: MEMBER in controller.members)
        yield rig, controller


async def test_a_worker_registers_beats_and_answers(autojump_clock: trio.abc.Clock) -> None:
    async with cluster() as (rig, controller):
        answered = await controller.ask("hi", **SHORT)
        assert [each["type"] for each in answered.messages] == [*["token"] * 4, "done"]
        assert [each["index"] for each in answered.messages[:-1]] == [0, 1, 2, 3]
        assert {each["requestId"] for each in answered.messages} == {answered.request_id}
        assert answered.last["totalTokens"] == 4
        assert answered.last["latencyMs"] > 0
        assert answered.terminals == 1
        assert not any(message.headers for message in answered.bodies)
        assert len(answered.bodies) == 5
        kind, body, _ = controller.told[0]
        assert kind == "register"
        uuid.UUID(body["workerId"])
        assert body == {
            "workerId": MEMBER,
            "hostname": "host",
            "ip": "192.0.2.1",
            "port": body["port"],
            "skills": {
                "availableModels": ["smollm2-135m-instruct"],
                "modelPaths": {"smollm2-135m-instruct": "smollm2-135m-instruct"},
                "totalModelSize": 0,
                "lastScanned": body["skills"]["lastScanned"],
            },
            "status": "online",
            "timestamp": body["timestamp"],
        }
        assert controller.kinds()[1] == "heartbeat"
        assert rig.snapshot().requests.by_outcome == {"ok": 1}


async def test_who_listens_late_misses_nothing(autojump_clock: trio.abc.Clock) -> None:
    """The race on the first reply: whatever the lag, instant answers and errors included."""
    for lag_s in (0.0, 0.01, 0.06, 0.5, 3.0):
        async with cluster(lag_s=lag_s) as (_, controller):
            answered = await controller.ask(maxTokens=3)
            assert [each["type"] for each in answered.messages] == [*["token"] * 3, "done"]
            refused = await controller.ask(maxTokens=0)
            assert [each["type"] for each in refused.messages] == ["error"]
            assert refused.last["code"] == "INVALID_REQUEST"


async def test_nothing_is_said_at_once_also_where_somebody_else_listens(
    autojump_clock: trio.abc.Clock,
) -> None:
    """Then the server has no word for us that the controller does not listen yet."""
    async with cluster(lag_s=0.03) as (rig, controller):
        await rig.caller.subscribe("response.>", lambda _message: None)
        answered = await controller.ask(maxTokens=0)
        assert answered.terminals == 1


async def test_who_never_listens_is_given_up(autojump_clock: trio.abc.Clock) -> None:
    async with cluster(lag_s=1000.0) as (rig, controller):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(controller.begin)
            nursery.start_soon(lambda: controller.begin(maxTokens=0))
            await trio.sleep(8)
            snapshot = rig.snapshot()
            assert snapshot.requests.in_flight == 0
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("dialects", ["native, mlx-serving", "mlx-serving"])
async def test_a_controller_that_dies_ends_its_requests(
    autojump_clock: trio.abc.Clock, dialects: str
) -> None:
    server = MemoryServer(random=random.Random(0), delay_s=0.001)
    spoken = f"nats.dialects=[{dialects}]"
    async with running_worker(spoken, server=server, wall_clock=wall_clock) as rig:
        async with (
            open_memory_broker(server, name="controller") as broker,
            running_controller(broker, wall_clock=wall_clock) as controller,
        ):
            await controller.until(lambda: MEMBER in controller.members)
            await controller.begin(**LONG)
            await trio.sleep(0.5)
            assert rig.snapshot().requests.in_flight == 1
        await trio.sleep(0.5)
        snapshot = rig.snapshot()
        assert snapshot.requests.in_flight == 0
        assert snapshot.requests.by_outcome == {"CANCELLED": 1}


async def test_a_controller_that_is_restarted_knows_the_worker_again(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        async with running_controller(rig.caller, wall_clock=wall_clock) as successor:
            assert not successor.members
            await successor.until(lambda: MEMBER in successor.members, within_s=5.1)
            assert (await successor.ask(**SHORT)).last["type"] == "done"
        assert MEMBER in controller.members


async def test_a_worker_that_beats_is_never_offline(autojump_clock: trio.abc.Clock) -> None:
    async with cluster() as (rig, controller):
        for _ in range(60):
            await trio.sleep(1)
            assert controller.members[MEMBER].status == "online"
        assert len(controller.told) == pytest.approx(2 * 60 / 5, abs=6)
        rig.kill()
        await trio.sleep(21)
        assert controller.members[MEMBER].status == "offline"
        with pytest.raises(NoWorkers):
            await controller.begin()


async def test_load_is_told_when_it_changes_ten_times_a_second_at_most(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (_, controller):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(lambda: controller.ask(**SHORT))
            await controller.until(lambda: controller.members[MEMBER].active > 10, within_s=1)
        await controller.until(lambda: controller.members[MEMBER].active == 0, within_s=1)
        beats = [at for kind, _, at in controller.told if kind == "heartbeat"]
        gaps = [after - before for before, after in pairwise(beats)]
        assert min(gaps) >= 0.09


async def test_one_that_had_better_not_be_asked_is_degraded(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        rig.probe.used = 20_000 * 2**20
        await controller.until(lambda: controller.members[MEMBER].status == "degraded")
        with pytest.raises(NoWorkers):
            await controller.begin()
        rig.probe.used = 100 * 2**20
        await controller.until(lambda: controller.members[MEMBER].status == "online")


async def test_refusals_that_another_could_serve_say_so(autojump_clock: trio.abc.Clock) -> None:
    full = ("worker.request_queue.max_depth=1", "worker.continuous_batching.max_batch_size=1")
    async with cluster(*full) as (_, controller):
        answers: list[Answered] = []
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                answers.append(await controller.ask(maxTokens=20))

            for _ in range(8):
                nursery.start_soon(ask)
        errors = [each.last for each in answers if each.last["type"] == "error"]
        assert errors
        for error in errors:
            assert error["code"] == "QUEUE_FULL"
            assert "No workers" in error["error"]
        invalid = await controller.ask(maxTokens="20")
        assert "No workers" not in invalid.last["error"]
        assert "max_tokens" in invalid.last["error"]


async def test_what_cannot_be_read_is_answered_where_it_has_an_id(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        for body in (
            b'{"requestId": "%s", "prompt": 1}',
            b'{"requestId": "%s"}',
            b'{"requestId": "%s", "prompt": "x", "messages": []}',
            b'{"requestId": "%s", "prompt": "x", "modelId": "another"}',
        ):
            answered = Answered(str(uuid.uuid4()))
            await controller.send(MEMBER, answered, body % answered.request_id.encode())
            with trio.fail_after(5):
                await answered.ended.wait()
            assert answered.messages[0]["type"] == "error"
            assert answered.messages[0]["requestId"] == answered.request_id
        dropped = rig.snapshot().requests.dropped
        for body in (
            b"",
            b"{",
            b"[]",
            b"{}",
            b'{"requestId": 1}',
            b'{"requestId": "a.b"}',
            b"\xff",
        ):
            rig.caller.publish(Message(subject=f"worker.{MEMBER}.inference", body=body))
        await trio.sleep(1)
        assert rig.snapshot().requests.dropped == dropped + 7


async def test_a_request_that_is_repeated_is_served_once(autojump_clock: trio.abc.Clock) -> None:
    async with cluster() as (rig, controller):
        answered = Answered(str(uuid.uuid4()))
        body = msgspec.json.encode(
            {"requestId": answered.request_id, "prompt": "x", "maxTokens": 20}
        )
        await controller.send(MEMBER, answered, body)
        rig.caller.publish(Message(subject=f"worker.{MEMBER}.inference", body=body))
        await answered.ended.wait()
        rig.caller.publish(Message(subject=f"worker.{MEMBER}.inference", body=body))
        await trio.sleep(5)
        assert answered.terminals == 1
        assert len(answered.messages) == 21
        assert rig.snapshot().requests.by_outcome == {"ok": 1}


async def test_only_the_latest_requests_are_remembered(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LATELY_MAX", 1)
    async with cluster() as (rig, controller):
        answered = Answered(str(uuid.uuid4()))
        body = msgspec.json.encode(
            {"requestId": answered.request_id, "prompt": "x", "maxTokens": 40}
        )
        await controller.send(MEMBER, answered, body)
        await controller.ask(maxTokens=2)
        # Forgotten, and still running.
        rig.caller.publish(Message(subject=f"worker.{MEMBER}.inference", body=body))
        await answered.ended.wait()
        assert answered.last["type"] == "done"
        # Forgotten, and at its end.
        await controller.ask(maxTokens=2)
        rig.caller.publish(Message(subject=f"worker.{MEMBER}.inference", body=body))
        await trio.sleep(5)
        assert answered.terminals == 2


async def test_after_an_outage_only_the_present_is_told(autojump_clock: trio.abc.Clock) -> None:
    async with cluster() as (rig, controller):
        rig.broker.disconnect()
        await trio.sleep(60)
        told = len(controller.told)
        rig.broker.reconnect()
        await trio.sleep(0.1)
        assert controller.kinds()[told:] == ["register", "heartbeat"]
        _, body, at = controller.told[-1]
        assert at - (body["timestamp"] / 1000 - 1_700_000_000) < 5.1


async def test_a_worker_that_ends_without_being_asked_to_says_so(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        rig._scope.cancel()
        await rig.finished.wait()
        await controller.until(lambda: controller.kinds()[-1] == "deregister", within_s=1)
        assert not controller.members


async def test_a_drain_leaves_first_and_serves_what_is_under_way(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        running = await controller.begin(maxTokens=200)
        await trio.sleep(0.3)
        # Chosen before the controller knows, sent after the worker has left.
        late = Answered(str(uuid.uuid4()))
        rig.stop()
        await controller.until(lambda: controller.kinds()[-1] == "deregister", within_s=0.1)
        assert not controller.members
        await trio.sleep(0.2)
        body = msgspec.json.encode({"requestId": late.request_id, "prompt": "x", "maxTokens": 3})
        await controller.send(MEMBER, late, body)
        with trio.fail_after(30):
            await late.ended.wait()
            await running.ended.wait()
            await rig.finished.wait()
        assert late.last["type"] == "done"
        assert running.last["type"] == "done"
        assert len(running.messages) == 201
        assert controller.kinds().count("deregister") == 1
        assert controller.kinds()[-1] == "deregister"


async def test_a_drain_serves_those_who_wait_for_nobody_asks_again(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster("worker.continuous_batching.max_batch_size=1") as (rig, controller):
        waiting = [await controller.begin(maxTokens=40) for _ in range(6)]
        async with trio.open_nursery() as nursery:
            own: list[str] = []

            async def ask() -> None:
                own.append((await rig.ask(prompt="x", priority="low", max_tokens=5)).code)

            nursery.start_soon(ask)
            await trio.sleep(0.1)
            rig.stop()
        assert own == ["WORKER_DRAINING"]
        with trio.fail_after(30):
            for each in waiting:
                await each.ended.wait()
                assert each.last["type"] == "done"
            await rig.finished.wait()


async def test_what_comes_after_it_has_left_is_refused_and_does_not_hang(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster("worker.drain_timeout_ms=200") as (rig, controller):
        running = await controller.begin(maxTokens=1000)
        await trio.sleep(0.3)
        rig.stop()
        with trio.fail_after(5):
            await running.ended.wait()
            await rig.finished.wait()
        assert running.last["code"] == "WORKER_DRAINING"
        assert "No workers" in running.last["error"]


async def test_who_stops_during_an_outage_leaves_when_that_is_over(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        await controller.begin(maxTokens=300)
        await trio.sleep(0.3)
        rig.broker.disconnect()
        rig.stop()
        await trio.sleep(3)
        assert MEMBER in controller.members
        rig.broker.reconnect()
        await controller.until(lambda: controller.kinds()[-1] == "deregister", within_s=0.1)
        assert not controller.members


async def test_its_requests_are_counted_as_those_of_other_subjects(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (rig, controller):
        await controller.ask(**SHORT)
        inbox = rig.caller.new_inbox()
        answers: list[Message] = []
        await rig.caller.subscribe(inbox, answers.append)
        rig.caller.publish(Message(subject="$SRV.STATS.trio-worker.w1", reply=inbox))
        await trio.sleep(1)
        endpoints = {each["name"]: each for each in decode(answers[0])["endpoints"]}
        assert endpoints["controller"]["subject"] == f"worker.{MEMBER}.inference"
        assert endpoints["controller"]["num_requests"] == 1


async def test_two_stops_cut_the_farewell_short(autojump_clock: trio.abc.Clock) -> None:
    async with cluster() as (rig, controller):
        running = await controller.begin(**LONG)
        await trio.sleep(0.3)
        rig.stop()
        rig.stop()
        stopped_at = trio.current_time()
        with trio.fail_after(5):
            await rig.finished.wait()
        assert trio.current_time() - stopped_at < 0.4
        await running.ended.wait()
        assert running.last["code"] == "WORKER_DRAINING"
        assert controller.kinds()[-1] == "deregister"
        assert rig.snapshot().worker.state == "draining"


async def test_the_last_word_is_heard_by_who_listens_late_in_a_stop(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster(lag_s=0.4) as (rig, controller):
        answers: list[Answered] = []
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                answers.append(await controller.ask(**LONG))

            for _ in range(20):
                nursery.start_soon(ask)
            await trio.sleep(0.1)
            rig.stop()
            rig.stop()
        assert {each.last["code"] for each in answers} == {"WORKER_DRAINING"}
        assert {each.terminals for each in answers} == {1}


async def test_what_has_come_and_is_not_read_is_refused(autojump_clock: trio.abc.Clock) -> None:
    """A worker that is stopped at once leaves nobody waiting."""
    async with cluster(delay_s=0.0) as (rig, controller):
        answers: list[Answered] = []
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                answers.append(await controller.ask(maxTokens=5))

            for _ in range(300):
                nursery.start_soon(ask)
            rig.stop()
            rig.stop()
        assert len(answers) == 300
        assert {each.terminals for each in answers} == {1}


async def test_without_a_controller_nothing_waits(autojump_clock: trio.abc.Clock) -> None:
    async with running_worker(BOTH) as rig:
        await trio.sleep(1)
        rig.stop()
        stopped_at = trio.current_time()
        await rig.finished.wait()
        assert trio.current_time() - stopped_at < 0.3


async def test_its_own_dialect_goes_on_beside_it(autojump_clock: trio.abc.Clock) -> None:
    async with cluster() as (rig, controller):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: controller.ask(**SHORT))
            reply = await rig.ask(prompt="x", max_tokens=3, stream=True)
        assert len(reply.text.split()) == 3


async def test_alone_it_is_the_only_one(autojump_clock: trio.abc.Clock) -> None:
    async with cluster("nats.dialects=[mlx-serving]") as (rig, controller):
        assert (await controller.ask(**SHORT)).last["type"] == "done"
        assert (await rig.ask(prompt="x")).error is not None
        assert rig.snapshot().requests.by_outcome == {"ok": 1}
        inbox = rig.caller.new_inbox()
        answers: list[Message] = []
        await rig.caller.subscribe(inbox, answers.append)
        rig.caller.publish(Message(subject="$SRV.INFO", reply=inbox))
        await trio.sleep(1)
        assert [each.headers["Status"] for each in answers] == ["503"]


async def test_options_that_are_left_out_are_those_of_mlx_servings_worker(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with cluster() as (_, controller):
        answered = await controller.ask(temperature=None)
        assert answered.last["totalTokens"] == 100


async def test_an_engine_that_crashes_costs_no_token(autojump_clock: trio.abc.Clock) -> None:
    async with cluster(faults=Faults(crash=0.05)) as (_, controller):
        answered = await controller.ask(maxTokens=20)
        assert [each["index"] for each in answered.messages[:-1]] == list(range(20))
        assert re.match(r"\A\S", answered.text)


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_each_request_ends_once_and_in_order(
    autojump_clock: trio.abc.Clock, seed: int
) -> None:
    """Crashes, refusals, repetitions, late listeners, and a stop or two at any time."""
    draw = random.Random(seed)
    faults = Faults(crash=0.02, fail_sequence=0.05, slow_turn=0.05)
    narrow = f"worker.request_queue.max_depth={draw.randint(1, 20)}"
    async with cluster(narrow, lag_s=draw.choice([0.0, 0.02, 0.2]), faults=faults) as (
        rig,
        controller,
    ):
        answers: list[Answered] = []

        async def ask(at_s: float, max_tokens: int) -> None:
            await trio.sleep(at_s)
            answered = Answered(str(uuid.uuid4()))
            fields = {"requestId": answered.request_id, "prompt": "x", "maxTokens": max_tokens}
            body = msgspec.json.encode(fields)
            try:
                await controller.send(controller.choose("smollm2-135m-instruct"), answered, body)
            except NoWorkers:
                return
            answers.append(answered)
            if draw.random() < 0.2:
                rig.caller.publish(Message(subject=f"worker.{MEMBER}.inference", body=body))
            with trio.fail_after(40):
                await answered.ended.wait()

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(ask, draw.uniform(0, 3), draw.choice([0, 1, 5, 40]))
            await trio.sleep(draw.uniform(0.5, 4))
            rig.stop()
            if draw.random() < 0.5:
                await trio.sleep(draw.uniform(0, 1))
                rig.stop()
        await trio.sleep(2)
        assert answers
        for each in answers:
            assert each.terminals == 1
            tokens = each.messages[:-1]
            assert [token["index"] for token in tokens] == list(range(len(tokens)))
