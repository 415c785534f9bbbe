"""What the monitoring address serves, and where: probes, statistics, metrics, the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from trio_worker.monitoring.event_feed import EventFeed, EventStream
from trio_worker.monitoring.hypercorn_internals import Routes
from trio_worker.monitoring.observed import Health, Observed
from trio_worker.monitoring.recent import Recent

ENDPOINTS = {
    "/": "this index, or the dashboard for a browser",
    "/livez": "200 while the loops make progress",
    "/readyz": "200 only while requests are accepted; the reason otherwise",
    "/healthz": "both as JSON",
    "/metrics": "for Prometheus; OpenMetrics if asked for",
    "/stats": "the statistics snapshot",
    "/events": "the same and the requests in flight, every second, as server-sent events",
}

Exposition: TypeAlias = Callable[[Observed, str], tuple[bytes, str]]
"""From what is observed and an Accept header to the metrics and their content type."""

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


def routes_of(observed: Observed, exposition: Exposition, feed: EventFeed) -> Routes:
    """Every page there is, by its path."""
    return {**_readings(observed, exposition, feed), **_dashboard()}


def _readings(observed: Observed, exposition: Exposition, feed: EventFeed) -> Routes:
    """What says how things are."""
    recent_stats, recent_metrics = Recent[bytes](), Recent[tuple[bytes, str]]()

    async def livez(_: Request) -> Response:
        return _probe(observed.liveness())

    async def readyz(_: Request) -> Response:
        return _probe(observed.readiness(), observed.resources().line)

    async def healthz(_: Request) -> Response:
        live, ready = observed.liveness(), observed.readiness()
        resources = observed.resources()
        body = msgspec.json.encode({"live": live, "ready": ready, "resources": resources})
        return _json(body, ok=live.ok and ready.ok)

    async def stats(_: Request) -> Response:
        return _json(recent_stats.get(lambda: msgspec.json.encode(observed.snapshot())))

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "*/*")
        body, content_type = recent_metrics.get(lambda: exposition(observed, accept), of=accept)
        # As a header: starlette would add a second charset to a media type.
        return Response(body, headers={**_FRESH, "Content-Type": content_type})

    async def events(_: Request) -> Response:
        if feed.is_full:
            return PlainTextResponse("too many streams are open\n", status_code=503)
        return EventStream(feed, _FRESH)

    return {
        "/livez": livez,
        "/readyz": readyz,
        "/healthz": healthz,
        "/metrics": metrics,
        "/stats": stats,
        "/events": events,
    }


def _dashboard() -> Routes:
    """The index, and the dashboard with its parts."""
    parts = _read_page()

    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return parts["index.html"]
        return _json(msgspec.json.encode(ENDPOINTS))

    async def part(request: Request) -> Response:
        return parts.get(request.path_params["name"]) or PlainTextResponse(
            "there is no such page\n", status_code=404
        )

    return {"/": index, "/page/{name}": part}


def _read_page() -> Mapping[str, Response]:
    """The dashboard's files, by name."""
    folder = resources.files("trio_worker.monitoring").joinpath("page")
    return {
        part.name: Response(
            part.read_bytes(), headers={**_PAGE_HEADERS, "Content-Type": _PAGE_TYPES[suffix]}
        )
        for part in folder.iterdir()
        if (suffix := part.name.rpartition(".")[2]) in _PAGE_TYPES
    }


def _probe(health: Health, *more: str) -> Response:
    return PlainTextResponse(
        "".join(f"{line}\n" for line in (health.reason, *more)),
        status_code=200 if health.ok else 503,
        headers=_FRESH,
    )


def _json(body: bytes, *, ok: bool = True) -> Response:
    return Response(
        body,
        media_type="application/json",
        status_code=200 if ok else 503,
        headers={**_FRESH, "Vary": "Accept"},
    )
