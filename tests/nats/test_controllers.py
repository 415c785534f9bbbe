"""A worker's process and a scripted controller on a real nats-server."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.commands import RunningCommand, running_command
from support.nats_fixtures import (
    NatsServer,
    private_server_fixture,  # noqa: F401
)
from support.nats_rig import wait_until
from support.scripted_controller import Answered, NoWorkers, ScriptedController, running_controller

from trio_worker.nats.broker import open_nats_broker
from trio_worker.wire.mlx_serving import member_id

pytestmark = pytest.mark.nats

MEMBER = member_id("w1")
OPTIONS = ("--engine", "simulated", "--set", "nats.dialects=[native, mlx-serving]")
ASKED = 300
AT_A_TIME = 30


@asynccontextmanager
async def controller_at(url: str, *, lag_s: float = 0.0) -> AsyncIterator[ScriptedController]:
    async with (
        open_nats_broker(url, name="controller") as broker,
        running_controller(broker, wall_clock=time.time, lag_s=lag_s) as controller,
    ):
        yield controller


@asynccontextmanager
async def cluster(
    server: NatsServer, tmp_path: Path, *, lag_s: float = 0.0
) -> AsyncIterator[tuple[RunningCommand, ScriptedController]]:
    async with (
        controller_at(server.url, lag_s=lag_s) as controller,
        running_command(tmp_path, *OPTIONS, url=server.url) as worker,
    ):
        await worker.wait_ready()
        await controller.until(lambda: MEMBER in controller.members)
        yield worker, controller


@pytest.mark.parametrize("lag_s", [0.0, 0.1])
async def test_of_hundreds_of_instant_answers_none_is_lost(
    private_server: NatsServer, tmp_path: Path, lag_s: float
) -> None:
    async with cluster(private_server, tmp_path, lag_s=lag_s) as (_, controller):
        answers: list[Answered] = []
        limit = trio.CapacityLimiter(AT_A_TIME)

        async def ask(max_tokens: int) -> None:
            async with limit:
                answers.append(await controller.ask(maxTokens=max_tokens))

        async with trio.open_nursery() as nursery:
            for number in range(ASKED):
                nursery.start_soon(ask, number % 3)
        assert {each.terminals for each in answers} == {1}
        assert {each.last["type"] for each in answers} == {"done", "error"}
        for each in answers:
            if each.last["type"] == "done":
                assert len(each.messages) == each.last["totalTokens"] + 1


async def test_a_worker_that_stops_leaves_nobody_waiting(
    private_server: NatsServer, tmp_path: Path
) -> None:
    async with cluster(private_server, tmp_path) as (worker, controller):
        answers: list[Answered] = []

        async def keep_asking() -> None:
            while MEMBER in controller.members:
                try:
                    answers.append(await controller.ask(maxTokens=5))
                except NoWorkers:
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(AT_A_TIME):
                nursery.start_soon(keep_asking)
            await trio.sleep(1)
            worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait_exit(10) == 0
        assert {each.terminals for each in answers} == {1}
        assert [each.last for each in answers if each.last["type"] == "error"] == []
        assert len(answers) > AT_A_TIME


async def test_a_controller_that_dies_frees_what_it_had_asked_for(
    private_server: NatsServer, tmp_path: Path
) -> None:
    async with cluster(private_server, tmp_path) as (worker, _):
        async with controller_at(private_server.url) as second:
            await second.until(lambda: MEMBER in second.members)
            running = await second.begin(maxTokens=1000)
            await wait_until(lambda: len(running.messages) > 2)
            assert not running.ended.is_set()
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=3)
        stats = await worker.stats()
        assert stats["requests"]["by_outcome"] == {"CANCELLED": 1}


async def test_the_server_may_be_restarted(private_server: NatsServer, tmp_path: Path) -> None:
    async with cluster(private_server, tmp_path) as (_, controller):
        private_server.end()
        private_server.start()
        told = len(controller.told)
        await controller.until(lambda: len(controller.told) > told)
        assert (await controller.ask(maxTokens=2)).last["type"] == "done"
