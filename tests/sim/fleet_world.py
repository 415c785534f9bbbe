"""One plan, one run: several workers on one message system, and what befalls them."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from trio_worker import worker as worker_module
from trio_worker.config import Config
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.ports import Broker, Engine, Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.simulated.engine import SimulatedEngine, open_simulated_engine
from trio_worker.simulated.jetstream import MemoryJetStream
from trio_worker.wire import subjects

from .fleet_plan import Befalling, FleetCall, FleetPlan, Job, Member
from .fleet_record import Cut, FleetRecord, Life, Rooms, current_life
from .harness import run_deterministic
from .plan import MODEL_NAME
from .ports import CurvedProbe
from .record import Record
from .world import make_config

LOADED_S = 5.0
"""All are ready by then, and nothing befalls anybody before."""
PATIENCE_S = 300.0
END_S = 60.0


@dataclass
class MemberWorld:
    """The moving parts of one member."""

    member: Member
    config: Config
    wanted: trio.Event = field(default_factory=trio.Event)
    """It is to run."""
    ended: trio.Event = field(default_factory=trio.Event)
    stops: trio.MemorySendChannel[None] | None = None
    scope: trio.CancelScope | None = None
    broker: MemoryBroker | None = None
    engine: SimulatedEngine | None = None
    life: Life | None = None
    cut: Cut | None = None
    is_frozen: bool = False

    @property
    def is_up(self) -> bool:
        return self.life is not None and self.life.ended_at is None


@dataclass
class FleetWorld:
    plan: FleetPlan
    record: FleetRecord
    server: MemoryServer
    streams: MemoryJetStream
    members: dict[str, MemberWorld]
    away: list[Cut] = field(default_factory=list)
    """Who is on the other side of a split."""

    @property
    def jobs_left(self) -> int:
        jobs = self.streams.streams.get("INFERENCE")
        return 0 if jobs is None else len(jobs.messages)


def simulate_fleet(plan: FleetPlan, *, schedule: int | None = None) -> FleetRecord:
    """Run the plan to its end; returns what was recorded."""
    record = FleetRecord()

    async def main() -> None:
        await _main(plan, record)

    run_deterministic(
        main, seed=plan.seed if schedule is None else schedule, instruments=[Rooms(record)]
    )
    return record


async def _main(plan: FleetPlan, record: FleetRecord) -> None:
    server = MemoryServer(random=random.Random(plan.seed))
    world = FleetWorld(
        plan=plan,
        record=record,
        server=server,
        streams=MemoryJetStream(server),
        members={
            each.worker_id: MemberWorld(each, make_config(each.overrides)) for each in plan.members
        },
    )
    _listen_in(server, record)
    with record.watching():
        async with open_memory_broker(server, name="caller") as caller, trio.open_nursery() as all_:
            for each in world.members.values():
                each.wanted.set()
                all_.start_soon(_member, world, each)
            await trio.sleep(LOADED_S)
            async with open_jetstream(caller) as jetstream:
                await _drive(world, caller, jetstream)
            await _end_all(world)
            _look_into_the_streams(world)
            all_.cancel_scope.cancel()


def _look_into_the_streams(world: FleetWorld) -> None:
    record, streams = world.record, world.streams.streams
    if not world.plan.has_jobs:
        return
    record.jobs_left = world.jobs_left
    for kept in streams["RESULTS"].messages.values():
        message = Message(subject=kept.subject, body=kept.body, headers=kept.headers)
        record.results.setdefault(kept.subject.rpartition(".")[2], []).append(message)
    record.dead += [
        Message(subject=kept.subject, body=kept.body, headers=kept.headers)
        for kept in streams["DEAD"].messages.values()
    ]


def _listen_in(server: MemoryServer, record: FleetRecord) -> None:
    """Write down what is routed; a subscription would be somebody who listens."""
    route = server._route

    def routed(parcel: Any, sender: Any) -> None:
        envelope = parcel.envelope
        if envelope.subject.startswith(("inference", "jobs.", "results.", "dead.")):
            headers = {**envelope.headers, **parcel.headers}
            message = Message(
                subject=envelope.subject, body=parcel.body, reply=envelope.reply, headers=headers
            )
            record.published.append((trio.current_time(), message))
        route(parcel, sender)

    server._route = routed  # type: ignore[method-assign]


# --- a member -------------------------------------------------------------------------------


async def _member(world: FleetWorld, each: MemberWorld) -> None:
    """Run it as often as it is wanted."""
    for number in itertools.count():
        await each.wanted.wait()
        each.wanted = trio.Event()
        each.ended = trio.Event()
        await _live(world, each, number)
        each.ended.set()


async def _live(world: FleetWorld, each: MemberWorld, number: int) -> None:
    record, worker_id = world.record, each.member.worker_id
    life = each.life = record.begin_life(worker_id)
    current_life.set(life)
    each.stops, stops = trio.open_memory_channel[None](8)
    each.scope = trio.CancelScope()
    rng = random.Random(f"{world.plan.seed} {worker_id} {number}")

    def on_ready(_observed: object) -> None:
        life.ready_at = trio.current_time()
        for cut in record.cuts:
            if cut.worker == worker_id and cut.why == "kill":
                cut.ended = min(cut.ended, trio.current_time())
        record.log(worker_id, "ready")

    @asynccontextmanager
    async def open_broker() -> AsyncIterator[Broker]:
        async with open_memory_broker(world.server, name=f"{worker_id}-{number}-") as broker:
            each.broker = broker
            yield broker

    @asynccontextmanager
    async def open_engine() -> AsyncIterator[Engine]:
        async with open_simulated_engine(
            each.config.worker.simulated, model_name=each.config.worker.model_name, random=rng
        ) as engine:
            each.engine = engine
            yield engine

    how = "ok"
    try:
        with each.scope:
            given = worker_module.World(
                stops=stops,
                open_broker=open_broker,
                open_engine=open_engine,
                probe=CurvedProbe(Record()),
                rng=rng,
                wall_clock=lambda: 1_700_000_000.0 + trio.current_time(),
                on_ready=on_ready,
            )
            await worker_module.run_worker(each.config, given)
        if each.scope.cancelled_caught:
            how = "killed"
    except Exception as exc:  # noqa: BLE001 - written down, and looked at in the end
        how = repr(exc)
        record.violate(f"{worker_id} failed: {how}")
    finally:
        record.end_life(life, how)
        each.broker = each.engine = None


def _kill(world: FleetWorld, each: MemberWorld) -> None:
    """As SIGKILL: what it had said and not sent is gone, and it says nothing any more."""
    if not each.is_up:
        return
    assert each.life is not None
    assert each.scope is not None
    each.life.killed = True
    if each.broker is not None:
        each.broker.disconnect()
    each.scope.cancel(reason="killed")
    world.record.cuts.append(Cut(each.member.worker_id, "kill", trio.current_time()))


def _befall(world: FleetWorld, befalling: Befalling) -> None:
    world.record.log("world", f"{befalling.what} {befalling.member or ''}".rstrip())
    if befalling.member is None:
        everywhere: dict[str, Callable[[], object]] = {
            "slow": lambda: setattr(world.server, "delay_s", befalling.value),
            "heal": lambda: _heal(world),
            "forget": world.streams.forget_deliveries,
        }
        everywhere[befalling.what]()
        return
    each = world.members[befalling.member]
    actions: dict[str, Callable[[], object]] = {
        "split": lambda: _split(world, each),
        "kill": lambda: _kill(world, each),
        "start": lambda: None if each.is_up else each.wanted.set(),
        "stop": lambda: _stop(each),
        "crash": lambda: None if each.engine is None else each.engine.crash(),
        "disconnect": lambda: _cut(world, each, frozen=False),
        "freeze": lambda: _cut(world, each, frozen=True),
        "reconnect": lambda: _mend(world, each),
        "thaw": lambda: _mend(world, each),
    }
    actions[befalling.what]()


def _stop(each: MemberWorld) -> None:
    """As SIGTERM."""
    if each.is_up and each.stops is not None:
        with suppress(trio.WouldBlock):
            each.stops.send_nowait(None)


def _cut(world: FleetWorld, each: MemberWorld, *, frozen: bool) -> None:
    if each.broker is None or each.cut is not None or not each.is_up:
        return
    each.cut = Cut(each.member.worker_id, "freeze" if frozen else "disconnect", trio.current_time())
    world.record.cuts.append(each.cut)
    each.is_frozen = frozen
    if each.is_frozen:
        each.broker.freeze()
    else:
        each.broker.disconnect()


def _split(world: FleetWorld, each: MemberWorld) -> None:
    """It is on the other side of a split from the callers and the streams, with others maybe."""
    if each.broker is not None and each.is_up:
        cut = Cut(each.member.worker_id, "split", trio.current_time())
        world.record.cuts.append(cut)
        world.away.append(cut)
        world.server.split(*world.server._cut_off, each.broker)


def _heal(world: FleetWorld) -> None:
    world.server.heal()
    for cut in world.away:
        cut.ended = trio.current_time()
    world.away.clear()


def _mend(world: FleetWorld, each: MemberWorld) -> None:
    if each.cut is None:
        return
    each.cut.ended = trio.current_time()
    each.cut = None
    if each.broker is None or not each.is_up:
        return
    if each.is_frozen:
        each.broker.thaw()
    else:
        each.broker.reconnect()


# --- the callers and the rest of the world --------------------------------------------------


async def _drive(world: FleetWorld, caller: MemoryBroker, jetstream: JetStream) -> None:
    """Let everything happen at its time, then mend all, and wait until all is quiet."""
    async with trio.open_nursery() as publishers:
        await _let_it_happen(world, caller, publishers, jetstream)
    record = world.record
    record.log("world", "all is mended")
    _heal(world)
    for each in world.members.values():
        _mend(world, each)
        if not each.is_up:
            each.wanted.set()
    with trio.move_on_after(PATIENCE_S):
        await trio.sleep(1 + 2 * world.plan.ack_wait_s)
        # Nobody tells when the last of it is over, and time costs nothing here.
        while record.in_flight or world.jobs_left:  # noqa: ASYNC110
            await trio.sleep(1)


async def _let_it_happen(
    world: FleetWorld, caller: MemoryBroker, publishers: trio.Nursery, jetstream: JetStream
) -> None:
    agenda: list[tuple[float, int, Callable[[], Any]]] = []
    numbers = itertools.count()

    def at(time: float, action: Callable[[], Any]) -> None:
        heapq.heappush(agenda, (LOADED_S + time, next(numbers), action))

    plan, record = world.plan, world.record
    for call in plan.calls:
        received = record.received.setdefault(call.inbox, [])
        await caller.subscribe(call.inbox, partial(_take, received))
        at(call.at, partial(_send, caller, call))
    for job in plan.jobs:
        at(job.at, partial(publishers.start_soon, _publish, world, jetstream, job))
    for befalling in plan.befallings:
        at(befalling.at, partial(_befall, world, befalling))
    while agenda:
        time, _, action = heapq.heappop(agenda)
        await trio.sleep_until(time)
        action()


def _take(received: list[tuple[float, Message]], message: Message) -> None:
    received.append((trio.current_time(), message))


async def _publish(world: FleetWorld, jetstream: JetStream, job: Job) -> None:
    subject = subjects.job(level=job.level, caller=job.caller, model=MODEL_NAME)
    await jetstream.publish(subject, job.body, {"Nats-Msg-Id": job.request_id}, tries=3)
    world.record.log(job.request_id, "published")


def _send(caller: MemoryBroker, call: FleetCall) -> None:
    caller.publish(Message(subject=call.subject, body=call.body, reply=call.inbox))


async def _end_all(world: FleetWorld) -> None:
    for each in world.members.values():
        _stop(each)
    for each in world.members.values():
        with trio.move_on_after(END_S):
            await each.ended.wait()
        if not each.ended.is_set():
            world.record.violate(f"{each.member.worker_id} does not end")
