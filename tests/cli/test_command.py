"""`trio-worker` as a person meets it: real processes, a real nats-server, the simulated engine."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from support.commands import (
    BAD_OVERRIDE,
    RunningCommand,
    alive,
    assert_every_problem_is_said,
    bad_configuration,
    command,
    running_command,
    until,
)
from support.ports import free_port

from trio_worker.client import Client, open_client
from trio_worker.errors import WorkerError

pytestmark = pytest.mark.nats

SIMULATED = ("--engine", "simulated")


async def ask_many(worker: RunningCommand, count: int, **fields: object) -> list[str]:
    """Ask at the same time over one connection; returns the outcomes."""
    outcomes: list[str] = []

    async def one(client: Client) -> None:
        try:
            async with client.ask({"prompt": "x", **fields}, worker_id="w1") as answer:
                sequences = [int(chunk.headers["Sequence"]) async for chunk in answer]
            assert sequences == list(range(len(sequences)))
            outcomes.append("ok")
        except WorkerError as error:
            outcomes.append(error.code)

    async with (
        open_client(worker.url, timeout_ms=None, attempts=1) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(count):
            nursery.start_soon(one, client)
    return outcomes


async def test_sixty_four_streams_over_real_nats_each_end_once_and_in_order(
    tmp_path: Path,
) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        outcomes = await ask_many(worker, 64, stream=True, max_tokens=20)
        assert outcomes == ["ok"] * 64
        stats = await worker.stats()
        assert stats["requests"]["completed"] == 64
        assert stats["requests"]["in_flight"] == 0
        assert stats["batch"]["max_batch_seen"] == 8
        assert stats["nats"]["connected"]


async def test_run_starts_nats_says_hello_and_ends_with_everything_it_started(
    tmp_path: Path,
) -> None:
    async with running_command(tmp_path, *SIMULATED, "--hello") as worker:
        await worker.wait_ready()
        assert worker.child("nats-server").is_running()
        assert (await worker.get("/livez"))[0] == 200
        assert json.loads((await worker.get("/healthz"))[1])
        answer = await command("ask", "hello", "--url", worker.url, "--max-tokens", "3")
        assert answer.returncode == 0, answer.stderr
        assert len(answer.stdout.decode().splitlines()[0].split()) == 3

        async def hello_was_said() -> bool:
            log = worker.log.read_text()
            return "What is the capital of France?" in log and "Ask from another" in log

        await until(hello_was_said, within_s=10)


async def test_ask_streams_json_and_shows_errors_with_code_and_message(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        whole = await command(
            *("ask", "hi", "--url", worker.url, "--json", "--no-stream", "--max-tokens", "2"),
            *("--seed", "5", "--priority", "low", "--worker", "w1"),
        )
        (line,) = whole.stdout.decode().splitlines()
        assert json.loads(line)["worker"]["seed"] == 5
        assert json.loads(line)["worker"]["priority"] == "low"
        bad = await command("ask", "hi", "--url", worker.url, "--max-tokens", "0")
    assert bad.returncode == 1
    assert bad.stderr.decode().startswith("INVALID_REQUEST: max_tokens")


async def test_ctrl_c_on_ask_cancels_the_request_at_the_worker(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False),
                [
                    *(sys.executable, "-m", "trio_worker", "ask", "hi", "--url", worker.url),
                    *("--max-tokens", "4000", "--timeout", "60", "--no-stream"),
                ],
            )
            await worker.until_stats(lambda stats: stats["requests"]["in_flight"], within_s=20)
            process.send_signal(signal.SIGINT)
            with trio.fail_after(5):
                assert await process.wait() == 130
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=2)
        assert (await worker.stats())["requests"]["by_outcome"] == {"CANCELLED": 1}


async def test_ask_without_a_worker_says_so(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        nobody = await command(
            "ask", "hi", "--url", worker.url, "--worker", "nobody", "--timeout", "0.5"
        )
    assert nobody.returncode == 69
    assert b"No worker answered" in nobody.stderr
    assert b"nobody listens on inference.nobody" in nobody.stderr
    no_server = await command(
        "ask", "hi", "--url", f"nats://127.0.0.1:{free_port()}", "--timeout", "0.5"
    )
    assert no_server.returncode == 69
    assert b"NATS could not be reached" in no_server.stderr


async def test_a_second_worker_with_the_same_id_is_refused(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        async with running_command(tmp_path, *SIMULATED, url=worker.url) as second:
            assert await second.wait_exit(20) == 78
        assert "w1" in second.log.read_text()


async def test_a_taken_monitoring_port_is_a_configuration_error(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        port = worker.monitoring.rpartition(":")[2]
        second = await command(
            *("run", *SIMULATED, "--set", f"nats.url={worker.url}", "--set", "worker.id=w2"),
            *("--set", f"worker.monitoring.port={port}"),
        )
    assert second.returncode == 78
    assert b"monitoring.port" in second.stderr


async def test_nats_out_of_reach_ends_run_with_unavailable() -> None:
    outcome = await command(
        *("run", *SIMULATED, "--set", f"nats.url=nats://127.0.0.1:{free_port()}"),
        *("--set", "nats.embedded=never", "--set", "nats.connect_timeout_ms=500"),
        *("--set", "worker.monitoring.port=0"),
    )
    assert outcome.returncode == 69
    assert b"127.0.0.1" in outcome.stderr


async def test_a_bad_configuration_ends_run_before_it_starts_anything(tmp_path: Path) -> None:
    outcome = await command("run", "--config", str(bad_configuration(tmp_path)), *BAD_OVERRIDE)
    assert outcome.returncode == 78
    assert_every_problem_is_said(outcome.stderr.decode())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_running_requests_finish_and_the_status_is_zero(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with running_command(
        tmp_path, *SIMULATED, "--set", "worker.continuous_batching.max_batch_size=4"
    ) as worker:
        await worker.wait_ready()
        async with trio.open_nursery() as nursery:
            outcomes: list[str] = []

            async def ask() -> None:
                outcomes.extend(await ask_many(worker, 10, max_tokens=100))

            nursery.start_soon(ask)
            await worker.until_stats(
                lambda stats: stats["batch"]["running"] == 4 and stats["batch"]["turns"] > 5,
                within_s=10,
            )
            family = worker.children()
            worker.process.send_signal(number)
            assert await worker.wait_exit(20) == 0
    assert sorted(outcomes) == ["WORKER_DRAINING"] * 6 + ["ok"] * 4
    assert family
    assert not alive(family)


async def test_a_second_signal_cuts_the_drain_short(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED) as worker:
        await worker.wait_ready()
        async with trio.open_nursery() as nursery:
            outcomes: list[str] = []

            async def ask() -> None:
                outcomes.extend(await ask_many(worker, 3, max_tokens=4000))

            nursery.start_soon(ask)
            await worker.until_stats(lambda stats: stats["batch"]["running"] == 3, within_s=10)
            worker.process.send_signal(signal.SIGTERM)
            await worker.until_stats(
                lambda stats: stats["worker"]["state"] == "draining", within_s=5
            )
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(2) == 0
    assert outcomes == ["WORKER_DRAINING"] * 3
