"""What a worker is given from outside."""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio
from trio_util import AsyncValue

from trio_worker.monitoring.observed import Observed
from trio_worker.ports import (
    Broker,
    Engine,
    Host,
    MemoryProbe,
    ProgressSink,
    ServiceManager,
    StackSampler,
)
from trio_worker.stages.notify import Standing


class ServeHttp(Protocol):
    """Serves the monitoring endpoints; started with the port that it listens on."""

    def __call__(
        self, *, host: str, port: int, observed: Observed, task_status: trio.TaskStatus[int]
    ) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a worker is given from outside, and who is told how it goes."""

    stops: AsyncIterable[object]
    """The first item begins a drain, a second one cuts it short; one that comes before the worker
    is ready ends the run there."""
    open_broker: Callable[[], AbstractAsyncContextManager[Broker]]
    open_engine: Callable[[], AbstractAsyncContextManager[Engine]]
    probe: MemoryProbe
    rng: random.Random
    """Draws request ids and seeds, which callers see."""
    wall_clock: Callable[[], float]
    """Seconds since the epoch, for people to read."""
    host: Host | None = None
    """Has to be there where mlx-serving's dialect is spoken: its controllers are told of it."""
    serve_http: ServeHttp | None = None
    open_gateway: Callable[[AsyncValue[int]], AbstractAsyncContextManager[None]] | None = None
    """What takes requests over HTTP beside the worker, for as long as the block. It is given how
    often the worker has been asked to stop, and acts on that as the worker does; leaving waits for
    its end."""
    service_manager: ServiceManager | None = None
    standing: Standing | None = None
    """Given by who has more to tell the service manager, such as the progress of the load."""
    sampler: StackSampler | None = None
    """Says what has blocked the event loop, if that runs on the real clock."""
    greet: Callable[[Broker], Awaitable[None]] | None = None
    """Runs beside the requests once the worker is ready."""
    on_ready: Callable[[Observed], None] | None = None
    on_progress: ProgressSink | None = None
    """Told how many of the requests that a drain began with have ended."""
