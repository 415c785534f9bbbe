"""What the monitoring pages answer: over loopback, and on the mock clock."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
import trio
from support import http_loopback as loopback
from support import http_virtual as virtual
from support.log_records import logged, texts
from support.observed import SNAPSHOT, FakeWorker, fake_exposition
from trio.testing import MockClock

from trio_worker.monitoring import event_feed, http_pages, recent
from trio_worker.monitoring.observed import Health, Observed

MEMORY_LINE = (
    "memory pressure soft: 9100 MB in use, limits 8192 and 10240 MB; "
    "steps in force: trim_caches, hold_low"
)


async def test_probes_answer_with_their_reason() -> None:
    worker = FakeWorker()
    async with loopback.serving(worker) as port:
        assert await loopback.get(port, "/livez") == (200, "every loop makes progress\n")
        assert await loopback.get(port, "/readyz") == (200, f"accepting requests\n{MEMORY_LINE}\n")
        worker.ready = Health(ok=False, reason="the model is loading")
        assert await loopback.get(port, "/readyz") == (
            503,
            f"the model is loading\n{MEMORY_LINE}\n",
        )
        assert (await loopback.get(port, "/livez"))[0] == 200
        status, body = await loopback.get(port, "/healthz")
        assert status == 503
        assert json.loads(body) == {
            "live": {"ok": True, "reason": "every loop makes progress"},
            "ready": {"ok": False, "reason": "the model is loading"},
            "resources": json.loads(msgspec.json.encode(SNAPSHOT.resources)),
        }


async def test_the_snapshot_is_json() -> None:
    async with loopback.serving(FakeWorker()) as port:
        status, body = await loopback.get(port, "/stats")
    assert status == 200
    assert json.loads(body)["queue"]["by_priority"] == {"high": 3, "low": 0}


async def test_the_fleet_is_json_each_worker_with_the_age_of_its_word() -> None:
    async with loopback.serving(FakeWorker()) as port:
        status, body = await loopback.get(port, "/fleet")
    assert status == 200
    members = json.loads(body)
    assert [(each["id"], each["age_s"]) for each in members] == [
        *(("w1", 0.0), ("w2", 0.4), ("w3", 1.0))
    ]
    assert members[0]["slots"] == 8
    assert members[0]["accepting"]
    assert not members[0]["leaving"]


def test_the_index_names_every_page_but_the_dashboards_parts() -> None:
    """What it names has to be in the documentation, too."""
    readings = http_pages.readings_of(FakeWorker(), fake_exposition).keys()
    assert {"/", http_pages.EVENTS, *readings} == http_pages.ENDPOINTS.keys()


async def test_the_index_names_pages_that_exist() -> None:
    async with loopback.serving(FakeWorker()) as port:
        status, body = await loopback.get(port, "/")
        assert status == 200
        for path in json.loads(body):
            assert (await loopback.get(port, path, "HEAD"))[0] == 200


async def test_a_browser_gets_the_dashboard_which_may_ask_nobody_else_for_anything() -> None:
    async with loopback.serving(FakeWorker()) as port:
        head, body = await loopback.ask(
            port, "/", accept="text/html,application/xhtml+xml,*/*;q=0.8"
        )
        assert "content-type: text/html" in head
        assert "content-security-policy: default-src 'none'; script-src 'self'" in head
        assert "http://" not in body
        assert "https://" not in body
        parts = re.findall(r'(?:src|href)="(page/[^"]+)"', body)
        assert len(parts) == 5
        for part in parts:
            assert (await loopback.get(port, f"/{part}"))[0] == 200
        assert (await loopback.get(port, "/page/uplot-LICENSE"))[0] == 404
        assert (await loopback.get(port, "/page/..%2fhttp_server.py"))[0] == 404


async def test_metrics_are_given_as_asked_for() -> None:
    async with loopback.serving(FakeWorker()) as port:
        head, body = await loopback.ask(port, "/metrics")
        assert "content-type: text/plain\r\n" in head
        assert body == "up 1\n"
        head, _ = await loopback.ask(port, "/metrics", accept="application/openmetrics-text")
        assert "content-type: application/openmetrics-text\r\n" in head


async def test_asking_in_a_loop_does_not_compute_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "FRESH_S", 60)
    monkeypatch.setattr(event_feed, "SAMPLE_S", 60)
    worker = FakeWorker()
    async with loopback.serving(worker) as port:
        before = worker.snapshots
        for _ in range(5):
            assert (await loopback.get(port, "/stats"))[0] == 200
    assert worker.snapshots == before + 1


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/nothing", "GET", 404), ("/stats", "POST", 405)]
)
async def test_what_does_not_exist_is_refused(path: str, method: str, status: int) -> None:
    async with loopback.serving(FakeWorker()) as port:
        assert (await loopback.get(port, path, method))[0] == status


async def test_a_failing_page_answers_500_and_the_others_go_on() -> None:
    """A fault in what is shown must not stop what it shows."""
    worker = FakeWorker()
    worker.stats = ValueError("broken")
    async with loopback.serving(worker) as port:
        assert (await loopback.get(port, "/stats"))[0] == 500
        assert (await loopback.get(port, "/livez"))[0] == 200


async def test_however_many_ask_a_page_is_computed_ten_times_a_second_at_most(
    autojump_clock: MockClock,
) -> None:
    computed: list[str] = []

    def exposition(_observed: Observed, accept: str) -> tuple[bytes, str]:
        computed.append(accept)
        return b"up 1\n", "text/plain"

    worker = FakeWorker()
    async with virtual.serving(worker, exposition) as connect:
        await trio.sleep(0.5)
        before = worker.snapshots
        for _ in range(40):
            assert (await virtual.get(connect, "/stats"))[0] == 200
            for accept in ("text/plain", "application/openmetrics-text"):
                assert (await virtual.get(connect, "/metrics", accept=accept))[0] == 200
            await trio.sleep(0.01)
        assert worker.snapshots - before == 4
        assert sorted(computed) == ["application/openmetrics-text"] * 4 + ["text/plain"] * 4


async def test_whoever_wishes_for_nothing_gets_the_metrics_just_after_the_statistics_too(
    autojump_clock: MockClock,
) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        assert (await virtual.get(connect, "/stats"))[0] == 200
        assert (await virtual.get(connect, "/metrics", accept=""))[::2] == (200, "up 1\n")


async def test_a_page_that_failed_is_computed_again(
    autojump_clock: MockClock,
) -> None:
    worker = FakeWorker()
    with logged("WARNING") as errors:
        async with virtual.serving(worker) as connect:
            worker.stats = ValueError("broken")
            status, _, body = await virtual.get(connect, "/stats")
            assert (status, body) == (500, "this page failed; the worker's log says how\n")
            worker.stats = SNAPSHOT
            assert (await virtual.get(connect, "/stats"))[0] == 200
    assert texts(errors) == ["the page /stats failed"]


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/healthz", "/stats", "/fleet", "/metrics", "/"]
)
async def test_nothing_that_changes_is_kept_or_guessed_at(
    autojump_clock: MockClock, path: str
) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        status, headers, _ = await virtual.get(connect, path)
    assert status == 200
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    json_pages = {"/healthz", "/stats", "/fleet", "/"}
    assert (headers["content-type"] == "application/json") == (path in json_pages)
    assert (headers.get("vary") == "accept") == (path in json_pages)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dashboard.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("index.html", "text/html; charset=utf-8"),
    ],
)
async def test_the_pages_parts_have_their_type_and_may_do_nothing_elsewhere(
    autojump_clock: MockClock, name: str, kind: str
) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        status, headers, body = await virtual.get(connect, f"/page/{name}")
    assert (status, headers["content-type"]) == (200, kind)
    assert body
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["vary"] == "accept"
    policy = headers["content-security-policy"].split("; ")
    assert policy == [
        "default-src 'none'",
        *(f"{each}-src 'self'" for each in ("script", "style", "img", "connect")),
        *(f"{each} 'none'" for each in ("base-uri", "form-action", "frame-ancestors")),
    ]


async def test_what_is_no_page_is_said_to_be_none(autojump_clock: MockClock) -> None:
    async with virtual.serving(FakeWorker()) as connect:
        status, _, body = await virtual.get(connect, "/page/other.js")
        assert (status, body) == (404, "there is no such page\n")
