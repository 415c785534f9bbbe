"""A controller that behaves as mlx-serving's does, its faults included, over any broker.

What it is for a worker, as seen on the real one (version 1.2.1):

1. It asks, waits for a round trip to the server, and subscribes to the answer only then.
2. It knows who has registered since its own start, and ignores the beats of others.
3. It sends only to who is `online`, the one with the lowest `activeRequests` of its last beat.
4. It marks a worker offline whose last timestamp is more than 15 s old, and looks every 5 s.
5. It never stops waiting for an answer, and cancels nothing.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from trio_worker.ports import Broker, Message

CHECK_S = 5.0
OFFLINE_S = 15.0


class NoWorkers(Exception):
    """Nobody is online; HTTP callers get a 503."""


@dataclass
class Answered:
    """What came on one request's subject, whoever it was from."""

    request_id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[Message] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)

    def take(self, message: Message) -> None:
        self.bodies.append(message)
        body = msgspec.json.decode(message.body)
        self.messages.append(body)
        self.times.append(trio.current_time())
        if body["type"] != "token":
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(each["token"] for each in self.messages if each["type"] == "token")

    @property
    def last(self) -> dict[str, Any]:
        return self.messages[-1]

    @property
    def terminals(self) -> int:
        return sum(each["type"] != "token" for each in self.messages)


@dataclass
class Member:
    registration: dict[str, Any]
    status: str
    timestamp: int
    active: int = 0


class ScriptedController:
    """Its state: the workers that it knows, and all that it has been told."""

    def __init__(self, broker: Broker, *, wall_clock: Callable[[], float], lag_s: float) -> None:
        self.broker = broker
        self.members: dict[str, Member] = {}
        self.told: list[tuple[str, dict[str, Any], float]] = []
        """The subject's last token, the body, and when."""
        self._wall_clock = wall_clock
        self._lag_s = lag_s
        self._turns = itertools.count()
        self._changed = trio.Event()

    def take(self, message: Message) -> None:
        kind, body = message.subject.rpartition(".")[2], msgspec.json.decode(message.body)
        self.told.append((kind, body, trio.current_time()))
        known = self.members.get(body["workerId"])
        if kind == "register":
            self.members[body["workerId"]] = Member(
                body, body["status"], body["timestamp"], known.active if known else 0
            )
        elif kind == "deregister":
            self.members.pop(body["workerId"], None)
        elif known is not None:
            known.status, known.timestamp = body["status"], body["timestamp"]
            known.active = body["metrics"]["activeRequests"]
        self._changed.set()
        self._changed = trio.Event()

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.told]

    async def until(self, holds: Callable[[], bool], *, within_s: float = 10.0) -> None:
        with trio.fail_after(within_s):
            while not holds():
                await self._changed.wait()

    async def check_health(self) -> None:
        while True:
            await trio.sleep(CHECK_S)
            for member in self.members.values():
                if 1000 * self._wall_clock() - member.timestamp > 1000 * OFFLINE_S:
                    member.status = "offline"

    def choose(self, model: str) -> str:
        online = [
            (member.active, worker_id)
            for worker_id, member in self.members.items()
            if member.status == "online"
            and model in member.registration["skills"]["availableModels"]
        ]
        if not online:
            raise NoWorkers
        least = min(active for active, _ in online)
        idle = [worker_id for active, worker_id in online if active == least]
        return idle[next(self._turns) % len(idle)]

    async def send(self, worker_id: str, answered: Answered, body: bytes) -> None:
        """Ask, and listen when it is late."""
        self.broker.publish(Message(subject=f"worker.{worker_id}.inference", body=body))
        await self.broker.flush()
        await trio.sleep(self._lag_s)
        await self.broker.subscribe(f"response.{answered.request_id}", answered.take)

    async def begin(
        self, prompt: str = "hello", *, model: str = "smollm2-135m-instruct", **options: Any
    ) -> Answered:
        """Have a request served; returns when it is listened for."""
        answered = Answered(str(uuid.uuid4()))
        request = {
            "requestId": answered.request_id,
            "modelId": model,
            "prompt": prompt,
            **options,
        }
        await self.send(self.choose(model), answered, msgspec.json.encode(request))
        return answered

    async def ask(self, prompt: str = "hello", *, wait_s: float = 30.0, **options: Any) -> Answered:
        """Have a request served, to its end. A caller who hangs is a `TooSlowError`."""
        answered = await self.begin(prompt, **options)
        with trio.fail_after(wait_s):
            await answered.ended.wait()
        return answered


@asynccontextmanager
async def running_controller(
    broker: Broker, *, wall_clock: Callable[[], float], lag_s: float = 0.0
) -> AsyncIterator[ScriptedController]:
    """One that knows nobody yet; leaving it leaves its subscriptions, as a killed one does not."""
    controller = ScriptedController(broker, wall_clock=wall_clock, lag_s=lag_s)
    held = [
        await broker.subscribe(f"worker.{kind}", controller.take)
        for kind in ("register", "heartbeat", "deregister")
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.check_health)
        yield controller
        nursery.cancel_scope.cancel()
    with trio.move_on_after(1, shield=True):
        for subscription in held:
            await subscription.drain()
