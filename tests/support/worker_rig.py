"""A whole worker in the event loop: the simulated engine, the memory broker, and a caller."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio
from trio_util import AsyncValue

from trio_worker.client import Chunk, Client
from trio_worker.config import Config, load_config
from trio_worker.core.memory import MemoryReading
from trio_worker.errors import WorkerError
from trio_worker.monitoring.observed_worker import ObservedWorker
from trio_worker.monitoring.snapshot import Snapshot
from trio_worker.ports import Broker, Host, Message, ProgressSink, ServiceManager
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.simulated.engine import Faults, SimulatedEngine, open_simulated_engine
from trio_worker.wire import subjects
from trio_worker.worker import World, run_worker

MB = 2**20
WORKER_ID = "w1"


def make_config(*overrides: str) -> Config:
    return load_config(
        None, environ={}, overrides=[f"worker.id={WORKER_ID}", *overrides], hostname="host"
    )


@dataclass
class FakeProbe:
    """Memory as the test says it is."""

    used: int = 100 * MB
    available: int = 8000 * MB

    def read(self, _engine_pid: int | None) -> MemoryReading:
        return MemoryReading(used=self.used, available=self.available, total=16_000 * MB)


@dataclass
class Rig:
    server: MemoryServer
    caller: MemoryBroker
    client: Client
    probe: FakeProbe
    engine: SimulatedEngine
    broker: MemoryBroker
    observed: ObservedWorker
    finished: trio.Event
    worker_id: str
    _stops: trio.MemorySendChannel[None]
    _scope: trio.CancelScope
    terminal: dict[str, list[Message]] = field(default_factory=dict)

    def stop(self) -> None:
        """As SIGTERM does."""
        self._stops.send_nowait(None)

    def kill(self) -> None:
        """As SIGKILL does: it says nothing any more, to anybody."""
        self.broker.disconnect()
        self._scope.cancel()

    def snapshot(self) -> Snapshot:
        return self.observed.snapshot()

    async def ask(self, **fields: Any) -> Reply:
        """Ask this worker and collect the whole answer, or the error."""
        reply = Reply()
        try:
            async with self.client.ask(fields, worker_id=self.worker_id) as answer:
                async for chunk in answer:
                    reply.chunks.append(chunk)
                    reply.times.append(trio.current_time())
        except WorkerError as error:
            reply.error = error
            reply.times.append(trio.current_time())
        return reply

    async def raw(
        self, body: bytes, *, subject: str = f"inference.{WORKER_ID}", wait_s: float = 60.0
    ) -> list[Message]:
        """Send bytes; returns every message up to the terminal one and a second beyond."""
        messages: list[Message] = []
        ended = trio.Event()

        def take(message: Message) -> None:
            messages.append(message)
            if "Terminal" in message.headers:
                ended.set()

        inbox = self.caller.new_inbox()
        subscription = await self.caller.subscribe(inbox, take)
        self.caller.publish(Message(subject=subject, body=body, reply=inbox))
        with trio.move_on_after(wait_s):
            await ended.wait()
        await trio.sleep(1)
        await subscription.drain()
        return messages


@dataclass
class Reply:
    chunks: list[Chunk] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: WorkerError | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def code(self) -> str:
        return self.error.code if self.error is not None else "ok"

    @property
    def worker(self) -> Mapping[str, Any]:
        note = self.chunks[-1].worker
        assert note is not None
        return note

    @property
    def usage(self) -> Mapping[str, Any]:
        usage = self.chunks[-1].usage
        assert usage is not None
        return usage


def decode(message: Message) -> Any:
    return msgspec.json.decode(message.body)


@asynccontextmanager
async def running_worker(
    *overrides: str,
    faults: Faults | None = None,
    load_s: float = 0.0,
    restart_s: float = 0.5,
    max_restarts: int = 1_000_000,
    context_length: int = 8192,
    max_payload: int = 2**20,
    wait_ready: bool = True,
    engine_options: Mapping[str, Any] | None = None,
    on_progress: ProgressSink | None = None,
    service_manager: ServiceManager | None = None,
    open_gateway: Callable[[AsyncValue[int]], AbstractAsyncContextManager[None]] | None = None,
    rng: random.Random | None = None,
    server: MemoryServer | None = None,
    worker_id: str = WORKER_ID,
    wall_clock: Callable[[], float] = lambda: 1_700_000_000.0,
) -> AsyncIterator[Rig]:
    """A worker that serves; at the end it is stopped, and must have left nothing behind.

    Several on one `server` have an id each.
    """
    config = make_config(f"worker.id={worker_id}", *overrides)
    server = server or MemoryServer(random=random.Random(0), max_payload=max_payload)
    probe = FakeProbe()
    stops_send, stops = trio.open_memory_channel[None](8)
    opened: dict[str, Any] = {}
    ready, finished = trio.Event(), trio.Event()

    @asynccontextmanager
    async def open_broker() -> AsyncIterator[Broker]:
        async with open_memory_broker(server, name=f"worker-{worker_id}") as broker:
            opened["broker"] = broker
            yield broker

    @asynccontextmanager
    async def open_engine() -> AsyncIterator[SimulatedEngine]:
        async with open_simulated_engine(
            config.worker.simulated,
            model_name=config.worker.model_name,
            context_length=context_length,
            load_s=load_s,
            restart_s=restart_s,
            max_restarts=max_restarts,
            faults=faults,
            **(engine_options or {}),
        ) as engine:
            opened["engine"] = engine
            yield engine

    def on_ready(observed: Any) -> None:
        opened["observed"] = observed
        ready.set()

    scope = trio.CancelScope()

    async def run() -> None:
        try:
            world = World(
                stops=stops,
                open_broker=open_broker,
                open_engine=open_engine,
                probe=probe,
                rng=rng or random.Random(1),
                wall_clock=wall_clock,
                host=Host(hostname="host", address="192.0.2.1", cpu_percent=lambda: 12.5),
                on_ready=on_ready,
                on_progress=on_progress,
                service_manager=service_manager,
                open_gateway=open_gateway,
            )
            with scope:
                await run_worker(config, world)
        finally:
            finished.set()

    async with open_memory_broker(server, name=f"caller-{worker_id}") as caller:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            if wait_ready:
                await ready.wait()
            else:
                await trio.testing.wait_all_tasks_blocked()
            rig = Rig(
                server=server,
                caller=caller,
                # The worker's own word, unsoftened by retries.
                client=Client(caller, timeout_ms=None, attempts=1),
                probe=probe,
                engine=opened["engine"],
                broker=opened["broker"],
                observed=opened.get("observed"),  # type: ignore[arg-type]
                finished=finished,
                worker_id=worker_id,
                _stops=stops_send,
                _scope=scope,
            )
            yield rig
            if not finished.is_set():
                rig.stop()
                with trio.fail_after(120):
                    await finished.wait()
        assert not [
            each for each in server._subscriptions if each.broker is opened.get("broker")
        ], "subscriptions are left"
    if "observed" in opened:
        snapshot = opened["observed"].snapshot()
        assert snapshot.requests.in_flight == 0
        assert snapshot.queue.depth == 0


def subject_of(request_id: str) -> str:
    return subjects.control(WORKER_ID, request_id)
