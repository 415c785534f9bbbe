"""The whole worker on its real parts: nats-server, the engine process, a model."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from support.commands import RunningCommand, alive, command, running_command, until
from support.tiny_model import write_tiny_model

from trio_worker.client import Client, open_client
from trio_worker.errors import WorkerError

pytestmark = [pytest.mark.nats, pytest.mark.mlx]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


async def answers(
    client: Client, requests: list[dict[str, Any]], *, begun: trio.Event | None = None
) -> list[dict[str, Any]]:
    """Ask at the same time; each answer's text, usage and note, or its error's code."""
    results: dict[int, dict[str, Any]] = {}

    async def one(index: int, request: dict[str, Any]) -> None:
        text = ""
        try:
            async with client.ask({"stream": True, **request}, worker_id="w1") as answer:
                async for chunk in answer:
                    text += chunk.text
                    if text and begun is not None:
                        begun.set()
            results[index] = {"text": text, "usage": chunk.usage, "worker": chunk.worker}
        except WorkerError as error:
            results[index] = {"code": error.code}

    async with trio.open_nursery() as nursery:
        for index, request in enumerate(requests):
            nursery.start_soon(one, index, request)
    return [results[index] for index in range(len(requests))]


async def within(wait: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(30):
        await wait()


async def _listens(worker: RunningCommand) -> bool:
    return (await worker.get("/readyz"))[0] != 0


async def _gone(processes: list[psutil.Process]) -> bool:
    return not alive(processes)


def requests_of(count: int, *, max_tokens: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": "abc" * (index + 1),
            "max_tokens": max_tokens,
            "seed": index,
            "temperature": 1.0 if index % 2 else 0.0,
        }
        for index in range(count)
    ]


async def test_eight_at_a_time_decode_in_one_batch_and_say_what_each_says_alone(
    tmp_path: Path, tiny: str
) -> None:
    requests = requests_of(8, max_tokens=20)
    async with running_command(tmp_path, "--set", f"worker.model={tiny}") as worker:
        await worker.wait_ready()
        async with open_client(worker.url, attempts=1) as client:
            together = await answers(client, requests)
            alone = [(await answers(client, [request]))[0] for request in requests]
        stats = await worker.stats()
    assert [each["text"] for each in together] == [each["text"] for each in alone]
    assert stats["batch"]["max_batch_seen"] == 8
    assert stats["engine"]["device"].startswith("cpu")


async def test_each_choice_says_what_its_seed_says_alone(tmp_path: Path, tiny: str) -> None:
    request = {"prompt": "abc" * 9, "max_tokens": 20, "temperature": 1.0, "seed": 5}
    async with running_command(tmp_path, "--set", f"worker.model={tiny}") as worker:
        await worker.wait_ready()
        async with open_client(worker.url, attempts=1) as client:
            together = await client.complete({**request, "n": 4})
            alone = await answers(client, [{**request, "seed": 5 + each} for each in range(4)])
        stats = await worker.stats()
    texts = [choice["text"] for choice in together.body["choices"]]
    assert texts == [each["text"] for each in alone]
    assert len(set(texts)) > 1
    assert stats["batch"]["max_batch_seen"] == 4


LIST: dict[str, Any] = {
    "type": "array",
    "items": {"enum": ["red", "green", {"deep": [1, 2]}]},
    "minItems": 100,
}
HELD: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "l", "schema": LIST}}
}
"""To a schema that an answer of 400 tokens does not come to the end of."""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_death_of_the_engine_costs_a_pause_and_no_character(
    tmp_path: Path, tiny: str, how: signal.Signals
) -> None:
    requests = requests_of(6, max_tokens=150)
    requests[3:] = [{**request, **HELD} for request in requests[3:]]
    async with running_command(
        tmp_path,
        *("--set", f"worker.model={tiny}"),
        *("--set", "worker.continuous_batching.turn_timeout_ms=1500"),
    ) as worker:
        await worker.wait_ready()
        async with open_client(worker.url, attempts=1) as client:
            undisturbed = await answers(client, requests)
            async with trio.open_nursery() as nursery:
                begun = trio.Event()
                disturbed: list[dict[str, Any]] = []

                async def ask() -> None:
                    disturbed.extend(await answers(client, requests, begun=begun))

                nursery.start_soon(ask)
                await within(begun.wait)
                worker.child("trio_worker.engine").send_signal(how)
            (after,) = await answers(client, [{"prompt": "next", "max_tokens": 3}])
        stats = await worker.stats()
    assert [each["text"] for each in disturbed] == [each["text"] for each in undisturbed]
    assert sum(each["worker"]["resumed"] for each in disturbed) >= 1
    assert stats["engine"]["restarts"] == 1
    assert after["usage"]["completion_tokens"] <= 3


@pytest.mark.thorough
async def test_a_death_at_every_tenth_token_changes_nothing_of_an_answer_that_keeps_to_a_schema(
    tmp_path: Path, tiny: str
) -> None:
    # So long that the engine is far from its end when it is killed.
    request = {**requests_of(2, max_tokens=400)[1], **HELD, "stream": True}
    async with running_command(
        tmp_path,
        *("--set", f"worker.model={tiny}"),
        *("--set", "worker.engine.max_restarts=100"),
    ) as worker:
        await worker.wait_ready()
        async with open_client(worker.url, attempts=1) as client:
            (undisturbed,) = await answers(client, [request])
            for cut in range(10, 150, 10):
                pieces: list[str] = []
                async with client.ask(request) as answer:
                    async for chunk in answer:
                        if chunk.text:
                            pieces.append(chunk.text)
                            if len(pieces) == cut:
                                worker.child("trio_worker.engine").kill()
                assert "".join(pieces) == undisturbed["text"], f"killed after {cut}"
                assert chunk.worker is not None
                assert chunk.worker["resumed"] == 1


async def test_a_preempted_request_says_what_it_would_have_said(tmp_path: Path, tiny: str) -> None:
    low = {
        "prompt": "abc" * 20,
        "max_tokens": 400,
        "seed": 3,
        "temperature": 1.0,
        "priority": "low",
    }
    high = {"prompt": "now", "max_tokens": 5, "priority": "high"}
    async with running_command(
        tmp_path,
        *("--set", f"worker.model={tiny}"),
        *("--set", "worker.continuous_batching.max_batch_size=1"),
    ) as worker:
        await worker.wait_ready()
        async with open_client(worker.url, attempts=1) as client:
            (undisturbed,) = await answers(client, [low])
            async with trio.open_nursery() as nursery:
                begun = trio.Event()
                disturbed: list[dict[str, Any]] = []

                async def ask() -> None:
                    disturbed.extend(await answers(client, [low], begun=begun))

                nursery.start_soon(ask)
                await within(begun.wait)
                (urgent,) = await answers(client, [high])
        stats = await worker.stats()
    assert disturbed[0]["text"] == undisturbed["text"]
    assert urgent["usage"]["completion_tokens"] <= 5
    assert stats["batch"]["preemptions"] == 1


async def test_a_stop_while_the_model_loads_leaves_nothing(tmp_path: Path, tiny: str) -> None:
    async with running_command(tmp_path, "--set", f"worker.model={tiny}") as worker:
        await until(partial(_listens, worker), within_s=20)
        assert (await worker.get("/readyz"))[1].startswith("loading")
        family = worker.children()
        assert family
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait_exit(3) == 0
    assert not alive(family)


async def test_a_stop_is_bounded_when_the_engine_hangs(tmp_path: Path, tiny: str) -> None:
    async with running_command(
        tmp_path,
        *("--set", f"worker.model={tiny}", "--set", "worker.drain_timeout_ms=500"),
    ) as worker:
        await worker.wait_ready()
        family = worker.children()
        async with open_client(worker.url, attempts=1) as client, trio.open_nursery() as nursery:
            begun = trio.Event()
            results: list[dict[str, Any]] = []

            async def ask() -> None:
                requests = requests_of(3, max_tokens=400)
                results.extend(await answers(client, requests, begun=begun))

            nursery.start_soon(ask)
            await within(begun.wait)
            worker.child("trio_worker.engine").send_signal(signal.SIGSTOP)
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(4) == 0
            nursery.cancel_scope.deadline = trio.current_time() + 2
    assert not alive(family)
    assert {each["code"] for each in results} == {"WORKER_DRAINING"}


async def test_a_killed_worker_leaves_no_engine_and_no_server(tmp_path: Path, tiny: str) -> None:
    async with running_command(tmp_path, "--set", f"worker.model={tiny}") as worker:
        await worker.wait_ready()
        family = worker.children()
        worker.process.kill()
        await worker.wait_exit(5)
        await until(partial(_gone, family), within_s=5)


async def test_a_model_that_cannot_be_loaded_is_a_configuration_error(tmp_path: Path) -> None:
    outcome = await command(
        *("run", "--set", f"worker.model={tmp_path}/nothing", "--set", "worker.id=w1"),
        *("--set", "worker.monitoring.port=0", "--set", "nats.url=nats://127.0.0.1:4399"),
    )
    assert outcome.returncode == 78
    assert b"nothing" in outcome.stderr


async def test_a_tight_limit_holds_requests_back_and_memory_stays_below_it(tmp_path: Path) -> None:
    """The demo model's cache takes 45 kB a token; each of these may need 23 MB in the end."""
    requests: list[dict[str, Any]] = [
        {"prompt": f"Here are {index} reasons to like bread", "max_tokens": 400, "stop": "."}
        for index in range(12)
    ]
    room_mb = 160
    async with running_command(tmp_path) as worker:
        await worker.wait_ready()
        base_mb = (await worker.stats())["resources"]["memory_mb"]
        async with open_client(worker.url, attempts=1) as client:
            undisturbed = await answers(client, requests[:4])
    async with running_command(
        tmp_path,
        *("--set", f"worker.resource_limits.max_memory_mb={int(base_mb) + room_mb // 2}"),
        *("--set", f"worker.resource_limits.critical_memory_mb={int(base_mb) + room_mb}"),
        *("--set", "worker.resource_limits.check_interval_ms=100"),
        *("--set", "worker.continuous_batching.max_batch_size=12"),
    ) as worker:
        await worker.wait_ready()
        peak_mb = 0.0
        async with open_client(worker.url, attempts=1) as client, trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal peak_mb
                while True:
                    peak_mb = max(peak_mb, (await worker.stats())["resources"]["memory_mb"])
                    await trio.sleep(0.1)

            nursery.start_soon(watch)
            limited = await answers(client, requests)
            (never,) = await answers(client, [{"prompt": "x", "max_tokens": 4096}])
            nursery.cancel_scope.cancel()
        stats = await worker.stats()
    assert [each.get("code") for each in limited] == [None] * 12
    assert [each["text"] for each in limited[:4]] == [each["text"] for each in undisturbed]
    assert stats["batch"]["max_batch_seen"] < 12
    assert peak_mb < base_mb + room_mb
    assert never["code"] == "RESOURCE_LIMIT_EXCEEDED"


async def test_the_demo_model_knows_the_capital_of_france(tmp_path: Path) -> None:
    async with running_command(tmp_path, "--hello") as worker:
        await worker.wait_ready()
        async with open_client(worker.url, attempts=1) as client:
            (answer,) = await answers(
                client,
                [{"messages": [{"role": "user", "content": "What is the capital of France?"}]}],
            )
        assert isinstance(worker, RunningCommand)
    assert "Paris" in answer["text"]
    assert answer["worker"]["resumed"] == 0
    assert "The capital of France is Paris" in worker.log.read_text()
