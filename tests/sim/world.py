"""One plan, one run: the worker, its callers, and what befalls it, in virtual time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import trio

from trio_worker import worker as worker_module
from trio_worker.config import Config, load_config
from trio_worker.flow import reply_stream as reply
from trio_worker.ports import Broker, Engine, Message
from trio_worker.simulated.broker import (
    MemoryBroker,
    MemoryServer,
    MemorySubscription,
    open_memory_broker,
)
from trio_worker.simulated.engine import SimulatedEngine, open_simulated_engine

from .harness import run_deterministic
from .plan import WORKER_ID, Call, Happening, Plan
from .ports import MB, CurvedProbe, WatchedBroker, WatchedEngine
from .record import Record, Steps, watching_parts

PATIENCE_S = 120.0
"""Longer than any deadline in a plan."""
SETTLE_S = 2.0
"""What was sent last takes its time to arrive."""
END_S = 10.0
"""What an end may take on top of the drain."""


@dataclass
class World:
    """The moving parts of a run."""

    plan: Plan
    config: Config
    record: Record
    server: MemoryServer
    probe: CurvedProbe
    stops: trio.MemorySendChannel[None]
    scope: trio.CancelScope
    engine: SimulatedEngine | None = None
    broker: MemoryBroker | None = None
    root: trio.lowlevel.Task | None = None
    finished: trio.Event = field(default_factory=trio.Event)


def simulate(
    plan: Plan,
    *,
    instruments: Callable[[World], Iterable[trio.abc.Instrument]] | None = None,
    schedule: int | None = None,
) -> Record:
    """Run the plan to its end; returns what was recorded."""
    record = Record()
    record.critical_bytes = plan.critical_mb * MB

    async def main() -> None:
        await _main(plan, record, instruments)

    run_deterministic(
        main, seed=plan.seed if schedule is None else schedule, instruments=[Steps(record)]
    )
    return record


@lru_cache(maxsize=64)
def make_config(overrides: tuple[str, ...]) -> Config:
    return load_config(
        None, environ={}, overrides=[f"worker.id={WORKER_ID}", *overrides], hostname="host"
    )


async def _main(
    plan: Plan,
    record: Record,
    instruments: Callable[[World], Iterable[trio.abc.Instrument]] | None,
) -> None:
    stops_send, stops = trio.open_memory_channel[None](8)
    server = MemoryServer(random=random.Random(plan.seed))
    world = World(
        plan=plan,
        config=make_config(plan.overrides),
        record=record,
        server=server,
        probe=CurvedProbe(record),
        stops=stops_send,
        scope=trio.CancelScope(),
    )
    added = list(instruments(world)) if instruments is not None else []
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    async with open_memory_broker(server, name="caller") as caller:
        with watching(record), mock.patch.object(reply, "BACKLOG_BYTES_MAX", plan.backlog_bytes):
            async with trio.open_nursery() as nursery:
                for instrument in added:
                    trio.lowlevel.add_instrument(instrument)
                nursery.start_soon(_run, world, stops)
                await _drive(world, caller)
                with trio.move_on_after(plan.drain_timeout_s + END_S):
                    await world.finished.wait()
                if not world.finished.is_set():
                    record.violate("the worker does not end")
                    world.scope.cancel()
                # What was published still travels to its caller.
                await trio.sleep(server.delay_s + 1)
                nursery.cancel_scope.cancel()
        for instrument in added:
            trio.lowlevel.remove_instrument(instrument)
        record.left_over += [
            f"a subscription to {each._pattern}"
            for each in server._subscriptions
            if each.broker is not caller
        ]
    tasks = trio.lowlevel.current_statistics().tasks_living - tasks_before
    if tasks:
        record.left_over.append(f"{tasks} tasks")


def watching(record: Record) -> AbstractContextManager[None]:
    """Let `record` know the parts that a worker makes for itself."""
    return watching_parts(
        {
            "Admission": record.watch_admission,
            "Scheduler": record.watch_scheduler,
            "RequestQueue": record.watch_queue,
        }
    )


async def _run(world: World, stops: trio.MemoryReceiveChannel[None]) -> None:
    plan, config, record = world.plan, world.config, world.record
    world.root = trio.lowlevel.current_task()

    @asynccontextmanager
    async def open_broker() -> AsyncIterator[Broker]:
        try:
            async with open_memory_broker(world.server, name="worker") as broker:
                world.broker = broker
                try:
                    yield WatchedBroker(broker, record)
                finally:
                    record.log("broker", "closes")
        finally:
            record.outbox_dropped = broker.statistics().dropped

    @asynccontextmanager
    async def open_engine() -> AsyncIterator[Engine]:
        async with open_simulated_engine(
            config.worker.simulated,
            model_name=config.worker.model_name,
            context_length=plan.context_length,
            load_s=plan.load_s,
            restart_s=plan.restart_s,
            max_restarts=plan.max_restarts,
            faults=plan.faults,
            random=random.Random(plan.seed + 1),
            turn_timeout_s=plan.turn_timeout_s,
            prefix_cache_tokens=plan.prefix_cache_tokens,
            cache_bytes_per_token=plan.cache_bytes_per_token,
        ) as engine:
            world.engine = engine
            yield WatchedEngine(engine, record)

    how = "ok"
    try:
        with world.scope:
            given = worker_module.World(
                stops=stops,
                open_broker=open_broker,
                open_engine=open_engine,
                probe=world.probe,
                rng=random.Random(plan.seed + 2),
                wall_clock=lambda: 1_700_000_000.0,
                on_ready=lambda _: record.note_ready(),
            )
            await worker_module.run_worker(config, given)
    except Exception as exc:
        how = _described(exc)
        if "trio.Cancelled" in how:
            raise
    finally:
        record.note_end("cancelled" if world.scope.cancelled_caught else how)
        world.finished.set()


def _described(exc: BaseException) -> str:
    if isinstance(exc, BaseExceptionGroup):
        return "; ".join(_described(each) for each in exc.exceptions)
    return f"{type(exc).__name__}: {exc}"


# --- the callers and the rest of the world --------------------------------------------------


async def _drive(world: World, caller: MemoryBroker) -> None:
    """Let everything happen at its time, then stop the worker once it is idle."""
    callers = _Callers(world, caller)
    agenda: list[tuple[float, int, Callable[[], Any]]] = []
    numbers = itertools.count()

    def at(time: float, action: Callable[[], Any]) -> None:
        heapq.heappush(agenda, (time, next(numbers), action))

    for call in world.plan.calls:
        at(call.at, partial(callers.send, call))
        if call.cancel is not None:
            at(call.at + call.cancel_after_s, partial(callers.cancel, call))
    for happening in world.plan.happenings:
        at(happening.at, partial(_happen, world, happening))
    for call in world.plan.calls:
        if call.inbox is not None and call.inbox not in callers.subscriptions:
            await callers.listen(call.inbox)
    while agenda:
        time, _, action = heapq.heappop(agenda)
        await trio.sleep_until(time)
        action()
    with trio.move_on_after(PATIENCE_S):
        await trio.sleep(SETTLE_S)
        await world.record.wait_quiet()
    if not world.finished.is_set():
        _happen(world, Happening(at=0, what="stop"))


def _happen(world: World, happening: Happening) -> None:
    if world.finished.is_set():
        return
    world.record.log("world", f"{happening.what} {happening.value or ''}".rstrip())
    engine, broker = world.engine, world.broker
    if engine is None or broker is None:
        # Neither is there yet: nothing can happen to them.
        actions: dict[str, Callable[[], object]] = {}
    else:
        actions = {
            "crash": engine.crash,
            "recycle": engine.recycle,
            "disconnect": broker.disconnect,
            "reconnect": broker.reconnect,
            "close": lambda: broker.close_for_good("the server does not want us back"),
        }
    actions |= {
        "stop": lambda: world.stops.send_nowait(None),
        "memory": lambda: setattr(world.probe, "used", int(happening.value * MB)),
        "slow": lambda: setattr(world.server, "delay_s", happening.value),
        "cancel": world.scope.cancel,
    }
    if happening.what == "stop":
        world.record.stops_at.append(trio.current_time())
    if (action := actions.get(happening.what)) is not None:
        action()


class _Callers:
    """All callers on one connection; every call has an inbox of its own."""

    def __init__(self, world: World, broker: MemoryBroker) -> None:
        self.subscriptions: dict[str, MemorySubscription] = {}
        self._world = world
        self._broker = broker

    async def listen(self, inbox: str) -> None:
        received = self._world.record.received.setdefault(inbox, [])

        def take(message: Message) -> None:
            received.append((trio.current_time(), message))

        if inbox.startswith("_INBOX.") and not inbox.endswith(">"):
            self.subscriptions[inbox] = await self._broker.subscribe(inbox, take)

    def send(self, call: Call) -> None:
        for _ in range(call.copies):
            self._broker.publish(Message(subject=call.subject, body=call.body, reply=call.inbox))

    def cancel(self, call: Call) -> None:
        assert call.fields is not None
        request_id = call.fields["request_id"]
        control = f"inference.{WORKER_ID}.ctl.{request_id}"
        self._world.record.log(request_id, f"cancel by {call.cancel}")
        match call.cancel:
            case "control":
                self._broker.publish(Message(subject=control, body=b"cancel"))
            case "broadcast":
                body = b'{"request_id": "%s"}' % request_id.encode()
                self._broker.publish(Message(subject="inference.cancel", body=body))
            case "reply":
                for _, message in self._world.record.received.get(call.inbox or "", [])[-1:]:
                    if message.reply is not None:
                        self._broker.publish(Message(subject=message.reply, body=b"cancel"))
            case "vanish":
                subscription = self.subscriptions.pop(call.inbox or "", None)
                if subscription is not None:
                    self._world.server._subscriptions.remove(subscription)
            case "stranger":
                headers = {"Status": "503", "Nats-Subject": "_INBOX.another"}
                self._broker.publish(Message(subject=control, headers=headers))
