"""A gateway before a whole worker, all in one event loop, on any clock."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from msgspec.structs import replace

from support.http_calls import Caller, Heard, calling
from support.worker_rig import Rig
from trio_worker.config import GatewayConfig
from trio_worker.gateway.endpoints import Api
from trio_worker.gateway.serve import open_api
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Gateway:
    api: Api
    broker: MemoryBroker

    async def ask(
        self, body: object, path: str = CHAT, headers: Mapping[str, str] | None = None
    ) -> Heard:
        """The whole answer on a connection of its own."""
        async with calling(self.api) as caller:
            await send(caller, body, path, headers)
            return await caller.hear("POST")

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Heard:
        async with calling(self.api) as caller:
            await send(caller, None, path, headers)
            return await caller.hear()


@asynccontextmanager
async def open_gateway(
    server: MemoryServer | Rig, *, name: str = "gateway", **config: Any
) -> AsyncIterator[Gateway]:
    """A gateway that knows of the workers that are there."""
    if isinstance(server, Rig):
        server = server.server
    async with (
        open_memory_broker(server, name=name) as broker,
        open_api(broker, replace(GatewayConfig(), **config)) as api,
    ):
        await trio.sleep(0.01)
        yield Gateway(api, broker)


async def send(
    caller: Caller, body: object, path: str = CHAT, headers: Mapping[str, str] | None = None
) -> None:
    method = "GET" if body is None else "POST"
    data = b"" if body is None else json.dumps(body).encode()
    given = {"Host": "localhost", **({} if body is None else {"Content-Type": "application/json"})}
    given |= headers or {}
    if data:
        given["Content-Length"] = str(len(data))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    await caller.stream.send_all("\r\n".join([*lines, "", ""]).encode() + data)


def events(body: bytes) -> list[Any]:
    """What a stream of events says; `[DONE]` is itself."""
    parts = body.decode().split("\n\n")
    assert parts.pop() == "", "a stream ends with an event"
    assert all(each.startswith("data: ") for each in parts)
    data = [each.removeprefix("data: ") for each in parts]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def text_of(chunks: Sequence[Any]) -> str:
    deltas = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    return "".join(
        each["text"] if "text" in each else each["delta"].get("content", "") for each in deltas
    )


def say(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "seed": 5, **fields}
