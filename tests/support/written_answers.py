"""A gateway before a worker whose answers a test writes, for clients with sockets of their own.

The worker has no engine: it reads a request as every worker does, or refuses it, and says what the
test would have the model say, token by token, with the worker's own writer.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeAlias

import msgspec
import trio

from support.gateway_loopback import open_door
from trio_worker.core.request import Request
from trio_worker.errors import WorkerError
from trio_worker.gateway.directory import INFO_SUBJECT
from trio_worker.ports import Message
from trio_worker.protocol.prompt import (
    CallArguments,
    CallBegun,
    Choice,
    JsonSchema,
    Piece,
    Reasoning,
    ToolUse,
)
from trio_worker.protocol.turn import FinishReason, Output, RequestId
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker
from trio_worker.wire import native, subjects

MODEL = "smollm2-135m-instruct"
LIMITS = native.RequestLimits(
    model_name=MODEL,
    max_tokens_limit=4096,
    default_timeout_ms=30_000,
    timeout_limit_ms=900_000,
    max_body_bytes=1_000_000,
    priority_levels=3,
    default_buffered=0,
    default_streaming=1,
)
PROMPT_TOKENS = 10
WORDS = 16
PATIENCE_S = 20

Tokens: TypeAlias = Sequence[Output]
Script: TypeAlias = Callable[[Request], Sequence[Tokens]]
"""What the model says to a request: the tokens of each choice."""


def text(*words: str) -> list[Output]:
    return [_token(text=word) for word in words]


def thought(*words: str) -> list[Output]:
    return [_token(Reasoning(text=word), is_reasoning=True) for word in words]


def call(index: int, name: str, *arguments: str, own_id: str | None = None) -> list[Output]:
    """A call whose arguments come in pieces."""
    more = [_token(CallArguments(index=index, text=piece)) for piece in arguments]
    return [_token(CallBegun(index=index, name=name, id=own_id)), *more]


def ended(tokens: Sequence[Output], finish: FinishReason | None = None) -> list[Output]:
    """With a reason; None: the one that is in what was said."""
    if finish is None:
        calls = any(isinstance(piece, CallBegun) for token in tokens for piece in token.beside)
        finish = FinishReason.TOOL_CALLS if calls else FinishReason.STOP
    return [*tokens[:-1], msgspec.structs.replace(tokens[-1], finish=finish)]


def obliging(request: Request) -> Sequence[Tokens]:
    """What a model says that does as it is told, and otherwise utters a few words.

    It calls a tool wherever it may, until it has heard a result.
    """
    wanted = request.wanted
    has_heard = any(message.role == "tool" for message in request.messages)
    if wanted.tool_use is ToolUse.REQUIRED or (wanted.tools and not has_heard):
        name = (*wanted.allowed_tools, wanted.tools[0].name)[0]
        (tool,) = [each for each in wanted.tools if each.name == name]
        return [call(0, name, json.dumps(_example(json.loads(tool.parameters or "{}"))))]
    match wanted.constraint:
        case JsonSchema(schema=schema):
            return [text(json.dumps(_example(json.loads(schema))))]
        case Choice(options=options):
            return [text(options[0])] * request.choices
        case _:
            count = min(request.max_tokens or WORDS, WORDS)
            finish = FinishReason.STOP if count == WORDS else FinishReason.LENGTH
            return [ended(text(*["word "] * count), finish)] * request.choices


def _example(schema: Any) -> Any:
    """A value that a simple schema accepts."""
    match schema:
        case {"enum": [first, *_]}:
            return first
        case {"type": "object"}:
            return {name: _example(each) for name, each in schema.get("properties", {}).items()}
        case {"type": "boolean"}:
            return True
        case {"type": "string"}:
            return "word"
        case _:
            raise NotImplementedError(schema)


def _token(*beside: Piece, text: str = "", is_reasoning: bool = False) -> Output:
    return Output(
        request_id=RequestId(""), token=0, text=text, beside=beside, is_reasoning=is_reasoning
    )


@dataclass
class WrittenWorker:
    """Its state is what it has been asked."""

    broker: MemoryBroker
    script: Script
    asked: list[Request] = field(default_factory=list)

    def take(self, message: Message) -> None:
        assert message.reply is not None
        fields = native.parse_body(message.body, LIMITS)
        request_id = native.request_id_of(fields)
        assert request_id is not None
        common = native.common_headers(request_id=request_id, worker_id="w1")
        outlet = self.broker.open_outlet(message.reply, headers=common)
        try:
            request = native.to_request(fields, LIMITS, request_id=request_id, draw_seed=lambda: 1)
        except WorkerError as error:
            headers = native.headers(sequence=0, terminal=True, error=error)
            outlet.publish(native.error_body(error, None), headers)
            return
        self.asked.append(request)
        *bodies, last = self._bodies(request)
        for number, body in enumerate(bodies):
            outlet.publish(body, native.headers(sequence=number, terminal=False))
        outlet.publish(last, native.headers(sequence=len(bodies), terminal=True))

    def tell(self, message: Message) -> None:
        """Who it is."""
        assert message.reply is not None
        metadata = {"worker_id": "w1", "model": MODEL}
        body = msgspec.json.encode({"metadata": metadata})
        self.broker.publish(Message(subject=message.reply, body=body))

    def _bodies(self, request: Request) -> Iterator[bytes]:
        choices = [
            tokens if tokens[-1].finish else ended(tokens) for tokens in self.script(request)
        ]
        writer = native.AnswerWriter(
            request_id=request.request_id,
            model=MODEL,
            created=1,
            chat=request.is_chat,
            choices=len(choices),
        )
        for choice in range(len(choices)):
            yield writer.opening(choice)
        for step in zip_longest(*choices):
            for choice, token in enumerate(step):
                if token is not None:
                    yield writer.chunk(token.text, (), token.beside, choice=choice)
        usage, note = _usage(choices), _note(request)
        if len(choices) == 1:
            yield writer.closing(_finish_of(choices[0]), usage, note)
            return
        for choice, tokens in enumerate(choices):
            yield writer.ending(_finish_of(tokens), choice=choice)
        yield writer.summary(usage, note)


def _finish_of(tokens: Tokens) -> FinishReason:
    finish = tokens[-1].finish
    assert finish is not None
    return finish


def _usage(choices: Sequence[Tokens]) -> native.Usage:
    tokens = [token for choice in choices for token in choice]
    return native.Usage.of(
        prompt=PROMPT_TOKENS,
        completion=len(tokens),
        cached=0,
        reasoning=sum(token.is_reasoning for token in tokens),
    )


def _note(request: Request) -> native.WorkerNote:
    return native.WorkerNote(
        id="w1",
        request_id=request.request_id,
        seed=request.sampling.seed,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
        priority="medium",
        resumed=0,
        degraded=(),
    )


@asynccontextmanager
async def open_written(script: Script) -> AsyncIterator[tuple[str, WrittenWorker]]:
    """The gateway's address, without a slash at the end, and the worker."""
    server = MemoryServer(random=random.Random(0))
    async with open_memory_broker(server, name="worker") as broker:
        worker = WrittenWorker(broker, script)
        for subject in subjects.shared(MODEL):
            await broker.subscribe(subject, worker.take, group=subjects.GROUP)
        await broker.subscribe(INFO_SUBJECT, worker.tell)
        async with open_memory_broker(server, name="gateway") as own, open_door(own) as door:
            with trio.fail_after(PATIENCE_S):
                while not door.api.directory.offers:  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.01)
            yield f"http://127.0.0.1:{door.port}", worker
