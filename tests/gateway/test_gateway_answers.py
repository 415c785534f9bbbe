"""What a worker writes, as clients get it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trio_worker.errors import BY_CODE, InternalError
from trio_worker.gateway.answers import DONE, STREAM_HEADERS, WHOLE_HEADERS, AnswerWriter
from trio_worker.gateway.errors import reply_to
from trio_worker.gateway.fields import Asked
from trio_worker.gateway.shapes import Endpoint
from trio_worker.protocol.turn import FinishReason, RequestId
from trio_worker.wire import native

USAGE = native.Usage.of(prompt=2, completion=3, cached=1)
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


def asked(
    endpoint: Endpoint = Endpoint.CHAT,
    *,
    include_usage: bool = False,
    service_tier: str | None = None,
) -> Asked:
    return Asked(
        endpoint=endpoint,
        fields={},
        model=None,
        stream=True,
        timeout_ms=1,
        include_usage=include_usage,
        service_tier=service_tier,
        ignored=(),
    )


def worker_of(endpoint: Endpoint = Endpoint.CHAT) -> native.AnswerWriter:
    return native.AnswerWriter(
        request_id=RequestId("r"), model="m", created=1, chat=endpoint is Endpoint.CHAT
    )


def streamed(request: Asked) -> bytes:
    worker, writer = worker_of(request.endpoint), AnswerWriter(request)
    messages = [worker.opening(), worker.keep_alive(), worker.chunk("a\nb"), worker.chunk("")]
    last = worker.closing(FinishReason.STOP, USAGE, NOTE)
    return b"".join([*map(writer.event, messages), writer.closing(last)])


def events(stream: bytes) -> list[Any]:
    *found, end = stream.split(b"\n\n")
    assert end == b""
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in found)
    assert found.pop() == b"data: [DONE]"
    return [msgspec.json.decode(event.removeprefix(b"data: ")) for event in found]


@pytest.mark.parametrize("endpoint", Endpoint)
def test_an_ordinary_chunk_is_passed_on_byte_by_byte(endpoint: Endpoint) -> None:
    worker, writer = worker_of(endpoint), AnswerWriter(asked(endpoint))
    for body in (worker.opening(), worker.keep_alive(), worker.chunk("ü\n")):
        assert writer.event(body) == b"data: " + body + b"\n\n"


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_stream_ends_with_done_and_without_a_usage_that_nobody_asked_for(
    endpoint: Endpoint,
) -> None:
    found = events(streamed(asked(endpoint)))
    assert len(found) == 5
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in found)
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [*[None] * 4, "stop"]
    assert found[-1]["worker"]["seed"] == 7


@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_usage_that_was_asked_for_comes_last_and_is_null_before(endpoint: Endpoint) -> None:
    *chunks, last = events(streamed(asked(endpoint, include_usage=True)))
    assert len(chunks) == 5
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last == {
        "id": chunks[0]["id"],
        "object": chunks[0]["object"],
        "created": 1,
        "model": "m",
        "choices": [],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_last_message_that_ends_no_choice_goes_to_who_has_asked_for_the_usage(
    endpoint: Endpoint,
) -> None:
    """Code that reads `choices[0]` of each chunk would break on it."""
    summary = worker_of(endpoint).summary(USAGE, NOTE)
    assert AnswerWriter(asked(endpoint)).closing(summary) == DONE
    asked_for = AnswerWriter(asked(endpoint, include_usage=True, service_tier="flex"))
    (told,) = events(asked_for.closing(summary))
    tier = {"service_tier": "flex"} if endpoint is Endpoint.CHAT else {}
    assert told == {**msgspec.json.decode(summary), **tier}
    assert (told["choices"], told["worker"]["seed"]) == ([], 7)


def test_the_service_tier_is_said_again_in_a_chat() -> None:
    request = asked(include_usage=True, service_tier="flex")
    assert all(chunk["service_tier"] == "flex" for chunk in events(streamed(request)))
    assert AnswerWriter(request).whole(b'{"id":"a"}') == b'{"id":"a","service_tier":"flex"}'
    assert AnswerWriter(request).whole(b'{"id":"a"}\n') == b'{"id":"a","service_tier":"flex"}'
    completion = asked(Endpoint.COMPLETIONS, service_tier="flex")
    assert AnswerWriter(completion).whole(b'{"id":"a"}') == b'{"id":"a"}'


def test_a_whole_answer_is_passed_on_with_its_usage() -> None:
    body = b'{"id":"a","usage":{"total_tokens":5},"worker":{}}'
    assert AnswerWriter(asked()).whole(body) == body


def test_a_failed_stream_has_an_error_and_no_end() -> None:
    worker, writer = worker_of(), AnswerWriter(asked(include_usage=True))
    error = reply_to(BY_CODE["ENGINE_FAILED"]("it broke"))
    stream = writer.event(worker.opening()) + error.event()
    assert DONE not in stream
    assert b'data: {"error":{"message":"it broke"' in stream


def test_a_body_of_several_lines_is_one_event() -> None:
    writer = AnswerWriter(asked())
    for end in (b"\n", b"\r", b"\r\n"):
        assert writer.event(b'{"a":' + end + b"1}") == b'data: {"a": 1}\n\n'


def test_nobody_on_the_way_keeps_a_stream_back() -> None:
    assert WHOLE_HEADERS == {"content-type": "application/json"}
    assert STREAM_HEADERS == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }


def test_a_closing_without_usage_ends_the_stream_all_the_same() -> None:
    writer = AnswerWriter(asked(include_usage=True))
    assert (
        writer.closing(b'{"id":"a","choices":[{}]}')
        == b'data: {"id":"a","choices":[{}]}\n\n' + DONE
    )


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"a":' * 100_000])
def test_what_is_no_chunk_never_looks_like_an_end(body: bytes) -> None:
    with pytest.raises(InternalError):
        AnswerWriter(asked()).closing(body)
