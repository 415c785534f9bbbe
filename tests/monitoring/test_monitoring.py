"""What an operator sees of a worker in trouble: real processes, looked at from outside only."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import RunningCommand, background_command, running_command, until
from support.metric_values import samples_in
from support.nats_fixtures import NatsServer, private_server_fixture  # noqa: F401 - a fixture
from support.raw_nats import raw_requests
from support.tiny_model import write_tiny_model

from trio_worker.client import open_client
from trio_worker.errors import WorkerError

pytestmark = pytest.mark.nats

SEEN_S = 2.0
"""So soon everything is visible."""


async def scrape(worker: RunningCommand) -> dict[str, float]:
    status, body = await worker.get("/metrics")
    assert status == 200
    return samples_in(body)


async def service_data(worker: RunningCommand) -> Any:
    (stats,) = await raw_requests(worker.url, "$SRV.STATS.trio-worker.w1")
    return stats["endpoints"][0]["data"]


async def until_ready_says(worker: RunningCommand, start: str, within_s: float = SEEN_S) -> None:
    async def says() -> bool:
        return (await worker.get("/readyz"))[1].startswith(start)

    await until(says, within_s=within_s)


async def until_metric(
    worker: RunningCommand, name: str, holds: Callable[[float], bool], within_s: float = SEEN_S
) -> None:
    async def as_wanted() -> bool:
        return holds((await scrape(worker)).get(name, 0))

    await until(as_wanted, within_s=within_s)


async def ask_many(
    worker: RunningCommand, requests: list[dict[str, Any]]
) -> tuple[Counter[str], Counter[str]]:
    """Ask at the same time; outcomes, and tokens by their kind, as the client saw them."""
    outcomes: Counter[str] = Counter()
    tokens: Counter[str] = Counter()

    async def one(request: dict[str, Any]) -> None:
        try:
            async with client.ask(request, worker_id="w1") as answer:
                chunks = [chunk async for chunk in answer]
        except WorkerError as error:
            outcomes[error.code] += 1
            return
        outcomes["ok"] += 1
        usage = chunks[-1].usage
        assert usage is not None
        tokens["generated"] += usage["completion_tokens"]
        tokens["prompt"] += usage["prompt_tokens"]

    async with (
        open_client(worker.url, timeout_ms=None, attempts=1) as client,
        trio.open_nursery() as nursery,
    ):
        for request in requests:
            nursery.start_soon(one, request)
    return outcomes, tokens


@asynccontextmanager
async def load(worker: RunningCommand, requests: list[dict[str, Any]]) -> AsyncIterator[None]:
    """The requests are asked meanwhile, and given up at the end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_many, worker, requests)
        yield
        nursery.cancel_scope.cancel()


PLACES, SLOTS = 70, 8


@pytest.fixture(name="shared", scope="module")
def shared_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """A worker for all who do it no harm. What it has counted goes on from test to test."""
    with background_command(
        tmp_path_factory.mktemp("shared"),
        *("--engine", "simulated", "--set", "worker.simulated.turn_ms=10"),
        *("--set", f"worker.request_queue.max_depth={PLACES}"),
        *("--set", "worker.requests.max_tokens_limit=10000"),
        *("--set", "worker.requests.refuse_unmeetable=false"),
    ) as worker:
        yield worker


async def until_idle(worker: RunningCommand) -> dict[str, float]:
    """What has been counted when nobody is served any more."""
    await worker.wait_ready()
    await until_metric(worker, "requests_in_flight", lambda value: value == 0)
    await until_metric(worker, "ready", lambda value: value == 1)
    return await scrape(worker)


async def test_the_counters_are_what_the_client_saw_before_during_and_after_a_load(
    shared: RunningCommand,
) -> None:
    requests: list[dict[str, Any]] = [
        {
            "prompt": "word " * (1 + index % 5),
            "max_tokens": 5 + index % 7,
            "stream": index % 2 == 0,
            "priority": ("high", "medium", "low")[index % 3],
        }
        for index in range(60)
    ]
    wrong: list[dict[str, Any]] = [{"prompt": "a", "max_tokens": 0}] * 5
    never: list[dict[str, Any]] = [{"prompt": "a", "max_tokens": 9000}] * 3
    before, data_before = await until_idle(shared), await service_data(shared)
    results: list[tuple[Counter[str], Counter[str]]] = []
    seen: list[dict[str, float]] = []
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            results.append(await ask_many(shared, [*requests, *wrong, *never]))

        nursery.start_soon(ask)
        while not results:
            seen.append(await scrape(shared))
            await trio.sleep(0.02)
    final, data = await until_idle(shared), await service_data(shared)

    ((outcomes, tokens),) = results
    assert outcomes == {"ok": 60, "INVALID_REQUEST": 5, "CONTEXT_LENGTH_EXCEEDED": 3}
    in_flight = [each["requests_in_flight"] for each in seen]
    assert max(in_flight) > 8
    assert max(sum(each[f"queue_depth{{priority={level}}}"] for level in LEVELS) for each in seen)
    for earlier, later in pairwise([before, *seen, final]):
        falling = [
            name
            for name, value in earlier.items()
            if name.partition("{")[0].endswith(("_total", "_count", "_bucket"))
            and later[name] < value
        ]
        assert not falling

    after = {name: value - before.get(name, 0) for name, value in final.items()}
    for level in LEVELS:
        assert after[f"requests_total{{outcome=ok,priority={level}}}"] == 20
        assert after[f"time_to_first_token_seconds_count{{priority={level}}}"] == 20
        assert after[f"queue_wait_seconds_count{{priority={level}}}"] == 20
    assert after["rejections_total{code=INVALID_REQUEST}"] == 5
    failed = [after.get(f"requests_total{{outcome={LONG},priority={each}}}", 0) for each in LEVELS]
    assert sum(failed) == 3
    assert after["generated_tokens_total"] == tokens["generated"] == after["batch_size_sum"]
    assert after["prompt_tokens_total"] == tokens["prompt"]
    assert after["inter_token_seconds_count"] == tokens["generated"] - 60
    assert after["request_seconds_count{outcome=ok}"] == 60
    assert after["turn_seconds_count"] >= after["batch_size_count"] > 0
    ended = Counter(data["requests"]["by_outcome"])
    ended.subtract(data_before["requests"]["by_outcome"])
    assert +ended == outcomes
    generated = data["tokens"]["generated"] - data_before["tokens"]["generated"]
    assert generated == tokens["generated"]


LEVELS = ("high", "medium", "low")
LONG = "CONTEXT_LENGTH_EXCEEDED"


async def test_a_full_queue_is_visible_everywhere(shared: RunningCommand) -> None:
    refused = "rejections_total{code=QUEUE_FULL}"
    before = (await until_idle(shared))[refused]
    request = {"prompt": "a", "max_tokens": 4000, "timeout_ms": 300_000}
    # One after the other: who comes before the slots are taken needs a place.
    async with load(shared, [request] * SLOTS):
        await until_metric(shared, "requests_in_flight", lambda value: value == SLOTS)
        for level in LEVELS:
            await until_metric(shared, f"queue_depth{{priority={level}}}", lambda depth: depth == 0)
        async with load(shared, [request] * PLACES):
            await until_ready_says(shared, f"queue: {PLACES} of {PLACES} places", within_s=20)
            outcomes, _ = await ask_many(shared, [request] * 3)
            assert outcomes == {"QUEUE_FULL": 3}
            await until_metric(shared, refused, lambda value: value == before + 3)
            found = await scrape(shared)
            assert sum(found[f"queue_depth{{priority={level}}}"] for level in LEVELS) == PLACES
            assert found["ready"] == 0
            assert (await service_data(shared))["queue"]["is_full"]
            assert (await shared.get("/livez"))[0] == 200
    await until_ready_says(shared, "accepting")


async def test_a_nats_server_that_is_away_is_visible_and_so_is_its_return(
    tmp_path: Path, private_server: NatsServer
) -> None:
    async with running_command(tmp_path, "--engine", "simulated", url=private_server.url) as worker:
        await worker.wait_ready()
        private_server.end(signal.SIGTERM)
        await until_ready_says(worker, "nats: the connection is down")
        await until_metric(worker, "nats_connected", lambda value: value == 0)
        await until_metric(worker, "ready", lambda value: value == 0)
        assert (await worker.get("/livez"))[0] == 200
        private_server.start()
        await until_ready_says(worker, "accepting", within_s=10)
        await until_metric(worker, "nats_reconnects_total", lambda value: value == 1)
        assert (await service_data(worker))["nats"]["reconnects"] == 1


@pytest.mark.parametrize(
    ("critical_mb", "pressure", "ready"),
    [(100_000, "soft", "accepting requests"), (2, "critical", "memory: ")],
)
async def test_crossed_memory_limits_are_visible(
    tmp_path: Path, critical_mb: int, pressure: str, ready: str
) -> None:
    async with running_command(
        tmp_path,
        *("--engine", "simulated", "--set", "worker.resource_limits.max_memory_mb=1"),
        *("--set", f"worker.resource_limits.critical_memory_mb={critical_mb}"),
    ) as worker:
        await until_ready_says(worker, ready, within_s=30)
        found = await scrape(worker)
        assert found["memory_pressure"] == {"soft": 1, "critical": 2}[pressure]
        assert found["memory_bytes{kind=used}"] > found["memory_bytes{kind=soft}"] == 2**20
        assert found["memory_bytes{kind=hard}"] == critical_mb * 2**20
        if pressure == "critical":
            outcomes, _ = await ask_many(worker, [{"prompt": "a"}])
            assert outcomes == {"RESOURCE_LIMIT_EXCEEDED": 1}
            refused = "rejections_total{code=RESOURCE_LIMIT_EXCEEDED}"
            await until_metric(worker, refused, lambda value: value == 1)
        data = await service_data(worker)
    assert data["resources"]["pressure"] == pressure
    assert data["resources"]["steps"][0] == "trim_caches"


@pytest.mark.mlx
async def test_a_killed_and_a_hung_engine_are_visible(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    async with running_command(
        tmp_path,
        *("--set", f"worker.model={tiny}"),
        *("--set", "worker.continuous_batching.turn_timeout_ms=1500"),
    ) as worker:
        await worker.wait_ready()
        requests = [{"prompt": "abc" * 5, "max_tokens": 400, "seed": 1, "timeout_ms": 120_000}] * 3
        for how, reason, seen_s in (
            (signal.SIGKILL, "crash", SEEN_S),
            (signal.SIGSTOP, "hang", 1.5 + SEEN_S),
        ):
            async with load(worker, requests):
                before = (await scrape(worker))["turn_seconds_count"]
                await until_metric(
                    worker, "turn_seconds_count", partial(_is_above, before + 5), within_s=20
                )
                worker.child("trio_worker.engine").send_signal(how)
                await until_ready_says(worker, "restarting", within_s=seen_s)
                restarts = f"engine_restarts_total{{reason={reason}}}"
                await until_metric(worker, restarts, lambda value: value == 1)
                await until_metric(worker, "ready", lambda value: value == 0)
                assert (await service_data(worker))["engine"]["state"] == "restarting"
                assert (await worker.get("/livez"))[0] == 200
                await until_ready_says(worker, "accepting", within_s=60)
        await until_metric(worker, "requests_in_flight", lambda value: value == 0)
        data = await service_data(worker)
    assert data["engine"]["restarts"] == 2
    assert data["engine"]["state"] == "ready"


def _is_above(bound: float, value: float) -> bool:
    return value > bound


async def test_pages_tell_how_things_are_while_sixty_four_requests_are_served(
    shared: RunningCommand,
) -> None:
    """Every page asked for again and again says so, and the turns go on meanwhile."""
    await until_idle(shared)
    request = {"prompt": "word " * 20, "max_tokens": 4000, "stream": True}
    async with load(shared, [{**request, "timeout_ms": 300_000}] * 64):
        await until_metric(shared, "requests_in_flight", lambda value: value == 64, within_s=20)
        before = (await shared.stats())["batch"]["turns"]
        asked = 0
        while (await scrape(shared))["turn_seconds_count"] < before + 10:
            status, ready = await shared.get("/readyz")
            assert (status, ready.startswith("accepting requests")) == (200, True)
            stats = await shared.stats()
            assert stats["requests"]["in_flight"] == 64
            assert stats["batch"]["running"] + stats["queue"]["depth"] == 64
            asked += 1
        assert asked
        assert (await scrape(shared))["requests_in_flight"] == 64
