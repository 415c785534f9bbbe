"""Three workers as processes on a real nats-server: who takes over from whom, and what is lost."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import RunningCommand, running_command, until
from support.nats_fixtures import NatsServer, running_server

from trio_worker.client import Client, open_client
from trio_worker.errors import WorkerError

pytestmark = [pytest.mark.nats, pytest.mark.process]

IDS = ("w1", "w2", "w3")
SETTINGS = (
    *("--engine", "simulated", "--set", "nats.embedded=never"),
    *("--set", "worker.continuous_batching.max_batch_size=4"),
    *("--set", "worker.request_queue.max_depth=8"),
    *("--set", "worker.simulated.turn_ms=10"),
)
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "why " * 400}], "max_tokens": 3}


@dataclass
class Fleet:
    workers: dict[str, RunningCommand]
    client: Client

    async def ask(self, **fields: Any) -> str:
        """Who served it, or the error's code."""
        try:
            chunk = await self.client.complete(fields)
        except WorkerError as error:
            return str(error.code)
        assert chunk.worker is not None
        return str(chunk.worker["id"])

    async def ask_many(self, count: int, *, gap_s: float = 0.0, **fields: Any) -> Counter[str]:
        """Who served how many of so many, and the codes of the errors."""
        found: Counter[str] = Counter()

        async def one() -> None:
            found[await self.ask(**fields)] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)
                await trio.sleep(gap_s)
        return found

    async def ask_in_turn(self, count: int, **fields: Any) -> Counter[str]:
        """As `ask_many`, each when the one before has ended: so there is always a free slot."""
        return Counter([await self.ask(**fields) for _ in range(count)])

    async def fleet_stats(self) -> dict[str, Any]:
        return {
            worker_id: (await worker.stats())["fleet"]
            for worker_id, worker in self.workers.items()
            if worker.process.poll() is None
        }


@asynccontextmanager
async def running_fleet(server: NatsServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        workers = {
            worker_id: await stack.enter_async_context(
                running_command(
                    tmp_path, *SETTINGS, "--set", f"worker.id={worker_id}", url=server.url
                )
            )
            for worker_id in IDS
        }
        for worker in workers.values():
            await worker.wait_ready()
            await worker.until_stats(lambda stats: stats["fleet"]["others"] == 2, within_s=10)
        client = await stack.enter_async_context(
            open_client(server.url, timeout_ms=20_000, attempts=1)
        )
        yield Fleet(workers, client)


async def test_a_fleet_on_a_real_server(tmp_path: Path) -> None:
    with running_server() as server:
        async with running_fleet(server, tmp_path) as fleet:
            # A burst of more than one can take: 12 slots, and 24 places to wait.
            found = await fleet.ask_many(30, prompt="x", max_tokens=20)
            assert set(found) <= set(IDS), found
            assert found.total() == 30

            # A conversation stays where it is, once all have said that they are free again.
            await trio.sleep(1)
            (home,) = await fleet.ask_in_turn(12, **LONG)
            handed_on = {
                worker_id: stats["handed_on"]["prefix"]
                for worker_id, stats in (await fleet.fleet_stats()).items()
            }
            assert handed_on[home] == 0
            assert sum(handed_on.values()) > 0

            # It is killed while all believe in it: the server tells, and the next one takes over.
            fleet.workers[home].process.send_signal(signal.SIGKILL)
            await fleet.workers[home].process.wait()
            (heir,) = await fleet.ask_in_turn(12, **LONG)
            assert heir in set(IDS) - {home}
            stats = await fleet.fleet_stats()
            assert 1 <= sum(each["returned"] for each in stats.values()) <= 2

            # One that is stopped as by SIGSTOP is sent nothing once its beats are missing.
            other = next(each for each in IDS if each not in (home, heir))
            frozen = fleet.workers[heir]
            frozen.process.send_signal(signal.SIGSTOP)
            try:
                survivor = fleet.workers[other]
                await survivor.until_stats(lambda stats: stats["fleet"]["others"] == 0, within_s=10)
                before = (await survivor.stats())["fleet"]["handed_on"]
                found = await fleet.ask_in_turn(12, timeout_ms=500, **LONG)
                assert set(found) <= {other, "REQUEST_TIMEOUT"}
                assert (await survivor.stats())["fleet"]["handed_on"] == before
            finally:
                frozen.process.send_signal(signal.SIGCONT)

            async def is_back() -> bool:
                return bool((await survivor.stats())["fleet"]["others"] == 1)

            await until(is_back, within_s=10)
            assert set(await fleet.ask_many(12, **LONG)) <= {heir, other}


async def test_a_drain_under_load_loses_nothing(tmp_path: Path) -> None:
    with running_server() as server:
        async with running_fleet(server, tmp_path) as fleet, trio.open_nursery() as nursery:
            found: Counter[str] = Counter()

            async def load() -> None:
                found.update(await fleet.ask_many(100, gap_s=0.03, prompt="x", max_tokens=15))

            nursery.start_soon(load)
            await trio.sleep(0.7)
            leaving = fleet.workers["w2"]
            leaving.process.send_signal(signal.SIGTERM)
            assert await leaving.wait_exit(30) == 0
        assert set(found) <= set(IDS), found
        assert found.total() == 100
