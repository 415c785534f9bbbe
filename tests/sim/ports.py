"""The two ports with a record between them and the worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from trio_worker.core.memory import MemoryReading
from trio_worker.core.request import Request
from trio_worker.errors import EngineLost
from trio_worker.ports import (
    BrokerStatistics,
    EngineStatistics,
    Message,
    Outlet,
    Subscription,
    Turn,
)
from trio_worker.protocol.prompt import Prompt
from trio_worker.protocol.turn import EngineInfo, Report, RequestId, Work
from trio_worker.simulated.broker import MemoryBroker
from trio_worker.simulated.engine import SimulatedEngine

from .record import Published, Record

if TYPE_CHECKING:
    from trio_util import AsyncBool

MB = 2**20


class WatchedBroker:
    """Writes down what the worker publishes for requests, and which requests reach it."""

    def __init__(self, broker: MemoryBroker, record: Record) -> None:
        self._broker = broker
        self._record = record

    @property
    def max_payload(self) -> int:
        return self._broker.max_payload

    def new_inbox(self) -> str:
        return self._broker.new_inbox()

    async def subscribe(
        self, subject: str, sink: Callable[[Message], None], *, group: str | None = None
    ) -> Subscription:
        is_intake = subject.startswith("inference") and ".ctl." not in subject
        if subject == "inference.cancel" or not is_intake:
            return await self._broker.subscribe(subject, sink, group=group)

        def take(message: Message) -> None:
            self._record.delivered.append((trio.current_time(), message))
            sink(message)

        return await self._broker.subscribe(subject, take, group=group)

    def open_outlet(
        self, subject: str, *, reply: str | None = None, headers: Mapping[str, str]
    ) -> Outlet:
        published = Published()
        self._record.published.append(published)
        outlet = self._broker.open_outlet(subject, reply=reply, headers=headers)
        common = Message(subject=subject, reply=reply, headers=headers)
        return _WatchedOutlet(outlet, common, published, self._record)

    def publish(self, message: Message) -> None:
        self._broker.publish(message)

    async def flush(self) -> None:
        await self._broker.flush()

    async def wait_lost(self) -> str:
        return await self._broker.wait_lost()

    def statistics(self) -> BrokerStatistics:
        return self._broker.statistics()


class _WatchedOutlet:
    def __init__(
        self, outlet: Outlet, common: Message, published: Published, record: Record
    ) -> None:
        self._outlet = outlet
        self._common = common
        """What all its messages have in common."""
        self._published = published
        self._record = record

    @property
    def unpublished_bytes(self) -> int:
        return self._outlet.unpublished_bytes

    def publish(self, body: bytes, headers: Mapping[str, str]) -> None:
        self._outlet.publish(body, headers)
        message = replace(self._common, body=body, headers={**self._common.headers, **headers})
        self._published.messages.append((trio.current_time(), message))
        terminal = message.headers.get("Terminal")
        number = message.headers.get("Sequence")
        if terminal is not None or number == "0":
            error = message.headers.get("Nats-Service-Error", "").partition(":")[0]
            what = f"message {number}" + (f", {terminal} {error}" if terminal else "")
            self._record.log(message.headers.get("Request-Id", "?"), what)

    def discard(self) -> None:
        self._published.discarded = True
        self._outlet.discard()


@dataclass(slots=True)
class _UnderWay:
    """What the engine has been told and not reported, and whom it held when it last reported."""

    works: deque[Work] = field(default_factory=deque)
    held: frozenset[RequestId] = frozenset()

    def forget(self) -> None:
        self.works.clear()
        self.held = frozenset()


class WatchedEngine:
    """Writes down every turn, and compares who is in the engine with who is running."""

    def __init__(self, engine: SimulatedEngine, record: Record) -> None:
        self._engine = engine
        self._record = record
        self._under_way = _UnderWay()

    @property
    def ready(self) -> AsyncBool:
        return self._engine.ready

    @property
    def info(self) -> EngineInfo | None:
        return self._engine.info

    async def wait_ready(self) -> EngineInfo:
        return await self._engine.wait_ready()

    async def tokenise(self, request: Request) -> Prompt:
        prompt = await self._engine.tokenise(request)
        self._record.tokenised += 1
        return prompt

    def begin(self, work: Work) -> Turn:
        self._check(work)
        turn = self._engine.begin(work)
        self._under_way.works.append(work)
        return _WatchedTurn(turn, self._record, self._under_way)

    def _check(self, work: Work) -> None:
        record, scheduler = self._record, self._record.scheduler
        assert scheduler is not None
        if not self._engine.is_busy:
            self._under_way.works.clear()  # they were lost
            self._under_way.held = self._engine.residents
        expected = set(self._under_way.held)
        for each in (*self._under_way.works, work):
            expected.difference_update(each.remove)
            expected.update(admit.request_id for admit in each.admit)
        record.turns.append((trio.current_time(), tuple(sorted(expected))))
        if not self._engine.ready.value:
            return
        running = set(scheduler.running)
        # Whoever is on trial is alone in the engine while the others keep their slots.
        on_trial = len(expected) <= 1 and record.losses >= 2 and expected <= running
        if expected != running and not on_trial:
            record.violate(
                f"the engine will hold {sorted(expected)}, running are {sorted(running)}"
            )

    def recycle(self) -> None:
        self._record.log("engine", "is to be replaced")
        self._engine.recycle()

    def pardon(self, crashes: int) -> None:
        self._engine.pardon(crashes)

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()


class _WatchedTurn:
    def __init__(self, turn: Turn, record: Record, under_way: _UnderWay) -> None:
        self._turn = turn
        self._record = record
        self._under_way = under_way
        self._began_at = trio.current_time()

    async def report(self) -> Report:
        record = self._record
        try:
            report = await self._turn.report()
            record.most_under_way = max(record.most_under_way, len(self._under_way.works))
            self._under_way.works.popleft()
            self._under_way.held = report.residents
        except EngineLost as lost:
            self._under_way.forget()
            record.losses += 1
            record.log("engine", f"lost: {lost.reason}")
            raise
        finally:
            took_s = trio.current_time() - self._began_at
            record.longest_turn_s = max(record.longest_turn_s, took_s)
        held = report.memory.active + report.memory.cache
        record.engine_bytes_most = max(record.engine_bytes_most, held)
        return report


class CurvedProbe:
    """Memory as the plan says it is."""

    def __init__(self, record: Record) -> None:
        self.used = 100 * MB
        self._record = record

    def read(self, _engine_pid: int | None) -> MemoryReading:
        self._record.used_bytes = self.used
        return MemoryReading(
            used=self.used, available=max(0, 16_000 * MB - self.used), total=16_000 * MB
        )
