"""What the monitoring address serves, and where: probes, statistics, metrics, the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from types import MappingProxyType
from typing import TypeAlias

import msgspec
from loguru import logger

from trio_worker.http.exchange import Endpoint, Exchange
from trio_worker.http.messages import Answer, Request
from trio_worker.monitoring.event_feed import EventFeed, tell_events
from trio_worker.monitoring.observed import Health, Observed
from trio_worker.monitoring.recent import Recent

ENDPOINTS = {
    "/": "this index, or the dashboard for a browser",
    "/livez": "200 while the loops make progress",
    "/readyz": "200 only while requests are accepted; the reason otherwise",
    "/healthz": "both as JSON",
    "/metrics": "for Prometheus; OpenMetrics if asked for",
    "/stats": "the statistics snapshot",
    "/fleet": "the workers on this NATS, each by its last word",
    "/events": "the snapshot, the fleet and the requests in flight, every second, as server-sent "
    "events",
}

Exposition: TypeAlias = Callable[[Observed, str], tuple[bytes, str]]
"""From what is observed and an Accept header to the metrics and their content type."""
Page: TypeAlias = Callable[[Request], Answer]
EVENTS = "/events"
PARTS = "/page/"

_FRESH = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
    "X-Content-Type-Options": "nosniff",
}


def pages_of(observed: Observed, exposition: Exposition, feed: EventFeed) -> Endpoint:
    """What answers a GET, and a HEAD, of every page there is."""
    plain = {**readings_of(observed, exposition), **_dashboard()}

    async def answer(exchange: Exchange) -> Answer | None:
        request = exchange.request
        path = request.path
        if path != EVENTS and path not in plain:
            return _text("there is no such page", status=404)
        if request.method not in ("GET", "HEAD"):
            return _text("this page can only be read", status=405, headers={"Allow": "GET, HEAD"})
        if path != EVENTS:
            return _compute(plain[path], request)
        if feed.is_full:
            return _text("too many streams are open", status=503)
        await tell_events(feed, exchange, _FRESH)
        return None

    return answer


def _compute(page: Page, request: Request) -> Answer:
    try:
        return page(request)
    except Exception as error:  # noqa: BLE001 - what is shown must not stop what it shows
        logger.opt(exception=error).error("the page {} failed", request.path)
        return _text("this page failed; the worker's log says how", status=500)


def readings_of(observed: Observed, exposition: Exposition) -> Mapping[str, Page]:
    """What says how things are, by path."""
    recent_stats, recent_fleet = Recent[bytes](), Recent[bytes]()
    recent_metrics = Recent[tuple[bytes, str]]()

    def livez(_: Request) -> Answer:
        return _probe(observed.liveness())

    def readyz(_: Request) -> Answer:
        return _probe(observed.readiness(), observed.resources().line)

    def healthz(_: Request) -> Answer:
        live, ready = observed.liveness(), observed.readiness()
        resources = observed.resources()
        body = msgspec.json.encode({"live": live, "ready": ready, "resources": resources})
        return _json(body, ok=live.ok and ready.ok)

    def stats(_: Request) -> Answer:
        return _json(recent_stats.get(lambda: msgspec.json.encode(observed.snapshot())))

    def fleet(_: Request) -> Answer:
        return _json(recent_fleet.get(lambda: msgspec.json.encode(observed.fleet())))

    def metrics(request: Request) -> Answer:
        accept = request.headers.get("accept", "*/*")
        body, content_type = recent_metrics.get(lambda: exposition(observed, accept), of=accept)
        return Answer(headers={**_FRESH, "Content-Type": content_type}, body=body)

    return {
        "/livez": livez,
        "/readyz": readyz,
        "/healthz": healthz,
        "/metrics": metrics,
        "/stats": stats,
        "/fleet": fleet,
    }


def _dashboard() -> Mapping[str, Page]:
    """The index, and the dashboard with its parts, by path."""
    parts = _read_page()

    def index(request: Request) -> Answer:
        if "text/html" in request.headers.get("accept", ""):
            return parts["index.html"]
        return _json(msgspec.json.encode(ENDPOINTS))

    def show(part: Answer) -> Page:
        return lambda _: part

    return {"/": index, **{f"{PARTS}{name}": show(part) for name, part in parts.items()}}


def _read_page() -> Mapping[str, Answer]:
    """The dashboard's files, by name."""
    folder = resources.files("trio_worker.monitoring").joinpath("page")
    return {
        part.name: Answer(
            headers={**_PAGE_HEADERS, "Content-Type": _PAGE_TYPES[suffix]}, body=part.read_bytes()
        )
        for part in folder.iterdir()
        if (suffix := part.name.rpartition(".")[2]) in _PAGE_TYPES
    }


def _probe(health: Health, *more: str) -> Answer:
    return _text(health.reason, *more, status=200 if health.ok else 503, headers=_FRESH)


def _text(*lines: str, status: int, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
    return Answer(
        status=status,
        headers={**headers, "Content-Type": "text/plain; charset=utf-8"},
        body="".join(f"{line}\n" for line in lines).encode(),
    )


def _json(body: bytes, *, ok: bool = True) -> Answer:
    return Answer(
        status=200 if ok else 503,
        headers={**_FRESH, "Vary": "Accept", "Content-Type": "application/json"},
        body=body,
    )
