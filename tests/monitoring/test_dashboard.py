"""The dashboard in a real browser, served by a whole worker on real time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from support.browser import open_browser
from support.ports import free_port
from support.worker_rig import MB, Rig, running_worker

from trio_worker.monitoring.http_server import serve_http
from trio_worker.monitoring.prometheus import exposition

pytestmark = pytest.mark.browser


@asynccontextmanager
async def serving(rig: Rig, port: int) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                serve_http,
                host="127.0.0.1",
                port=port,
                observed=rig.observed,
                exposition=exposition,
            )
        )
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def load(rig: Rig, count: int) -> AsyncIterator[None]:
    """So many long requests meanwhile."""
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(
                partial(
                    rig.ask,
                    prompt="Geheimnis " * 20,
                    max_tokens=4000,
                    stream=True,
                    timeout_ms=600_000,
                    priority="medium",
                )
            )
        yield
        nursery.cancel_scope.cancel()


async def test_the_page_shows_what_the_worker_does(tmp_path: Path) -> None:
    port = free_port()
    async with (
        running_worker("worker.resource_limits.check_interval_ms=100") as rig,
        serving(rig, port),
        open_browser(tmp_path, f"http://127.0.0.1:{port}/") as browser,
    ):
        await browser.until_says("connection", lambda text: text == "live")
        await browser.until_says("state", lambda text: text == "ready")
        assert await browser.text("worker-id") == "w1"
        assert "No request is in flight" in await browser.text("in-flight")
        async with load(rig, 12):
            await browser.until_says("batch", lambda text: text == "8 of 8")
            await browser.until_says("queue", lambda text: text == "4 of 100")
            await browser.until_says("tokens-per-second", lambda text: float(text) > 10)
            await browser.until_says("gap", lambda text: text.endswith("ms"))
            await browser.until_says("in-flight", lambda text: text.count("decode") == 8)
            assert (await browser.text("in-flight")).count("queued") == 4
            assert await browser.text("nats")
            drawn = "return document.querySelectorAll('.chart canvas').length"
            assert await browser.run(drawn) == 4

            rig.probe.used = 9000 * MB
            await browser.until_says("memory", lambda text: "soft" in text.splitlines()[-1])
            on = "return document.querySelectorAll('#steps li[data-on=true]').length"
            assert await browser.run(on) >= 1
            rig.probe.used = 11_000 * MB
            await browser.until_says("reason", lambda text: text.startswith("memory: 11000 MB"))
            assert await browser.text("state") == "not accepting"
            rig.probe.used = 100 * MB
            await browser.until_says("state", lambda text: text == "ready")

            rig.broker.disconnect()
            await browser.until_says("reason", lambda text: text.startswith("nats:"))
            rig.broker.reconnect()
            await browser.until_says("reason", lambda text: not text)
            assert "Geheimnis" not in await browser.run("return document.body.innerText")
        asked = await browser.run(
            "return performance.getEntriesByType('resource').map((each) => each.name)"
        )
        assert asked
        assert all(each.startswith(f"http://127.0.0.1:{port}/") for each in asked)
        assert await browser.complaints() == []


async def test_the_other_workers_are_seen_and_how_full_they_are(tmp_path: Path) -> None:
    port = free_port()
    async with (
        running_worker() as rig,
        serving(rig, port),
        open_browser(tmp_path, f"http://127.0.0.1:{port}/") as browser,
    ):
        await browser.until_says("connection", lambda text: text == "live")
        await browser.until_says("fleet-count", lambda text: text == "1")
        assert await browser.text("fleet-note") == "No other worker has been heard of."
        assert "w1 (this one)" in await browser.text("members")
        async with running_worker(server=rig.server, worker_id="w2") as other, load(other, 12):
            await browser.until_says("fleet-count", lambda text: text == "2")
            await browser.until_says("members", lambda text: "8/8" in text)
            ours, _, theirs = (await browser.text("members")).partition("w2")
            assert ours.startswith("w1 (this one)")
            assert "0/8" in ours
            assert "accepting" in theirs
            other.stop()
            await browser.until_says("members", lambda text: "draining" in text)
            other.kill()
        await browser.until_says("fleet-count", lambda text: text == "1")
        assert "w2" not in await browser.text("members")
        assert await browser.complaints() == []


async def test_a_lost_engine_is_seen_and_so_is_its_return(tmp_path: Path) -> None:
    port = free_port()
    async with (
        running_worker(restart_s=4) as rig,
        serving(rig, port),
        open_browser(tmp_path, f"http://127.0.0.1:{port}/") as browser,
    ):
        async with load(rig, 3):
            await browser.until_says("in-flight", lambda text: text.count("decode") == 3)
            assert "restarts\n0" in await browser.text("engine")
            rig.engine.crash()
            await browser.until_says("state", lambda text: text == "restarting")
            assert await browser.tone("state") == "bad"
            assert (await browser.text("reason")).startswith("restarting: the engine was lost")
            assert await browser.text("connection") == "live"
            assert (await browser.text("in-flight")).count("resuming") == 3

            await browser.until_says("state", lambda text: text == "ready")
            await browser.until_says("in-flight", lambda text: text.count("resumed ×1") == 3)
            assert await browser.tone("state") == "good"
            assert not await browser.text("reason")
            await browser.until_says("engine", lambda text: "restarts\n1" in text)
        assert await browser.complaints() == []


async def test_a_full_queue_is_seen_and_who_was_refused(tmp_path: Path) -> None:
    port = free_port()
    async with (
        running_worker("worker.request_queue.max_depth=8") as rig,
        serving(rig, port),
        open_browser(tmp_path, f"http://127.0.0.1:{port}/") as browser,
    ):
        async with load(rig, 8):
            await browser.until_says("batch", lambda text: text == "8 of 8")
            async with load(rig, 12):
                await browser.until_says("queue", lambda text: text == "8 of 8")
                assert await browser.text("state") == "not accepting"
                assert await browser.tone("state") == "warn"
                assert await browser.tone("queue-meter") == "bad"
                assert (await browser.text("reason")).startswith("queue")
                assert "QUEUE_FULL\n4" in await browser.text("outcomes")
                assert (await browser.text("in-flight")).count("queued") == 8
        await browser.until_says("state", lambda text: text == "ready")
        await browser.until_says("queue", lambda text: text == "0 of 8")
        assert not await browser.tone("queue-meter")
        assert await browser.complaints() == []


async def test_a_worker_that_is_gone_is_said_to_be_gone_and_comes_back(tmp_path: Path) -> None:
    port = free_port()
    async with running_worker() as rig, AsyncExitStack() as open_windows:
        async with serving(rig, port):
            browser = await open_windows.enter_async_context(
                open_browser(tmp_path, f"http://127.0.0.1:{port}/")
            )
            await browser.until_says("connection", lambda text: text == "live")
        await browser.until_says("connection", lambda text: text == "connection lost")
        assert (await browser.text("silence")).startswith("last heard")
        async with serving(rig, port):
            await browser.until_says("connection", lambda text: text == "live")


async def test_the_page_fits_a_phone_follows_dark_mode_and_needs_no_mouse(tmp_path: Path) -> None:
    port = free_port()
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    async with (
        running_worker() as rig,
        serving(rig, port),
        load(rig, 12),
        open_browser(tmp_path, f"http://127.0.0.1:{port}/") as browser,
    ):
        await browser.until_says("batch", lambda text: text == "8 of 8")
        heights = set()
        for _ in range(3):
            heights.add(await browser.run("return document.documentElement.scrollHeight"))
            shown = await browser.text("version")
            await browser.until_says("version", lambda text, shown=shown: text != shown)  # type: ignore[misc]
        assert len(heights) == 1

        light = await browser.run(background)
        await browser.emulate(
            "setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        assert await browser.run(background) != light

        await browser.resize(360, 740)
        await browser.until_says("batch", lambda text: text == "8 of 8")
        assert await browser.run("return document.documentElement.scrollWidth") <= 360
        chart = "return document.querySelector('.chart canvas').getBoundingClientRect().right"
        assert await browser.run(chart) <= 360

        focus = "return document.activeElement.id || document.activeElement.className"
        visited = []
        for _ in range(3):
            await browser.press("Tab")
            visited.append(await browser.run(focus))
        assert visited == ["skip", "pause", "scroll"]
        await browser.run("document.getElementById('pause').focus()")
        await browser.press("Enter")
        assert await browser.text("pause") == "Resume"
        assert await browser.text("connection") == "paused"
        assert await browser.complaints() == []
