"""Intake: what is let in, what is refused unread, and when which subjects are listened to."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from support.worker_rig import WORKER_ID, Rig, decode, running_worker
from trio.testing import MockClock

from trio_worker.ports import Message
from trio_worker.simulated.broker import MemorySubscription

BUFFER = 256
TOGETHER_MAX = 16
DRAIN_S = 0.5
DIRECT = f"inference.{WORKER_ID}"
SHARED = {
    *("inference", "inference.model.smollm2-135m-instruct"),
    *("inference.by.*", "inference.by.*.model.smollm2-135m-instruct"),
}


def listening(rig: Rig) -> set[str]:
    """The subjects of requests that the worker listens to."""
    return {
        each._pattern
        for each in rig.server._subscriptions
        if each.broker is not rig.caller and each._pattern.startswith("inference")
    } - {f"{DIRECT}.ctl.*", f"{DIRECT}.fwd.*", "inference.cancel"}


async def answers(rig: Rig, bodies: list[bytes], subject: str = DIRECT) -> list[Any]:
    """Send all of these at once; returns the terminal message of each."""
    replies: list[Message | None] = [None] * len(bodies)

    def take(index: int, message: Message) -> None:
        if "Terminal" in message.headers:
            assert replies[index] is None
            replies[index] = message

    inboxes = [rig.caller.new_inbox() for _ in bodies]
    for index, inbox in enumerate(inboxes):
        await rig.caller.subscribe(inbox, partial(take, index))
    for inbox, body in zip(inboxes, bodies, strict=True):
        rig.caller.publish(Message(subject=subject, body=body, reply=inbox))
    await trio.sleep(60)
    return replies


def request(**fields: Any) -> bytes:
    return msgspec.json.encode({"prompt": "x", "max_tokens": 1, "timeout_ms": 600_000, **fields})


async def test_more_than_intake_can_read_is_refused_at_once_and_the_rest_is_served(
    autojump_clock: MockClock,
) -> None:
    extra = 30
    async with running_worker("worker.request_queue.max_depth=1000") as rig:
        got = await answers(rig, [request() for _ in range(BUFFER + extra)])
        refused = [decode(each)["error"] for each in got if each.headers["Terminal"] == "error"]
        # So many may be taken while the first are being read.
        assert extra - TOGETHER_MAX - 1 <= len(refused) <= extra
        assert {each["code"] for each in refused} == {"QUEUE_FULL"}
        assert {each["message"] for each in refused} == {
            "more requests arrive than this worker can read"
        }
        assert all(re.fullmatch("[0-9a-f]{32}", each.headers["Request-Id"]) for each in got)
        assert len({each.headers["Request-Id"] for each in got}) == len(got)
        assert rig.snapshot().requests.by_outcome == {
            "ok": len(got) - len(refused),
            "QUEUE_FULL": len(refused),
        }


async def test_messages_with_nowhere_to_answer_are_counted_and_not_run(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        for reply in (None, "elsewhere", "inference.w1", "_INBOX.*", "_INBOX.>"):
            rig.caller.publish(Message(subject=DIRECT, body=request(), reply=reply))
        await trio.sleep(5)
        assert rig.snapshot().requests.dropped == 5
        assert rig.snapshot().requests.by_outcome == {}
        assert rig.snapshot().batch.turns == 0


async def test_more_than_intake_can_read_with_nowhere_to_answer_is_dropped_too(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        for _ in range(BUFFER + 40):
            rig.caller.publish(Message(subject=DIRECT, body=request()))
        await trio.sleep(5)
        assert rig.snapshot().requests.dropped == BUFFER + 40
        assert rig.snapshot().requests.by_outcome == {}
        assert (await rig.ask(prompt="x", max_tokens=1)).code == "ok"


async def test_each_subscription_is_drained_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained: list[str] = []
    real = MemorySubscription.drain

    async def noting(self: MemorySubscription) -> None:
        drained.append(self._pattern)
        await real(self)

    monkeypatch.setattr(MemorySubscription, "drain", noting)
    async with running_worker(
        "worker.request_queue.max_depth=4", "worker.continuous_batching.max_batch_size=1"
    ) as rig:
        await trio.sleep(0.1)  # it joins the group when it is ready, subject by subject
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=100))
            await trio.sleep(1)
            assert sorted(each for each in drained if each.startswith("inference")) == sorted(
                SHARED
            )
        await trio.sleep(60)
        drained.clear()
        rig.stop()
        await rig.finished.wait()
    assert sorted(drained) == sorted({DIRECT} | SHARED)


async def test_the_time_runs_from_arrival_and_seeds_and_ids_are_drawn_where_none_are_sent(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        notes = [
            decode(each)["worker"]
            for each in await answers(rig, [request(), request(), request(seed=0), request(seed=5)])
        ]
        assert [note["seed"] for note in notes[2:]] == [0, 5]
        drawn = [note["seed"] for note in notes[:2]]
        assert drawn[0] != drawn[1]
        assert all(0 <= seed < 2**53 for seed in drawn)
        assert len({note["request_id"] for note in notes}) == 4
        began_at = trio.current_time()
        late = await rig.ask(prompt="x", max_tokens=4000, timeout_ms=1500)
        assert late.code == "REQUEST_TIMEOUT"
        assert trio.current_time() - began_at == pytest.approx(1.5, abs=0.01)


async def test_the_group_is_left_while_the_door_is_shut_and_joined_again(
    autojump_clock: MockClock,
) -> None:
    async with (
        running_worker(
            "worker.request_queue.max_depth=4", "worker.continuous_batching.max_batch_size=1"
        ) as rig,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(1)
        assert listening(rig) == {DIRECT} | SHARED
        for _ in range(5):
            nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=100, timeout_ms=600_000))
        await trio.sleep(1)
        assert listening(rig) == {DIRECT}
        await trio.sleep(60)
        assert listening(rig) == {DIRECT} | SHARED


async def test_groups_share_and_the_worker_s_own_subject_does_not(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        await trio.sleep(1)
        groups = {
            each._pattern: each.group
            for each in rig.server._subscriptions
            if each.broker is not rig.caller
        }
        assert groups[DIRECT] is None
        assert {groups[subject] for subject in SHARED} == {"trio-workers"}


async def test_a_subscription_that_does_not_drain_holds_a_stop_up_for_half_a_second_only(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_self: MemorySubscription) -> None:
        await trio.sleep_forever()

    async with running_worker() as rig:
        monkeypatch.setattr(MemorySubscription, "drain", never)
        began_at = trio.current_time()
        rig.stop()
        await rig.finished.wait()
        assert trio.current_time() - began_at == pytest.approx(DRAIN_S, abs=0.2)
        monkeypatch.undo()
        rig.server._subscriptions.clear()


async def test_what_a_subscription_still_brings_after_the_drain_is_refused(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_self: MemorySubscription) -> None:
        await trio.sleep_forever()

    async with running_worker() as rig, trio.open_nursery() as nursery:
        nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=500))
        await trio.sleep(1)
        monkeypatch.setattr(MemorySubscription, "drain", never)
        rig.stop()
        await trio.sleep(2)
        late = await rig.ask(prompt="x", max_tokens=1)
        assert late.error is not None
        assert (late.code, late.error.retryable) == ("WORKER_DRAINING", True)
        assert late.error.message == "this worker is shutting down; ask another one"
        await rig.finished.wait()
        monkeypatch.undo()
        rig.server._subscriptions.clear()
