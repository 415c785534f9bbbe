"""Workers that take durable jobs, in the event loop: a JetStream, callers, and any worker.

`JobsWorld` is the world; `running_worker` of `worker_rig` puts workers into it:

    async with open_jobs_world() as world, world.worker() as rig:
        await world.submit("j1", prompt="a b c")
        answer = await world.result("j1")
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from support.worker_rig import Rig, running_worker
from trio_worker.jetstream import api
from trio_worker.jetstream.api import PubAck, Stored
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.ports import Broker, Message
from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.jetstream import MemoryJetStream
from trio_worker.wire import subjects

STREAMS = ("INFERENCE", "RESULTS", "DEAD")
JOBS_ON = "nats.jetstream.enabled=true"


@dataclass
class Answered:
    """What is stored for a job."""

    stored: Stored

    @property
    def body(self) -> Any:
        return msgspec.json.decode(self.stored.body)

    @property
    def code(self) -> str:
        return str(self.body["error"]["code"]) if "error" in self.body else "ok"

    @property
    def text(self) -> str:
        choice = self.body["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    @property
    def worker_id(self) -> str:
        return self.stored.headers["Worker-Id"]


@dataclass
class JobsCaller:
    """Someone who submits jobs and hears the answers, over any broker."""

    broker: Broker
    js: JetStream
    model: str
    heard: list[Message] = field(default_factory=list)
    """Every answer that was said, in order: none may come twice."""
    _arrived: trio.Event = field(default_factory=trio.Event)

    def _hear(self, message: Message) -> None:
        self.heard.append(message)
        self._arrived.set()

    async def listen(self) -> None:
        await self.broker.subscribe(subjects.answer("*"), self._hear)

    async def submit(
        self,
        request_id: str | None = None,
        *,
        level: str = "high",
        caller: str | None = None,
        headers: dict[str, str] | None = None,
        for_model: str | None = None,
        **fields: Any,
    ) -> PubAck:
        """Publish a job; waits while there is no stream yet."""
        subject = subjects.job(level=level, caller=caller, model=for_model or self.model)
        if "messages" not in fields:
            fields.setdefault("prompt", f"job {request_id}")
        if request_id is not None:
            fields["request_id"] = request_id
        return await self.submit_raw(msgspec.json.encode(fields), subject, headers)

    async def submit_raw(
        self, body: bytes, subject: str, headers: dict[str, str] | None = None
    ) -> PubAck:
        while True:
            try:
                return await self.js.publish(subject, body, headers, tries=3)
            except api.JetStreamError as error:
                if error.fault is not api.Fault.NOBODY:
                    raise
            await trio.sleep(0.2)

    async def result(self, request_id: str, *, within_s: float = 120.0) -> Answered:
        """The stored answer, once there is one."""
        with trio.fail_after(within_s):
            while True:
                try:
                    found = await self.js.get_last("RESULTS", subjects.result(request_id))
                except api.JetStreamError:
                    found = None
                if found is not None:
                    return Answered(found)
                await trio.sleep(0.05)

    async def results(self) -> list[Stored]:
        """Everything that is stored as an answer."""
        found: list[Stored] = []
        sequence = 1
        while True:
            batch = await self.js.read("RESULTS", subject=subjects.result("*"), sequence=sequence)
            if not batch.messages:
                return found
            found += batch.messages
            sequence = batch.next_sequence

    async def dead(self) -> list[Stored]:
        return list((await self.js.read("DEAD", subject=subjects.DEAD)).messages)

    async def waiting(self) -> int:
        """Jobs in the stream, those under way too."""
        return (await self.js.stream_info("INFERENCE")).state.messages

    async def until_empty(self, *, within_s: float = 600.0) -> None:
        with trio.fail_after(within_s):
            while await self.waiting():  # noqa: ASYNC110 - the server tells nobody
                await trio.sleep(0.2)


@dataclass
class JobsWorld(JobsCaller):
    """With the server, to do something to it."""

    server: MemoryServer = field(default_factory=lambda: MemoryServer(random=random.Random(0)))
    jetstream: MemoryJetStream = field(init=False)

    def worker(
        self, *overrides: str, worker_id: str = "w1", **options: Any
    ) -> AbstractAsyncContextManager[Rig]:
        """A worker that takes jobs."""
        return running_worker(
            JOBS_ON, *overrides, server=self.server, worker_id=worker_id, **options
        )


@asynccontextmanager
async def open_jobs_world(
    *, model: str = "smollm2-135m-instruct", **server: Any
) -> AsyncIterator[JobsWorld]:
    """A memory server with JetStream, and a caller who hears every answer."""
    memory = MemoryServer(random=random.Random(0), **server)
    jetstream = MemoryJetStream(memory)
    async with (
        open_memory_broker(memory, name="jobs-caller") as broker,
        open_jetstream(broker) as js,
    ):
        world = JobsWorld(broker=broker, js=js, model=model, server=memory)
        world.jetstream = jetstream
        await world.listen()
        yield world


@asynccontextmanager
async def jobs_caller(
    broker: Broker, *, model: str = "smollm2-135m-instruct"
) -> AsyncIterator[JobsCaller]:
    """The same over any broker, such as one of a real server."""
    async with open_jetstream(broker) as js:
        caller = JobsCaller(broker, js, model)
        await caller.listen()
        yield caller
