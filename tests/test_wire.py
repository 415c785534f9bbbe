"""The native wire: any bytes in are a request or a WorkerError, and what goes out is OpenAI's."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.core.request import ChatMessage, FinishReason, Request, RequestId
from trio_worker.core.wire import native
from trio_worker.errors import (
    BY_CODE,
    ErrorCode,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    WorkerError,
)

LIMITS = native.RequestLimits(
    model_name="m",
    max_tokens_limit=100,
    default_timeout_ms=30_000,
    timeout_limit_ms=60_000,
    max_body_bytes=10_000,
    priority_levels=3,
    default_buffered=0,
    default_streaming=1,
)


def read(body: bytes) -> Request:
    fields = native.parse_body(body, LIMITS)
    request_id = native.request_id_of(fields) or RequestId("drawn")
    return native.to_request(fields, LIMITS, request_id=request_id, draw_seed=lambda: 42)


def read_fields(**fields: Any) -> Request:
    return read(msgspec.json.encode({"prompt": "x", **fields}))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_near_requests = st.dictionaries(
    st.sampled_from([*native.FIELD_NAMES, "maxTokens", "requestId", "other"]), _json, max_size=8
)


@given(st.binary(max_size=200) | _near_requests.map(msgspec.json.encode))
def test_any_bytes_are_a_request_or_an_error_of_the_wire(body: bytes) -> None:
    try:
        request = read(body)
    except WorkerError as error:
        reply = msgspec.json.decode(native.error_body(error, 100))
    else:
        assert request.timeout_s > 0
        return
    assert reply["error"]["message"]


@given(st.binary(max_size=100))
def test_any_bytes_on_the_cancel_subject_are_survived(body: bytes) -> None:
    native.cancelled_id(body)


def test_the_defaults_of_a_request() -> None:
    request = read(b'{"prompt": "x"}')
    assert request.max_tokens is None
    assert request.sampling.temperature == 0
    assert request.sampling.seed == 42
    assert request.priority == 0
    assert request.timeout_s == 30
    assert not request.is_chat
    assert read(b'{"prompt": "x", "stream": true}').priority == 1


def test_every_field_arrives() -> None:
    request = read(
        msgspec.json.encode(
            {
                "request_id": "abc",
                "model": "m",
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
                ],
                "max_completion_tokens": 7,
                "temperature": 1,
                "top_p": 0.9,
                "top_k": 5,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.2,
                "frequency_penalty": 0.3,
                "logit_bias": {"12": -100, "3": 5},
                "seed": 1,
                "stop": ["a", "b"],
                "stream": True,
                "logprobs": True,
                "top_logprobs": 3,
                "priority": "low",
                "timeout_ms": 5,
            }
        )
    )
    assert request.request_id == "abc"
    assert request.messages == (
        ChatMessage(role="system", content="s"),
        ChatMessage(role="user", content="aa"),
    )
    assert request.max_tokens == 7
    assert request.sampling.logit_bias == ((3, 5.0), (12, -100.0))
    assert request.sampling.top_logprobs == 3
    assert request.stop == ("a", "b")
    assert request.priority == 2
    assert request.timeout_s == 0.005


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "temperature: Expected `float` <= 2"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream: Expected `bool`"),
        ({"tools": []}, "tools is not a field"),
        ({"max_token": 1}, "did you mean max_tokens?"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "a\n"}, "request_id"),
        ({"logit_bias": {"-1": 1}}, "not the number of a token"),
        ({"priority": True}, "priority"),
        ({"priority": -1}, "priority"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_fields(**fields)
    assert message in caught.value.message


def test_another_model_is_named_beside_ours() -> None:
    with pytest.raises(ModelNotFound, match="serves the model m, not gpt"):
        read_fields(model="gpt")


def test_nul_bytes_are_legal_text() -> None:
    assert read(b'{"prompt": "a\\u0000b"}').prompt == "a\x00b"


def test_priorities_by_name_and_number() -> None:
    levels = [read_fields(priority=each).priority for each in ("high", "medium", "low", 0, 2)]
    assert levels == [0, 1, 2, 0, 2]


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_one_class_and_a_body(code: ErrorCode) -> None:
    cls = BY_CODE[code]
    assert cls.code is code
    error = cls("why", details={"n": 1})
    body = msgspec.json.decode(native.error_body(error, 1234))["error"]
    assert body == {
        "code": code.value,
        "message": "why",
        "retryable": error.retryable,
        "retry_after_ms": 1234 if error.retryable else None,
        "details": {"n": 1},
    }


def test_the_headers_of_an_error() -> None:
    headers = native.headers(
        request_id=RequestId("r"),
        worker_id="w",
        sequence=3,
        terminal=True,
        error=QueueFull("full"),
    )
    assert headers == {
        "Request-Id": "r",
        "Worker-Id": "w",
        "Sequence": "3",
        "Terminal": "error",
        "Nats-Service-Error-Code": "429",
        "Nats-Service-Error": "QUEUE_FULL: full",
    }


def test_chunks_and_completions_look_as_openais() -> None:
    chat = native.AnswerWriter(request_id=RequestId("r"), model="m", created=5, chat=True)
    assert msgspec.json.decode(chat.chunk("hi")) == {
        "id": "chatcmpl-r",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "m",
        "choices": [
            {"index": 0, "delta": {"content": "hi"}, "logprobs": None, "finish_reason": None}
        ],
    }
    text = native.AnswerWriter(request_id=RequestId("r"), model="m", created=5, chat=False)
    assert msgspec.json.decode(text.keep_alive())["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
    ]
    usage = native.Usage.of(prompt=3, completion=4, cached=2)
    note = native.WorkerNote(
        id="w",
        request_id="r",
        seed=1,
        queue_ms=0.5,
        prefill_ms=1.0,
        decode_ms=2.0,
        priority="high",
        resumed=0,
        degraded=(),
    )
    whole = msgspec.json.decode(chat.whole("hi", None, FinishReason.STOP, usage, note))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert whole["worker"]["degraded"] == []
