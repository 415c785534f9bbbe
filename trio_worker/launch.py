"""From a configuration to running edges, and a worker on them.

What `run`, `bench` and tests of the whole share; where a configuration's units become ours.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from trio_worker.config import Config, NatsConfig
from trio_worker.core.memory import MB
from trio_worker.launch_nats import connect
from trio_worker.machine.host import find_host
from trio_worker.machine.memory_probe import PsutilProbe
from trio_worker.machine.service_manager import open_service_manager
from trio_worker.monitoring.http_server import serve_http
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.prometheus import exposition
from trio_worker.monitoring.stack_sampler import open_stack_sampler
from trio_worker.nats.address import parse_nats_url
from trio_worker.nats.embedded_server import (
    default_store,
    is_loopback,
    open_nats_server,
    somebody_listens,
)
from trio_worker.ports import Broker, Engine, Host, ProgressSink
from trio_worker.simulated.engine import open_simulated_engine
from trio_worker.stages.notify import Standing
from trio_worker.supervisor.engine_life import ENGINE_PROGRAM
from trio_worker.supervisor.engine_process import open_engine
from trio_worker.supervisor.gateway_process import GatewayProcess
from trio_worker.worker import World, run_worker

COLLECT_EVERY = 5_000
"""Objects more than before: a collection of the young costs what it finds alive, the requests under
way, and little of what this worker makes is in cycles."""

EngineKind: TypeAlias = Literal["mlx", "simulated"]


async def launch(
    config: Config,
    *,
    engine: EngineKind,
    engine_program: Sequence[str] = ENGINE_PROGRAM,
    stops: AsyncIterable[object],
    on_progress: ProgressSink | None = None,
    gateway: GatewayProcess | None = None,
    greet: Callable[[Broker], Awaitable[None]] | None = None,
    on_ready: Callable[[Observed], None] | None = None,
) -> None:
    """Run a worker on real edges; returns, and raises, as `run_worker` does.

    `engine_program` is what serves as the engine's process, unless it is simulated. `gateway` is
    what takes requests over HTTP beside the worker.

    Takes the variables of the service manager out of the environment before a child process
    could inherit them.
    """
    standing = Standing()

    def progressed(step: str, done: int, total: int, unit: str) -> None:
        standing.progress(step, done, total, unit)
        if on_progress is not None:
            on_progress(step, done, total, unit)

    def ready(observed: Observed) -> None:
        settle_garbage_collection()
        if on_ready is not None:
            on_ready(observed)

    with open_service_manager(os.environ) as service_manager, open_stack_sampler() as sampler:
        world = World(
            stops=stops,
            open_broker=partial(_open_broker, config),
            open_engine=partial(_open_engine, config, engine, progressed, engine_program),
            probe=PsutilProbe(),
            # Callers see what is drawn; from a generator of ours they could work out the rest.
            rng=random.SystemRandom(),
            wall_clock=time.time,
            host=await _find_host(config.nats),
            serve_http=partial(serve_http, exposition=exposition),
            open_gateway=None if gateway is None else gateway.running,
            greet=greet,
            on_ready=ready,
            on_progress=on_progress,
            service_manager=service_manager,
            standing=standing,
            sampler=sampler,
        )
        await run_worker(config, world)


def settle_garbage_collection() -> None:
    """Spare later collections, each of which stops everything, what is there by now: it stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


async def _find_host(nats: NatsConfig) -> Host | None:
    if "mlx-serving" not in nats.dialects:
        return None
    address = parse_nats_url(nats.url)
    return await find_host(address.host, address.port)


@asynccontextmanager
async def _open_broker(config: Config) -> AsyncIterator[Broker]:
    """A connection to NATS, and around it the embedded server where one is needed."""
    nats, name = config.nats, f"trio-worker {config.worker.id}"
    if await _needs_embedded_server(nats):
        store = _store_of(nats)
        async with open_nats_server(nats.url, store=store), connect(nats, name=name) as broker:
            yield broker
    else:
        async with connect(nats, name=name) as broker:
            yield broker


def _store_of(nats: NatsConfig) -> Path | None:
    """Where an embedded server keeps its streams; None: it has none."""
    jetstream = nats.jetstream
    if not jetstream.enabled:
        return None
    if jetstream.store_dir is None:
        return default_store(nats.url)
    return Path(jetstream.store_dir).expanduser()


async def _needs_embedded_server(nats: NatsConfig) -> bool:
    if nats.embedded == "auto":
        return is_loopback(nats.url) and not await somebody_listens(nats.url)
    return nats.embedded == "always"


def _open_engine(
    config: Config,
    kind: EngineKind,
    on_progress: ProgressSink | None,
    program: Sequence[str] = ENGINE_PROGRAM,
) -> AbstractAsyncContextManager[Engine, bool | None]:
    worker = config.worker
    batching = worker.continuous_batching
    if kind == "simulated":
        return open_simulated_engine(
            worker.simulated,
            model_name=worker.model_name,
            turn_timeout_s=batching.turn_timeout_ms / 1000,
        )
    return open_engine(
        model=worker.model,
        model_name=worker.model_name,
        max_batch_size=batching.max_batch_size if batching.enabled else 1,
        turn_timeout_s=batching.turn_timeout_ms / 1000,
        max_restarts=worker.engine.max_restarts,
        restart_window_s=worker.engine.restart_window_s,
        prewarm=worker.prewarm.enabled,
        prewarm_prompt=worker.prewarm.prompt,
        prewarm_max_tokens=worker.prewarm.max_tokens,
        prefix_cache_bytes=worker.engine.prefix_cache_mb * MB,
        wired_limit_bytes=_bytes(worker.engine.wired_limit_mb),
        allocator_cache_bytes=_bytes(worker.engine.allocator_cache_mb),
        general_tool_prompt=worker.tools == "prompt",
        on_progress=on_progress,
        program=program,
    )


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * MB
