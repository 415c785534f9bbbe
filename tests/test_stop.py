"""Stopping a worker that is busy: real processes, at a moment that nobody chose."""

from __future__ import annotations

import json
import random
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.commands import RunningCommand, alive, running_command
from support.nats_fixtures import NatsServer, private_server_fixture  # noqa: F401
from support.tiny_model import write_tiny_model

from trio_worker.nats.broker import NatsBroker, open_nats_broker
from trio_worker.ports import Message
from trio_worker.wire.native import Header

pytestmark = pytest.mark.nats

DRAIN_S = 6.0
SLACK_S = 2.0
"""On top of the drain: two subscriptions, the engine's end, the broker's close."""
SOON_S = 2.0
"""A second signal leaves no more."""
LOAD = 50


class Load:
    """Requests that are on their way at the same time, and every message of theirs."""

    def __init__(self, broker: NatsBroker) -> None:
        self._broker = broker
        self._inbox = broker.new_inbox()
        self._arrived = trio.Event()
        self.messages: list[list[Message]] = []
        self.count = 0

    def take(self, message: Message) -> None:
        self.messages[int(message.subject.rpartition(".")[2])].append(message)
        self.count += 1
        self._arrived.set()

    async def send(self, rng: random.Random, tokens_most: int) -> None:
        await self._broker.subscribe(f"{self._inbox}.*", self.take)
        for number in range(LOAD):
            self.messages.append([])
            tokens = rng.randint(5, tokens_most)
            body = {"prompt": "x", "stream": True, "max_tokens": tokens, "timeout_ms": 120_000}
            self._broker.publish(
                Message(
                    subject="inference.w1",
                    body=json.dumps(body).encode(),
                    reply=f"{self._inbox}.{number}",
                )
            )

    async def wait_messages(self, count: int) -> None:
        with trio.fail_after(30):
            while self.count < count:
                self._arrived = trio.Event()
                await self._arrived.wait()

    def outcomes(self) -> list[str]:
        """One each; everything that a stream must be is asserted."""
        found = []
        for messages in self.messages:
            numbers = [int(message.headers["Sequence"]) for message in messages]
            assert numbers == list(range(len(messages)))
            terminals = [Header.TERMINAL in message.headers for message in messages]
            assert terminals == [False] * (len(messages) - 1) + [True]
            error = messages[-1].headers.get("Nats-Service-Error", "ok")
            found.append(error.partition(":")[0])
        return found

    def had_tokens(self) -> list[bool]:
        """Whether a caller was told a part of its answer."""
        return [
            any(json.loads(message.body)["choices"][0]["text"] for message in messages[:-1])
            for messages in self.messages
        ]


@asynccontextmanager
async def busy(
    worker: RunningCommand, rng: random.Random, *, tokens_most: int = 80
) -> AsyncIterator[Load]:
    """Entered at a moment between the first token and the last one."""
    await worker.wait_ready()
    async with open_nats_broker(worker.url, name="caller") as broker:
        load = Load(broker)
        await load.send(rng, tokens_most)
        await load.wait_messages(rng.randint(LOAD + 1, LOAD + 300))
        yield load
        await broker.flush()


@pytest.mark.parametrize("round_number", range(3))
async def test_a_stop_under_load_finishes_what_runs_and_sends_the_rest_away(
    tmp_path: Path, private_server: NatsServer, round_number: int
) -> None:
    seed = secrets.randbelow(10_000)
    print(f"seed {seed}")  # noqa: T201 - shown with a failure
    # A hundred tokens take two seconds: what runs ends within the drain.
    async with running_command(
        tmp_path,
        *("--engine", "simulated", "--set", f"worker.drain_timeout_ms={1000 * DRAIN_S:.0f}"),
        url=private_server.url,
    ) as worker:
        async with busy(worker, random.Random(seed)) as load:
            family = worker.children()
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(DRAIN_S + SLACK_S) == 0
        assert not alive(family)
    outcomes = load.outcomes()
    assert set(outcomes) <= {"ok", "WORKER_DRAINING"}
    assert "WORKER_DRAINING" in outcomes
    for outcome, had_tokens in zip(outcomes, load.had_tokens(), strict=True):
        assert had_tokens == (outcome == "ok")


async def test_a_second_signal_at_any_moment_of_a_drain_ends_it_soon(
    tmp_path: Path, private_server: NatsServer
) -> None:
    seed = secrets.randbelow(10_000)
    print(f"seed {seed}")  # noqa: T201 - shown with a failure
    rng = random.Random(seed)
    async with running_command(tmp_path, "--engine", "simulated", url=private_server.url) as worker:
        # Eight of these together take a minute.
        async with busy(worker, rng, tokens_most=4000) as load:
            worker.process.send_signal(signal.SIGTERM)
            await load.wait_messages(load.count + rng.randint(1, 60))
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(SOON_S) == 0
    assert set(load.outcomes()) <= {"ok", "WORKER_DRAINING"}


@pytest.mark.mlx
async def test_a_second_signal_does_not_wait_for_an_engine_that_hangs(
    tmp_path: Path, private_server: NatsServer
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    async with running_command(
        tmp_path, "--set", f"worker.model={model}", url=private_server.url
    ) as worker:
        async with busy(worker, random.Random(1)) as load:
            family = worker.children()
            worker.child("trio_worker.engine").send_signal(signal.SIGSTOP)
            worker.process.send_signal(signal.SIGTERM)
            await worker.until_stats(
                lambda stats: stats["worker"]["state"] == "draining", within_s=5
            )
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(SOON_S) == 0
        assert not alive(family)
    assert "WORKER_DRAINING" in load.outcomes()


@pytest.mark.mlx
async def test_a_drain_ends_at_its_time_though_the_engine_hangs(
    tmp_path: Path, private_server: NatsServer
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    async with running_command(
        tmp_path,
        *("--set", f"worker.model={model}", "--set", "worker.drain_timeout_ms=1000"),
        url=private_server.url,
    ) as worker:
        async with busy(worker, random.Random(2)) as load:
            family = worker.children()
            worker.child("trio_worker.engine").send_signal(signal.SIGSTOP)
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(1 + SLACK_S) == 0
        assert not alive(family)
    assert set(load.outcomes()) <= {"ok", "WORKER_DRAINING"}
