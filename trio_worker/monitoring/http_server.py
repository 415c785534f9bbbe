"""The monitoring pages over HTTP: a listener, the pages, and the feed of events behind one."""

from __future__ import annotations

import trio
from loguru import logger

from trio_worker.monitoring.event_feed import EventFeed
from trio_worker.monitoring.http_listener import open_listeners, serve_routes
from trio_worker.monitoring.http_pages import Exposition, routes_of
from trio_worker.monitoring.observed import Observed


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
    listeners = await open_listeners(host, port)
    feed = EventFeed(observed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        await nursery.start(serve_routes, routes_of(observed, exposition, feed), listeners)
        bound: int = listeners[0].socket.getsockname()[1]
        logger.info("monitoring pages on http://{}:{}", f"[{host}]" if ":" in host else host, bound)
        task_status.started(bound)
