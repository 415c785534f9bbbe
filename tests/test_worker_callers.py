"""Several callers at one worker: each has its share, and is who its subject says it is."""

from __future__ import annotations

import json
from functools import partial

import pytest
import trio
from support.worker_rig import Rig, decode, running_worker
from trio.testing import MockClock

from trio_worker.client import Client
from trio_worker.ports import Message

MODEL = "smollm2-135m-instruct"
ONE_SLOT = "worker.continuous_batching.max_batch_size=1"
FLOOD = 1000
ROOM = ("worker.request_queue.max_depth=2000", "worker.requests.timeout_limit_ms=86400000")


async def flood(rig: Rig, count: int, **fields: object) -> list[Message]:
    """Many requests at once, in parts that intake can read; returns the answers, as they come."""
    answers: list[Message] = []
    inbox = rig.caller.new_inbox()
    await rig.caller.subscribe(inbox, answers.append)
    body = {"prompt": "x", "max_tokens": 10, "timeout_ms": 80_000_000, **fields}
    for number in range(count):
        rig.caller.publish(
            Message(subject="inference.w1", body=json.dumps(body).encode(), reply=inbox)
        )
        if number % 100 == 99:
            await trio.sleep(0.01)
    return answers


async def test_one_request_beside_a_flood_waits_for_about_one_and_not_for_the_flood(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(ONE_SLOT, *ROOM) as rig:
        answers = await flood(rig, FLOOD, caller="flood")
        await trio.sleep(2)
        before = len(answers)
        assert 0 < before < 20
        assert (await rig.ask(prompt="x", max_tokens=10, caller="guest")).code == "ok"
        assert len(answers) - before <= 2, "so many of the flood were served meanwhile"
        assert rig.snapshot().queue.depth > FLOOD - 30


async def test_a_caller_who_asks_in_a_row_gets_half_of_the_worker_beside_a_flood(
    autojump_clock: MockClock,
) -> None:
    """Of those who give no name: they are one caller."""
    async with running_worker(ONE_SLOT, *ROOM) as rig:
        answers = await flood(rig, 100)
        before = len(answers)
        for _ in range(30):
            assert (await rig.ask(prompt="x", max_tokens=10, caller="guest")).code == "ok"
        assert 25 <= len(answers) - before <= 35


async def test_two_floods_end_together_whoever_came_first(autojump_clock: MockClock) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=4", *ROOM) as rig:
        ends: dict[str, float] = {}

        async def many(caller: str) -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(60):
                    nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=10, caller=caller))
            ends[caller] = trio.current_time()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for caller in ("first", "second"):
                nursery.start_soon(many, caller)
                await trio.sleep(0.001)
        whole_s = max(ends.values()) - began
        assert abs(ends["first"] - ends["second"]) < 0.1 * whole_s


async def test_a_caller_at_its_bound_is_refused_and_others_are_not(
    autojump_clock: MockClock,
) -> None:
    options = (ONE_SLOT, "worker.request_queue.max_per_caller=3")
    async with running_worker(*options) as rig, trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=500, caller="app-a"))
            await trio.sleep(0.1)
        (refused,) = await rig.raw(b'{"prompt": "x", "caller": "app-a"}')
        assert decode(refused)["error"] == {
            "code": "QUEUE_FULL",
            "message": "Request queue full for caller app-a (3 of 3 places)",
            "retryable": True,
            "retry_after_ms": 1000,
            "details": {"caller": "app-a", "places": 3, "limit": 3},
        }
        assert rig.snapshot().worker.state == "ready"
        nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=500, caller="app-b"))
        for _ in range(3):
            nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=500))
        await trio.sleep(0.1)
        assert rig.snapshot().queue.depth == 7
        (refused,) = await rig.raw(b'{"prompt": "x"}')
        assert decode(refused)["error"]["details"] == {"caller": None, "places": 3, "limit": 3}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("model", [None, MODEL])
async def test_the_subject_says_who_asks_whatever_the_request_says(
    autojump_clock: MockClock, model: str | None
) -> None:
    options = (ONE_SLOT, "worker.request_queue.max_per_caller=1")
    async with running_worker(*options) as rig, trio.open_nursery() as nursery:
        await trio.sleep(1)
        client = Client(rig.caller, attempts=1, timeout_ms=None, caller="app-a")
        fields = {"prompt": "x", "max_tokens": 500, "caller": "app-b", "user": "somebody"}
        if model is not None:
            fields["model"] = model
        for _ in range(2):
            nursery.start_soon(client.complete, fields)
            await trio.sleep(0.1)
        (refused,) = await rig.raw(json.dumps(fields).encode(), subject="inference.by.app-a")
        assert decode(refused)["error"]["details"]["caller"] == "app-a"
        assert (await rig.ask(prompt="x", max_tokens=1, caller="app-b")).code == "ok"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("token", ["a+b", "x" * 65, "größe"])
async def test_a_subject_that_names_no_caller_is_an_error_that_says_so(
    autojump_clock: MockClock, token: str
) -> None:
    async with running_worker() as rig:
        await trio.sleep(1)
        (refused,) = await rig.raw(b'{"prompt": "x"}', subject=f"inference.by.{token}")
        error = decode(refused)["error"]
        assert error["code"] == "INVALID_REQUEST"
        assert token in error["message"]
        assert error["details"] == {"subject": f"inference.by.{token}"}
        assert rig.snapshot().requests.by_outcome == {"INVALID_REQUEST": 1}


async def test_a_model_that_is_served_elsewhere_is_refused_on_the_subject_for_any(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        await trio.sleep(1)
        body = b'{"prompt": "x", "model": "another"}'
        (refused,) = await rig.raw(body, subject="inference.by.app-a")
        assert decode(refused)["error"]["code"] == "MODEL_NOT_FOUND"


async def test_a_certain_worker_is_told_the_caller_in_the_request(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(ONE_SLOT, "worker.request_queue.max_per_caller=1") as rig:
        client = Client(rig.caller, attempts=1, timeout_ms=None, caller="app-a")
        async with trio.open_nursery() as nursery:
            fields = {"prompt": "x", "max_tokens": 500}
            for _ in range(2):
                nursery.start_soon(partial(client.complete, fields, worker_id="w1"))
                await trio.sleep(0.1)
            refused = await rig.ask(prompt="x", caller="app-a")
            assert refused.code == "QUEUE_FULL"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("caller", ["", "a.b", "a b", "*", "x" * 65])
async def test_a_client_takes_no_name_that_is_none(autojump_clock: MockClock, caller: str) -> None:
    async with running_worker() as rig:
        with pytest.raises(ValueError, match="no caller's name"):
            Client(rig.caller, caller=caller)
