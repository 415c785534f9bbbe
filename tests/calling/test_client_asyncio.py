"""The client on asyncio, against a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support.commands import running_command
from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from support.peers import chunk, in_asyncio, refusal, scripted_peer

from trio_worker import client_asyncio
from trio_worker.client import open_client
from trio_worker.errors import (
    BY_CODE,
    MessageLost,
    NoWorker,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
    WorkerError,
)


@pytest.mark.nats
async def test_asyncio_retries_and_completes(nats_url: str) -> None:
    async def work() -> None:
        busy = refusal("QUEUE_FULL", retry_after_ms=50)
        async with scripted_peer(
            nats_url,
            "retry",
            [busy],
            [busy],
            [chunk(0), chunk(1, "y"), chunk(2, "es", terminal=True)],
        ) as (peer, client):
            whole = await client.complete({"prompt": "x"}, worker_id="retry")
            assert whole.text == "yes"
            assert len(peer.requests) == 3
            assert len({each["request_id"] for each in peer.requests}) == 1
            assert 0 < peer.requests[2]["timeout_ms"] <= 4900

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_raises_what_may_not_be_retried(nats_url: str) -> None:
    async def work() -> None:
        final = refusal("CONTEXT_LENGTH_EXCEEDED", retry_after_ms=None)
        gap = [chunk(0), chunk(2, "c")]
        async with scripted_peer(nats_url, "raise", [final], gap) as (peer, client):
            with pytest.raises(BY_CODE["CONTEXT_LENGTH_EXCEEDED"]):
                await client.complete({"prompt": "x"}, worker_id="raise")
            with pytest.raises(MessageLost):
                await client.complete({"prompt": "x"}, worker_id="raise")
            assert (await peer.cancels.get()).data == b"cancel"
            with pytest.raises(PayloadTooLarge):
                await client.complete({"prompt": "x" * 2**20}, worker_id="raise")
            assert len(peer.requests) == 2

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_is_bounded_by_the_deadline(nats_url: str) -> None:
    async def work() -> None:
        async with scripted_peer(nats_url, "silent", [chunk(0)]) as (peer, client):
            loop = asyncio.get_running_loop()
            began_at = loop.time()
            with pytest.raises(RequestTimeout) as caught:
                await client.complete({"prompt": "x", "timeout_ms": 100}, worker_id="silent")
            assert loop.time() - began_at >= 1.1
            assert caught.value.details == {"stage": "client"}
            assert (await peer.cancels.get()).data == b"cancel"
            with pytest.raises(NoWorker):
                await client.complete({"prompt": "x", "timeout_ms": 600}, worker_id="nobody")

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_waits_for_a_worker(nats_url: str) -> None:
    async def work() -> None:
        done = [chunk(0, "late", terminal=True)]
        async with scripted_peer(nats_url, "late", done, listening=False) as (peer, client):
            asking = asyncio.create_task(client.complete({"prompt": "x"}, worker_id="late"))
            await asyncio.wait({asking}, timeout=0.05)
            await peer.listen()
            assert (await asking).text == "late"
        async with client_asyncio.open_client(
            nats_url, timeout_ms=None, nobody_listens_grace_s=0
        ) as impatient:
            with pytest.raises(NoWorker, match=r"asked for 0\.0 s"):
                await impatient.complete({"prompt": "x"}, worker_id="nobody")

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_loses_nothing_by_a_cancelled_wait(nats_url: str) -> None:
    async def work() -> None:
        busy = refusal("QUEUE_FULL", retry_after_ms=300)
        async with (
            scripted_peer(nats_url, "patience", [busy], [chunk(0, "yes", terminal=True)]) as (
                peer,
                client,
            ),
            client.ask({"prompt": "x"}, worker_id="patience") as answer,
        ):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await anext(answer)
            assert await answer.text() == "yes"
            assert len(peer.requests) == 2

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_streams_completes_and_cancels_at_a_worker(tmp_path: Path) -> None:
    async def work(url: str) -> None:
        request = {"prompt": "a b", "max_tokens": 5, "seed": 3}
        async with client_asyncio.open_client(url, timeout_ms=None) as client:
            whole = await client.complete(request)
            joined = await client.complete({**request, "stream": True})
            assert len(whole.text.split()) == 5
            assert joined.text == whole.text
            assert joined.usage == whole.usage
            with pytest.raises(BY_CODE["INVALID_REQUEST"]):
                await client.complete({"prompt": "x", "max_tokens": 0})
            long = {"prompt": "x", "max_tokens": 4000, "stream": True}
            async with client.ask(long) as answer:
                await anext(answer)
                await answer.cancel()
                with pytest.raises(RequestCancelled):
                    await answer.text()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.complete({**long, "stream": False})
            async with client.ask(long) as answer:
                await anext(answer)

    async with running_command(tmp_path, "--engine", "simulated") as worker:
        await worker.wait_ready()
        await in_asyncio(partial(work, worker.url))
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=3)
        outcomes = (await worker.stats())["requests"]["by_outcome"]
    assert outcomes == {"ok": 2, "INVALID_REQUEST": 1, "CANCELLED": 3}


@pytest.mark.nats
async def test_asyncio_asks_in_a_callers_name(tmp_path: Path) -> None:
    async with running_command(tmp_path, "--engine", "simulated", "--log-level", "debug") as worker:
        await worker.wait_ready()

        async def work() -> None:
            async with client_asyncio.open_client(worker.url, caller="app-a") as client:
                assert (await client.complete({"prompt": "x", "max_tokens": 1})).text
            with pytest.raises(ValueError, match="no caller's name"):
                async with client_asyncio.open_client(worker.url, caller="app.a"):
                    pass

        await in_asyncio(work)
        assert "caller app-a" in worker.log.read_text()


@pytest.mark.process
def test_the_asyncio_flavour_leaves_asyncio_as_it_is() -> None:
    code = (
        "import sys, trio_worker.client_asyncio\n"
        "print([name for name in ('trio', 'trio_asyncio', 'mlx', 'loguru') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.decode().strip() == "[]"


@pytest.mark.nats
async def test_answers_come_below_the_prefix_that_the_worker_permits(tmp_path: Path) -> None:
    async def ask(url: str, prefix: str) -> None:
        async with client_asyncio.open_client(
            url, inbox_prefix=prefix, timeout_ms=500, attempts=1
        ) as client:
            await client.complete({"prompt": "x", "max_tokens": 1})

    async with running_command(
        tmp_path,
        *("--engine", "simulated", "--set", "nats.reply_prefixes=[_INBOX., _INBOX_mine.]"),
    ) as worker:
        await worker.wait_ready()
        async with open_client(worker.url, inbox_prefix="_INBOX_mine") as client:
            assert (await client.complete({"prompt": "x", "max_tokens": 1})).text
        await in_asyncio(partial(ask, worker.url, "_INBOX_mine"))
        async with open_client(worker.url, inbox_prefix="_INBOX_other", timeout_ms=100) as client:
            with pytest.raises(WorkerError) as caught:
                await client.complete({"prompt": "x", "max_tokens": 1})
    assert caught.value.details == {"stage": "client"}
