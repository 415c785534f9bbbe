"""The worker as a NATS micro service: what `nats micro` is told, and that it is true."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import running_command
from support.raw_nats import raw_requests
from support.worker_rig import WORKER_ID, Rig, running_worker
from trio.testing import MockClock

from trio_worker import __version__
from trio_worker.client import open_client
from trio_worker.monitoring.observed_worker import ObservedWorker
from trio_worker.monitoring.recent import FRESH_S
from trio_worker.ports import Message

SEMVER = re.compile(r"\A\d+\.\d+\.\d+\Z")


async def ask_service(rig: Rig, subject: str, *, inbox: str | None = None) -> list[Any]:
    """Everything that is answered within a second of virtual time."""
    answers: list[Any] = []
    inbox = inbox or rig.caller.new_inbox()
    subscription = await rig.caller.subscribe(
        inbox, lambda message: answers.append(json.loads(message.body))
    )
    rig.caller.publish(Message(subject=subject, reply=inbox))
    await trio.sleep(1)
    await subscription.drain()
    return answers


@pytest.mark.parametrize("suffix", ["", ".trio-worker", f".trio-worker.{WORKER_ID}"])
@pytest.mark.parametrize("verb", ["ping", "info", "stats"])
async def test_each_question_is_answered_once_by_whatever_subject(
    autojump_clock: MockClock, verb: str, suffix: str
) -> None:
    async with running_worker() as rig:
        (answer,) = await ask_service(rig, f"$SRV.{verb.upper()}{suffix}")
    assert answer["type"] == f"io.nats.micro.v1.{verb}_response"
    assert (answer["name"], answer["id"]) == ("trio-worker", WORKER_ID)
    assert SEMVER.match(answer["version"])
    assert answer["metadata"]["model"] == "smollm2-135m-instruct"
    assert answer["metadata"]["context_length"] == "8192"
    assert all(isinstance(value, str) for value in answer["metadata"].values())


DIRECT = {"name": "worker", "subject": f"inference.{WORKER_ID}", "queue_group": ""}
FLEET = {"name": "fleet", "subject": "inference", "queue_group": "trio-workers"}
MODEL = {"name": "model", "subject": "inference.model.m", "queue_group": "trio-workers"}
BY_CALLER = (
    FLEET | {"name": "fleet-by-caller", "subject": "inference.by.*"},
    MODEL | {"name": "model-by-caller", "subject": "inference.by.*.model.m"},
)
LIMITS = (
    "worker.continuous_batching.max_batch_size=3",
    "worker.request_queue.max_depth=5",
    "worker.request_queue.priority_levels=4",
    "worker.requests.max_tokens_limit=6000",
    "worker.requests.max_prompt_bytes=7000",
    "worker.requests.timeout_limit_ms=800000",
    "worker.resource_limits.max_memory_mb=900",
    "worker.resource_limits.critical_memory_mb=1000",
)


@pytest.mark.parametrize("enabled", [True, False])
async def test_info_says_where_requests_go_and_what_the_worker_takes(
    autojump_clock: MockClock,
    enabled: bool,  # noqa: FBT001
) -> None:
    switches = (
        f"worker.continuous_batching.enabled={str(enabled).lower()}",
        f"worker.request_queue.enabled={str(enabled).lower()}",
    )
    async with running_worker("worker.model_name=m", *LIMITS, *switches) as rig:
        (info,) = await ask_service(rig, "$SRV.INFO")
    assert info == {
        "type": "io.nats.micro.v1.info_response",
        "name": "trio-worker",
        "id": WORKER_ID,
        "version": __version__,
        "metadata": {
            "worker_id": WORKER_ID,
            "model": "m",
            "context_length": "8192",
            "device": "simulated",
            "max_batch_size": "3" if enabled else "1",
            "max_queue_depth": "5" if enabled else "0",
            "priority_levels": "4",
            "max_tokens_limit": "6000",
            "max_prompt_bytes": "7000",
            "timeout_limit_ms": "800000",
            "max_memory_mb": "900",
            "critical_memory_mb": "1000",
        },
        "description": "Serves a language model to callers on NATS.",
        "endpoints": [each | {"metadata": {}} for each in (DIRECT, FLEET, MODEL, *BY_CALLER)],
    }


async def test_stats_are_of_the_same_endpoints_from_the_same_start(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.model_name=m") as rig:
        (stats,) = await ask_service(rig, "$SRV.STATS")
        asked = await rig.ask(prompt="x", max_tokens=1)
        (later,) = await ask_service(rig, "$SRV.STATS")
    none_yet = {
        "num_requests": 0,
        "num_errors": 0,
        "last_error": "",
        "processing_time": 0,
        "average_processing_time": 0,
    }
    assert asked.code == "ok"
    own, *shared = stats["endpoints"]
    assert own.pop("data")["requests"]["completed"] == 0
    assert [own, *shared] == [
        DIRECT | none_yet,
        FLEET | none_yet | {"data": None},
        MODEL | none_yet | {"data": None},
        *(each | none_yet | {"data": None} for each in BY_CALLER),
    ]
    assert stats["started"] == later["started"] == "2023-11-14T22:13:20Z"
    one_turn_ns = 20_050_000
    assert later["endpoints"][0]["processing_time"] == one_turn_ns
    assert later["endpoints"][0]["average_processing_time"] == one_turn_ns


async def test_however_many_ask_a_snapshot_is_computed_ten_times_a_second_at_most(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[float] = []
    snapshot = ObservedWorker.snapshot

    def counting(self: ObservedWorker) -> Any:
        computed.append(trio.current_time())
        return snapshot(self)

    monkeypatch.setattr(ObservedWorker, "snapshot", counting)
    async with running_worker("worker.monitoring.report_interval_ms=600000") as rig:
        answers: list[Message] = []
        inbox = rig.caller.new_inbox()
        await rig.caller.subscribe(inbox, answers.append)
        computed.clear()
        # Each millisecond, for half a second, by all three subjects.
        for _ in range(500):
            for suffix in ("", ".trio-worker", f".trio-worker.{WORKER_ID}"):
                rig.caller.publish(Message(subject=f"$SRV.STATS{suffix}", reply=inbox))
            await trio.sleep(0.001)
        await trio.sleep(1)
        assert len(answers) == 1500
        assert len(computed) == 5
        assert all(later - earlier > FRESH_S for earlier, later in pairwise(computed))
        rig.caller.publish(Message(subject="$SRV.STATS", reply=inbox))
        await trio.sleep(1)
        assert len(computed) == 6


async def test_counts_are_those_of_each_subject(autojump_clock: MockClock) -> None:
    async with running_worker("worker.simulated.turn_ms=10", "worker.model_name=m") as rig:
        for _ in range(3):
            assert (await rig.ask(prompt="a", max_tokens=4)).code == "ok"
        assert (await rig.ask(prompt="a", max_tokens=0)).code == "INVALID_REQUEST"
        async with rig.client.ask({"prompt": "a", "max_tokens": 4}) as answer:
            await answer.text()
        for caller in ("app-a", "app-b"):
            await rig.raw(b'{"prompt": "a", "max_tokens": 1}', subject=f"inference.by.{caller}")
        (stats,) = await ask_service(rig, "$SRV.STATS.trio-worker")
        own, fleet, model, by_caller, _ = stats["endpoints"]
        assert (own["num_requests"], own["num_errors"]) == (4, 1)
        assert own["last_error"] == "400:INVALID_REQUEST"
        assert own["processing_time"] >= 3 * 4 * 10_000_000
        assert own["average_processing_time"] == own["processing_time"] // 4
        assert (fleet["num_requests"], fleet["num_errors"], fleet["last_error"]) == (1, 0, "")
        assert (model["num_requests"], model["average_processing_time"]) == (0, 0)
        assert (by_caller["num_requests"], by_caller["num_errors"]) == (2, 0)
        assert own["data"]["requests"]["completed"] == 6
        assert own["data"]["tokens"]["generated"] == 18
        assert fleet["data"] is None


async def test_an_answer_may_not_be_aimed_at_any_subject(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        assert await ask_service(rig, "$SRV.STATS", inbox="inference.other") == []
        assert len(await ask_service(rig, "$SRV.STATS")) == 1


async def test_the_snapshot_is_left_out_where_the_server_would_not_take_it(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(max_payload=2048) as rig:
        (stats,) = await ask_service(rig, "$SRV.STATS")
    assert stats["endpoints"][0]["data"] is None


async def test_prompts_and_answers_are_no_part_of_it(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, trio.open_nursery() as nursery:
        nursery.start_soon(partial(rig.ask, prompt="Geheimnis " * 9, max_tokens=500))
        nursery.start_soon(partial(rig.ask, prompt="x", Geheimnis=1))
        await trio.sleep(0.5)
        for verb in ("PING", "INFO", "STATS"):
            (answer,) = await ask_service(rig, f"$SRV.{verb}")
            assert "Geheimnis" not in json.dumps(answer)
        nursery.cancel_scope.cancel()


@pytest.mark.nats
async def test_any_nats_client_gets_the_answers_of_a_real_worker(tmp_path: Path) -> None:
    async with running_command(tmp_path, "--engine", "simulated") as worker:
        await worker.wait_ready()
        async with open_client(worker.url) as client:
            for _ in range(5):
                async with client.ask({"prompt": "a", "max_tokens": 3}, worker_id="w1") as answer:
                    await answer.text()
        ping, info, stats = await raw_requests(
            worker.url, "$SRV.PING", "$SRV.INFO.trio-worker", "$SRV.STATS.trio-worker.w1"
        )
    assert ping["id"] == info["id"] == stats["id"] == "w1"
    assert info["endpoints"][0]["subject"] == "inference.w1"
    assert stats["endpoints"][0]["num_requests"] == 5
    assert stats["endpoints"][0]["num_errors"] == 0
    assert 0 < stats["endpoints"][0]["average_processing_time"] < 10e9
    assert stats["endpoints"][0]["data"]["requests"]["completed"] == 5
