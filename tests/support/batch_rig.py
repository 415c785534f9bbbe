"""A queue of jobs with a worker that answers them by a script, for what is before the queue."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from support.http_calls import Heard, calling
from trio_worker.core.priority import NAMES
from trio_worker.gateway.batch_jobs import Job, Terms
from trio_worker.gateway.batch_queue import Streams
from trio_worker.gateway.endpoints import Api
from trio_worker.gateway.fields import Rules
from trio_worker.gateway.keys import ANYBODY
from trio_worker.gateway.models import Limits
from trio_worker.jetstream import api, streams
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.ports import Broker, Message
from trio_worker.wire import subjects

MODEL = "qwen2.5"
CHAT = "/v1/chat/completions"
STREAMS = Streams(jobs="INFERENCE", results="RESULTS")
FAILING = "fail"
"""A prompt with this word is answered with an error."""


def line(custom_id: str, prompt: str = "hi", **more: Any) -> dict[str, Any]:
    """A line of a file of requests."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def text_of(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """A file."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def lines_of(text: bytes) -> list[Any]:
    return [json.loads(each) for each in text.splitlines()]


def terms(**changes: Any) -> Terms:
    values: dict[str, Any] = {
        "key": ANYBODY,
        "rules": Rules(body_limit_bytes=100_000, timeout_ms=60_000),
        "priority": "low",
        "limits_of": lambda _: Limits(),
        "message_bytes": 1_000_000,
    }
    return Terms(**(values | changes))


def job(number: int, batch: str = "b") -> Job:
    request_id = f"{batch}-{number}"
    return Job(
        custom_id=f"c{number}",
        request_id=request_id,
        subject=subjects.job(level="low", caller=None, model=MODEL),
        body=json.dumps({"request_id": request_id, "prompt": f"p{number}"}).encode(),
    )


async def make_streams(js: JetStream, **changes: Any) -> None:
    """As workers do, with `changes` of that of the jobs."""
    await js.ensure_stream(streams.jobs_stream(STREAMS.jobs) | changes)
    await js.ensure_stream(streams.results_stream(STREAMS.results, keep_s=86_400))
    await js.ensure_stream(streams.dead_stream("DEAD"))
    for level in NAMES:
        consumer = streams.job_consumer(level, MODEL, ack_wait_s=30)
        await js.ensure_consumer(STREAMS.jobs, consumer)


@dataclass
class ScriptedWorker:
    """Does one job after the other. Its state: which it has done, and whether it may go on."""

    js: JetStream
    job_s: float
    done: list[str] = field(default_factory=list)
    requests: dict[str, Any] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)

    async def work(self) -> None:
        async with trio.open_nursery() as nursery:
            for level in NAMES:
                nursery.start_soon(self._work_on, level)

    async def _work_on(self, level: str) -> None:
        consumer = streams.consumer_name(level, MODEL)
        async with self.js.open_pulls() as pulls:
            while True:
                pulls.ask(STREAMS.jobs, consumer, priority=0, expires_s=30)
                message = await pulls.receive()
                if api.status_of(message) is None:
                    await self._do(message)

    async def _do(self, message: Message) -> None:
        request = json.loads(message.body)
        request_id = request["request_id"]
        if await self.js.get_last(STREAMS.results, subjects.result(request_id)) is None:
            self.runs[request_id] += 1
            self.requests[request_id] = request
            await trio.sleep(self.job_s)
            await answer(self.js, request_id, fails=FAILING in message.body.decode())
        self.done.append(request_id)
        assert message.reply is not None
        self.js.broker.publish(Message(subject=message.reply, body=api.ACK))


async def answer(js: JetStream, request_id: str, *, fails: bool = False) -> None:
    """Store the answer of a worker to a job."""
    if fails:
        error = {"code": "CONTEXT_LENGTH_EXCEEDED", "message": "too long", "details": {}}
        body: dict[str, Any] = {"error": {**error, "retryable": False, "retry_after_ms": None}}
    else:
        message = {"role": "assistant", "content": f"answer to {request_id}"}
        body = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            "worker": {"id": "w1", "seed": 1},
        }
    headers = {"Terminal": "error" if fails else "done", "Request-Id": request_id}
    await js.publish(
        subjects.result(request_id), json.dumps(body).encode(), {api.EXPECTED_LAST: "0", **headers}
    )


@asynccontextmanager
async def open_queue(
    broker: Broker, *, job_s: float | None = 0.1, **changes: Any
) -> AsyncIterator[ScriptedWorker]:
    """The streams, and a worker unless `job_s` is None."""
    async with open_jetstream(broker) as js:
        await make_streams(js, **changes)
        worker = ScriptedWorker(js, job_s or 0.0)
        async with trio.open_nursery() as nursery:
            if job_s is not None:
                nursery.start_soon(worker.work)
            yield worker
            nursery.cancel_scope.cancel()


# --- calls over HTTP ------------------------------------------------------------------------


@dataclass(frozen=True)
class Http:
    """Calls a gateway's pages."""

    api: Api
    headers: Mapping[str, str] = field(default_factory=dict)

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Heard:
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Host": "localhost", **self.headers, **(headers or {})}
        if data:
            given |= {"Content-Type": kind, "Content-Length": str(len(data))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {each}" for name, each in given.items())]
        async with calling(self.api) as caller:
            await caller.stream.send_all("\r\n".join([*lines, "", ""]).encode() + data)
            return await caller.hear(method)

    async def said(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer, which has to be none of an error."""
        heard = await self.call(method, path, body)
        assert heard.status == 200, heard.body
        return json.loads(heard.body)

    async def upload(self, content: bytes, purpose: str = "batch") -> Heard:
        head = b'--XX\r\nContent-Disposition: form-data; name="'
        form = head + b'purpose"\r\n\r\n' + purpose.encode() + b"\r\n" + head
        form += b'file"; filename="my.jsonl"\r\nContent-Type: application/octet-stream\r\n\r\n'
        form += content + b"\r\n--XX--\r\n"
        kind = "multipart/form-data; boundary=XX"
        return await self.call("POST", "/v1/files", form, kind=kind)

    async def begin(self, content: bytes, **more: Any) -> Any:
        """A new batch of this file."""
        file = json.loads((await self.upload(content)).body)
        wanted = {"endpoint": CHAT, "completion_window": "24h", "input_file_id": file["id"]}
        return await self.said("POST", "/v1/batches", {**wanted, **more})

    async def until_over(self, batch: Any) -> Any:
        """The batch when it is; asked every few seconds, as clients do."""
        with trio.fail_after(600):
            while True:
                told = await self.said("GET", f"/v1/batches/{batch['id']}")
                if told["status"] in {"completed", "failed", "cancelled", "expired"}:
                    return told
                await trio.sleep(3)

    async def lines(self, file_id: str) -> list[Any]:
        heard = await self.call("GET", f"/v1/files/{file_id}/content")
        assert heard.status == 200, heard.body
        return lines_of(heard.body)
