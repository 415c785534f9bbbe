"""Durable jobs on a real nats-server, in workers that are processes, and what happens to both."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.commands import RunningCommand, running_command, until
from support.jobs_rig import JOBS_ON, JobsCaller, jobs_caller
from support.nats_fixtures import NatsServer, running_server

from trio_worker.jetstream import streams
from trio_worker.nats.broker import open_nats_broker

pytestmark = [pytest.mark.nats, pytest.mark.process]

MODEL = "smollm2-135m-instruct"
SIMULATED = ("--engine", "simulated", "--set", JOBS_ON)
QUICK_LEASE = ("--set", "nats.jetstream.ack_wait_ms=1500")
LONG = 150
"""Tokens of an answer that takes three seconds."""


@pytest.fixture(name="server")
def server_fixture() -> Iterator[NatsServer]:
    with running_server(jetstream=True) as server:
        yield server


@asynccontextmanager
async def caller_of(url: str) -> AsyncIterator[JobsCaller]:
    async with (
        open_nats_broker(url, name="caller", reconnect_wait_s=0.05) as broker,
        jobs_caller(broker) as caller,
    ):
        yield caller


@pytest.fixture(name="caller")
async def caller_fixture(server: NatsServer) -> AsyncIterator[JobsCaller]:
    async with caller_of(server.url) as caller:
        yield caller


def worker(
    tmp_path: Path, server: NatsServer, name: str, *options: str
) -> AbstractAsyncContextManager[RunningCommand]:
    named = ("--set", f"worker.id={name}")
    return running_command(tmp_path, *SIMULATED, *QUICK_LEASE, *named, *options, url=server.url)


async def until_running(command: RunningCommand, jobs: int = 1) -> None:
    def run(stats: dict[str, dict[str, int]]) -> bool:
        return stats["requests"]["in_flight"] >= jobs

    await command.until_stats(run, within_s=20)


async def until_speaking(command: RunningCommand) -> None:
    """Until a token has been told: what has none goes back when the worker is stopped."""
    await command.until_stats(lambda stats: stats["tokens"]["per_second"] > 0, within_s=20)


async def kill(command: RunningCommand) -> None:
    family = command.children()
    command.process.kill()
    await command.process.wait()
    for each in family:
        if each.is_running():
            each.kill()


async def test_a_killed_worker_and_a_frozen_one_cost_a_lease_and_no_second_answer(
    server: NatsServer, caller: JobsCaller, tmp_path: Path
) -> None:
    async with worker(tmp_path, server, "w1") as first:
        await first.wait_ready()
        await caller.submit("j1", max_tokens=LONG)
        await until_running(first)
        await kill(first)
    async with worker(tmp_path, server, "w2") as second:
        await second.wait_ready()
        assert (await caller.result("j1")).worker_id == "w2"
        await caller.submit("j2", max_tokens=LONG)
        await until_running(second)
        os.kill(second.process.pid, signal.SIGSTOP)
        async with worker(tmp_path, server, "w3") as third:
            await third.wait_ready()
            answer = await caller.result("j2")
            assert answer.worker_id == "w3"
            os.kill(second.process.pid, signal.SIGCONT)
            await second.until_stats(
                lambda stats: stats["jobs"]["events"]["found answered"] == 1, within_s=20
            )
    await caller.until_empty(within_s=10)
    assert [each.subject for each in caller.heard] == [
        "answers.inference.j1",
        "answers.inference.j2",
    ]
    assert len(await caller.results()) == 2


async def test_a_server_that_is_killed_with_pulls_open_loses_nothing(
    server: NatsServer, caller: JobsCaller, tmp_path: Path
) -> None:
    async with worker(tmp_path, server, "w1") as command:
        await command.wait_ready()
        await caller.submit("j1", max_tokens=LONG)
        await until_running(command)
        server.end()
        await trio.sleep(0.3)
        server.start()
        began = trio.current_time()
        await caller.submit("j2", max_tokens=2)
        await caller.result("j2")
        assert trio.current_time() - began < 5
        await caller.result("j1")
        await caller.until_empty(within_s=20)
        # Nobody is told of pulls that are gone; they are asked anew.
        server.end(signal.SIGTERM)
        server.start()
        await caller.submit("j3", max_tokens=2)
        await caller.result("j3")
    assert len(await caller.results()) == 3


async def test_a_job_that_nobody_survives_is_put_among_the_dead(
    server: NatsServer, caller: JobsCaller, tmp_path: Path
) -> None:
    limit = ("--set", "nats.jetstream.max_deliver=1")
    async with worker(tmp_path, server, "w1", *limit) as first:
        await first.wait_ready()
        await caller.submit("j1", caller="me", max_tokens=LONG)
        await until_running(first)
        await kill(first)
    async with worker(tmp_path, server, "w2", *limit) as second:
        await second.wait_ready()
        answer = await caller.result("j1")
        assert answer.code == "INTERNAL"
        (dead,) = await caller.dead()
        assert dead.subject == f"dead.inference.high.me.{MODEL}"
        assert dead.headers["Dead-Deliveries"] == "1"
        await caller.until_empty(within_s=10)


async def test_a_drain_finishes_what_runs_and_leaves_the_rest(
    server: NatsServer, caller: JobsCaller, tmp_path: Path
) -> None:
    one_slot = ("--set", "worker.continuous_batching.max_batch_size=1")
    async with worker(tmp_path, server, "w1", *one_slot) as command:
        await command.wait_ready()
        for number in range(3):
            await caller.submit(f"j{number}", max_tokens=LONG)
        await until_speaking(command)
        command.process.send_signal(signal.SIGTERM)
        assert await command.wait_exit(20) == 0
    assert [each.subject for each in caller.heard] == ["answers.inference.j0"]
    info = await caller.js.consumer_info("INFERENCE", streams.consumer_name("high", MODEL))
    assert (info.num_pending, info.num_ack_pending, info.num_waiting) == (2, 0, 0)


async def test_a_deleted_consumer_is_made_again_and_a_full_stream_is_waited_for(
    server: NatsServer, caller: JobsCaller, tmp_path: Path
) -> None:
    await caller.js.ensure_stream(streams.results_stream("RESULTS", keep_s=3600) | {"max_msgs": 1})
    async with worker(tmp_path, server, "w1") as command:
        await command.wait_ready()
        await caller.submit("j1", max_tokens=2)
        await caller.result("j1")
        name = streams.consumer_name("high", MODEL)
        await caller.js.request(f"$JS.API.CONSUMER.DELETE.INFERENCE.{name}")
        await caller.submit("j2", max_tokens=2)
        await command.until_stats(
            lambda stats: "maximum messages exceeded" in (stats["jobs"]["trouble"] or ""),
            within_s=20,
        )
        await caller.js.request("$JS.API.STREAM.PURGE.RESULTS")
        assert (await caller.result("j2")).code == "ok"
        await command.until_stats(lambda stats: stats["jobs"]["trouble"] is None, within_s=10)


async def test_a_missing_right_and_a_missing_jetstream_are_named(tmp_path: Path) -> None:
    config = """
    authorization { users = [{user: w, password: w, permissions: {
      subscribe: ["inference.>", "inference", "worker.>", "$SRV.>", "_INBOX.>"]
      publish: {deny: ["$JS.API.>"]}
    }}] }
    """
    login = ("--set", "nats.user=w", "--set", "nats.password=w")
    with running_server(config=config, jetstream=True) as server:
        async with worker(tmp_path, server, "w1", *login) as command:
            await command.wait_ready()

            async def is_named() -> bool:
                return "nothing answered on $JS.API.STREAM.INFO.INFERENCE" in (
                    command.log.read_text()
                )

            await until(is_named, within_s=20)
            await command.until_stats(
                lambda stats: "CONSUMER.MSG.NEXT" in (stats["jobs"]["trouble"] or ""), within_s=20
            )
    with running_server() as server:
        async with worker(tmp_path, server, "w1") as command:
            await command.wait_ready()
            await command.until_stats(
                lambda stats: "JetStream is off" in (stats["jobs"]["trouble"] or ""), within_s=20
            )


async def test_what_an_embedded_server_has_taken_survives_it(tmp_path: Path) -> None:
    """Worker, engine and server are killed together; the next worker does the job."""
    store = tmp_path / "store"
    options = (*SIMULATED, *QUICK_LEASE, "--set", f"nats.jetstream.store_dir={store}")
    async with running_command(tmp_path, *options) as first:
        await first.wait_ready()
        async with caller_of(first.url) as caller:
            await caller.submit("j1", max_tokens=LONG)
            await until_running(first)
        await kill(first)
        url = first.url
    async with running_command(tmp_path, *options, url=url) as second:
        await second.wait_ready()
        async with caller_of(url) as caller:
            assert (await caller.result("j1")).code == "ok"
    assert "sync_interval: always" in (store / "nats-server.conf").read_text()
    assert (store / "jetstream").is_dir()
