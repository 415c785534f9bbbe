"""What is written, against the types of OpenAI's own client: strictly, and without a field more."""

from __future__ import annotations

import msgspec
import pytest
from openai import BaseModel
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from support.openai_types import check
from support.whole_choices import whole_choice

from trio_worker.errors import BY_CODE, ErrorCode
from trio_worker.gateway.answers import AnswerWriter
from trio_worker.gateway.errors import Refusal, Refused, reply_to
from trio_worker.gateway.fields import Asked
from trio_worker.gateway.models import Offer, list_body, model_body
from trio_worker.gateway.shapes import Endpoint
from trio_worker.protocol.prompt import CallArguments, CallBegun, Reasoning
from trio_worker.protocol.turn import FinishReason, RequestId
from trio_worker.wire import native

USAGE = native.Usage.of(prompt=2, completion=3, cached=1)
BESIDE = (
    Reasoning(text="Hm"),
    CallBegun(index=0, name="f"),
    CallArguments(index=0, text="{}"),
)
NOTE = native.WorkerNote(
    id="w1",
    request_id="r",
    seed=7,
    queue_ms=0.5,
    prefill_ms=20.1,
    decode_ms=40.0,
    priority="medium",
    resumed=0,
    degraded=(),
)


def asked(endpoint: Endpoint, *, stream: bool) -> Asked:
    return Asked(
        endpoint=endpoint,
        fields={},
        model=None,
        stream=stream,
        timeout_ms=1,
        include_usage=stream,
        service_tier="flex",
        ignored=(),
    )


def worker_of(endpoint: Endpoint) -> native.AnswerWriter:
    return native.AnswerWriter(
        request_id=RequestId("r"), model="m", created=1, chat=endpoint is Endpoint.CHAT
    )


def events(endpoint: Endpoint) -> list[bytes]:
    """The bodies of a stream, but for its end."""
    worker, writer = worker_of(endpoint), AnswerWriter(asked(endpoint, stream=True))
    stream = b"".join(
        [
            *map(writer.event, (worker.opening(), worker.keep_alive(), worker.chunk("Hi"))),
            writer.event(worker.chunk("", (), BESIDE)),
            writer.closing(worker.closing(FinishReason.LENGTH, USAGE, NOTE)),
        ]
    )
    *bodies, end, nothing = stream.split(b"\n\n")
    assert (end, nothing) == (b"data: [DONE]", b"")
    return [body.removeprefix(b"data: ") for body in bodies]


def test_the_chunks_of_a_chat() -> None:
    for body in events(Endpoint.CHAT):
        check(ChatCompletionChunk, body)


def test_the_chunks_of_a_completion() -> None:
    """The types want a reason to finish in each chunk; OpenAI itself sends null until the last."""
    *chunks, closing, usage = events(Endpoint.COMPLETIONS)
    for body in chunks:
        check(Completion, body.replace(b'"finish_reason":null', b'"finish_reason":"stop"'))
    check(Completion, closing)
    check(Completion, usage)


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [(Endpoint.CHAT, ChatCompletion), (Endpoint.COMPLETIONS, Completion)],
)
def test_a_whole_answer(endpoint: Endpoint, kind: type[BaseModel]) -> None:
    body = worker_of(endpoint).whole([whole_choice(["Hi"], beside=BESIDE)], USAGE, NOTE)
    check(kind, AnswerWriter(asked(endpoint, stream=False)).whole(body))


def test_the_usage() -> None:
    usage = msgspec.json.decode(events(Endpoint.CHAT)[-1])["usage"]
    check(CompletionUsage, msgspec.json.encode(usage))


def test_models() -> None:
    offers = [Offer(worker_id="w1", model="m", since=1, context_length=8192)]
    check(Model, model_body(offers, "m"))
    for model in msgspec.json.decode(list_body(offers))["data"]:
        check(Model, msgspec.json.encode(model))


@pytest.mark.parametrize("code", [*ErrorCode, *Refusal])
def test_errors(code: ErrorCode | Refusal) -> None:
    error = Refused(code, "words") if isinstance(code, Refusal) else BY_CODE[code]("words")
    body = msgspec.json.decode(reply_to(error).body())["error"]
    check(ErrorObject, msgspec.json.encode(body))
