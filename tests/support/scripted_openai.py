"""A server that speaks OpenAI's HTTP, as much of it as the page needs; each answer is the test's.

One request a connection, and nothing that the page does not do: it is no server for anybody else.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import trio

from trio_worker.gateway.page import HEADERS, page_files

ASKED_S = 15
"""Within which the page asks, or goes."""
EXCHANGES_MAX = 16
"""Questions that no test has taken up."""


@dataclass
class Exchange:
    """One question of the page, and the answer that a test gives to it, in pieces."""

    stream: trio.SocketStream
    headers: dict[str, str]
    body: Any
    done: trio.Event = field(default_factory=trio.Event)

    async def begin(self, content_type: str = "text/event-stream") -> None:
        await self._send_head(200, {"Content-Type": content_type, "Transfer-Encoding": "chunked"})

    async def write(self, data: str | bytes) -> None:
        """One piece of the body, as it is."""
        raw = data.encode() if isinstance(data, str) else data
        await self.stream.send_all(b"%x\r\n%b\r\n" % (len(raw), raw))

    async def event(self, content: dict[str, Any]) -> None:
        await self.write(f"data: {json.dumps(content)}\n\n")

    async def say(self, *pieces: str) -> None:
        for piece in pieces:
            await self.event(chunk({"content": piece}))

    async def finish(self, reason: str = "stop", tokens: int = 7) -> None:
        """The end of a whole answer, as the gateway sends it."""
        await self.event(chunk({}, reason))
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}
        await self.event({**chunk({}), "choices": [], "usage": usage})
        await self.write("data: [DONE]\n\n")
        await self.end()

    async def answer(self, *pieces: str) -> None:
        await self.begin()
        await self.event(chunk({"role": "assistant", "content": ""}))
        await self.say(*pieces)
        await self.finish()

    async def end(self) -> None:
        """A proper end of the body, whatever has been said."""
        await self.stream.send_all(b"0\r\n\r\n")
        self.done.set()

    def cut(self) -> None:
        """A connection that is lost."""
        # Lingering for no time is a reset.
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.done.set()

    async def refuse(self, status: int, content: str | dict[str, Any], **headers: str) -> None:
        text = content if isinstance(content, str) else json.dumps({"error": content})
        kind = "text/plain" if isinstance(content, str) else "application/json"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await self._send_head(status, {"Content-Type": kind, **named})
        await self.stream.send_all(text.encode())
        self.done.set()

    async def wait_gone(self) -> None:
        """Until the page has given up the connection."""
        with trio.fail_after(ASKED_S):
            with contextlib.suppress(trio.BrokenResourceError):
                while await self.stream.receive_some(1024):
                    pass
        self.done.set()

    async def _send_head(self, status: int, headers: dict[str, str]) -> None:
        await self.stream.send_all(head_of(status, headers))


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "tiny",
        "choices": [choice],
    }


def head_of(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"{name}: {value}" for name, value in {**headers, "Connection": "close"}.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Said", *lines, "", ""]).encode()


class ScriptedOpenAI:
    """What it answers about models, and the questions that came, in their order."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.models = ["tiny"]
        self.key: str | None = None
        """Without which every question and the list of models are refused; None: all may ask."""
        self.gone = False
        """Whether it hangs up on everybody."""
        self.strangers: list[str] = []
        """Paths that were asked for though there is nothing."""
        self._files = page_files()
        self._asked, self._exchanges = trio.open_memory_channel[Exchange](EXCHANGES_MAX)

    async def asked(self) -> Exchange:
        """The next question of the page."""
        with trio.fail_after(ASKED_S):
            return await self._exchanges.receive()

    def asked_nothing(self) -> bool:
        return self._exchanges.statistics().current_buffer_used == 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            # The page may go at any time.
            with contextlib.suppress(trio.BrokenResourceError):
                await self._answer(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        request = await read_request(stream)
        if request is None or self.gone:
            return
        method, path, headers, body = request
        exchange = Exchange(stream, headers, json.loads(body) if body else None)
        allowed = self.key is None or headers.get("authorization") == f"Bearer {self.key}"
        match method, path:
            case _, "/v1/models" | "/v1/chat/completions" if not allowed:
                await exchange.refuse(401, WRONG_KEY)
            case "GET", "/v1/models":
                listed = [{"id": name, "object": "model"} for name in self.models]
                content = json.dumps({"object": "list", "data": listed}).encode()
                await stream.send_all(head_of(200, {"Content-Type": "application/json"}) + content)
            case "POST", "/v1/chat/completions":
                await self._asked.send(exchange)
                await exchange.done.wait()
            case "GET", _ if path in self._files:
                kind, content = self._files[path]
                await stream.send_all(head_of(200, {**HEADERS, "Content-Type": kind}) + content)
            case _:
                self.strangers.append(path)
                await exchange.refuse(404, "there is no such page")


WRONG_KEY: dict[str, Any] = {
    "message": "This key is not known here.",
    "type": "authentication_error",
    "param": None,
    "code": "invalid_api_key",
}


async def read_request(
    stream: trio.SocketStream,
) -> tuple[str, str, dict[str, str], bytes] | None:
    """Method, path, headers in lower case and body; None where the connection ended before."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    while len(body) < int(headers.get("content-length", "0")):
        body += await stream.receive_some(65536)
    method, path, _ = first.split()
    return method, path, headers, body


@contextlib.asynccontextmanager
async def scripted_openai(port: int) -> AsyncIterator[ScriptedOpenAI]:
    """The page and the server behind it, on a port of this machine."""
    server = ScriptedOpenAI(port)
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, server.serve, listeners)
        yield server
        nursery.cancel_scope.cancel()
