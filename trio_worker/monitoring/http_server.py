"""The monitoring pages over HTTP: a listener, the pages, and the feed of events behind one."""

from __future__ import annotations

from functools import partial

import trio
from loguru import logger

from trio_worker.http.drain import Drain
from trio_worker.http.limits import Limits
from trio_worker.http.listening import open_listeners
from trio_worker.http.server import serve
from trio_worker.monitoring.event_feed import EventFeed
from trio_worker.monitoring.http_pages import Exposition, pages_of
from trio_worker.monitoring.observed import Observed

LIMITS = Limits(
    connections=32,
    head_bytes=16 * 1024,
    body_bytes=0,
    idle_s=5.0,
    head_s=5.0,
    send_s=5.0,
    half_closed_s=0.5,
    life_s=60.0,
)
"""Nobody on the other end can disturb the worker. What polls for longer opens the next connection;
whoever closes its side after asking, as scripts do, still gets its answer."""


async def serve_http(
    *,
    host: str,
    port: int,
    observed: Observed,
    exposition: Exposition,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `host` and `port` until cancelled; 0 is any free port.

    Reports the bound port as its start. Cancelled: connections are cut where they are.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    listeners = await open_listeners(host, port, section="cluster.worker.monitoring")
    feed = EventFeed(observed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        pages = pages_of(observed, exposition, feed)
        # No drain: probes and pages are there until the worker is not.
        await nursery.start(partial(serve, pages, listeners, limits=LIMITS, drain=Drain()))
        bound: int = listeners[0].socket.getsockname()[1]
        logger.info("monitoring pages on http://{}:{}", f"[{host}]" if ":" in host else host, bound)
        task_status.started(bound)
