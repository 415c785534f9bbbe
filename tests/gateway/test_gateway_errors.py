"""What clients are told of each error, and whether they try again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trio_worker.errors import (
    BY_CODE,
    ErrorCode,
    InternalError,
    MessageLost,
    NoWorker,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.gateway.errors import (
    ErrorReply,
    Refusal,
    Refused,
    method_not_allowed,
    reply_to,
    unknown_path,
)

EVERY_ERROR: dict[str, tuple[int, str, str]] = {
    # code: status, type, x-should-retry
    "INVALID_REQUEST": (400, "invalid_request_error", "false"),
    "CONTEXT_LENGTH_EXCEEDED": (400, "invalid_request_error", "false"),
    "MODEL_NOT_FOUND": (404, "invalid_request_error", "false"),
    "DUPLICATE_REQUEST": (409, "conflict_error", "false"),
    "PAYLOAD_TOO_LARGE": (413, "invalid_request_error", "false"),
    "QUEUE_FULL": (429, "rate_limit_error", "true"),
    "CANCELLED": (499, "cancelled", "false"),
    "ENGINE_FAILED": (500, "server_error", "false"),
    "INTERNAL": (500, "server_error", "true"),
    "RESOURCE_LIMIT_EXCEEDED": (503, "server_error", "true"),
    "WORKER_DRAINING": (503, "server_error", "true"),
    "REQUEST_TIMEOUT": (504, "timeout_error", "false"),
    "invalid_api_key": (401, "authentication_error", "false"),
    "host_not_allowed": (403, "permission_error", "false"),
    "unknown_path": (404, "invalid_request_error", "false"),
    "method_not_allowed": (405, "invalid_request_error", "false"),
    "unsupported_media_type": (415, "invalid_request_error", "false"),
    "too_many_requests": (429, "rate_limit_error", "true"),
    "no_such_object": (404, "invalid_request_error", "false"),
    "batch_is_over": (409, "conflict_error", "false"),
    "batches_not_enabled": (501, "server_error", "false"),
    "jobs_unavailable": (503, "server_error", "true"),
}


def of(code: ErrorCode | Refusal) -> WorkerError | Refused:
    if isinstance(code, Refusal):
        return Refused(code, "the words")
    return BY_CODE[code]("the words")


def shape(reply: ErrorReply) -> tuple[int, Any, str]:
    return reply.status, reply.error["type"], reply.headers["x-should-retry"]


@pytest.mark.parametrize("code", [*ErrorCode, *Refusal])
def test_every_error_has_its_status_its_type_and_its_word_on_retries(
    code: ErrorCode | Refusal,
) -> None:
    reply = reply_to(of(code))
    assert shape(reply) == EVERY_ERROR[code]
    assert reply.error["code"] == code.lower()
    assert msgspec.json.decode(reply.body()) == {
        "error": {
            "message": "the words",
            "type": EVERY_ERROR[code][1],
            "param": None,
            "code": code.lower(),
        }
    }
    assert reply.event() == b"data: " + reply.body() + b"\n\n"
    assert reply.headers["content-type"] == "application/json"
    assert ("retry-after" in reply.headers) is (EVERY_ERROR[code][2] == "true")


def test_the_table_above_has_no_more_than_there_is() -> None:
    assert EVERY_ERROR.keys() == {*ErrorCode, *Refusal}


@pytest.mark.parametrize(
    ("retry_after_ms", "seconds", "milliseconds"),
    [(None, "1", "1000"), (50, "1", "50"), (1001, "2", "1001"), (60_000, "60", "60000")],
)
def test_when_to_try_again_is_the_workers_word(
    retry_after_ms: int | None, seconds: str, milliseconds: str
) -> None:
    error = BY_CODE["QUEUE_FULL"]("full")
    error.retry_after_ms = retry_after_ms
    headers = reply_to(error).headers
    assert headers["retry-after"] == seconds
    assert headers["retry-after-ms"] == milliseconds


def test_memory_and_drain_are_retried_as_the_worker_says() -> None:
    for cls in (ResourceLimitExceeded, WorkerDraining):
        assert shape(reply_to(cls("x", retryable=False))) == (503, "server_error", "false")


def test_a_deadline_is_retried_only_if_nothing_was_computed() -> None:
    refused = reply_to(RequestTimeout("x", details={"stage": "admission", "estimate_ms": 9}))
    assert shape(refused) == (503, "server_error", "true")
    assert refused.headers["retry-after"] == "1"
    assert refused.error["code"] == "request_timeout"
    for stage in ("queued", "prefill", "decode", "client"):
        late = reply_to(RequestTimeout("x", details={"stage": stage}))
        assert shape(late) == (504, "timeout_error", "false")
        assert "retry-after" not in late.headers


def test_where_nobody_listens_a_retry_may_find_somebody() -> None:
    reply = reply_to(NoWorker("nobody"))
    assert shape(reply) == (503, "server_error", "true")
    assert reply.headers["retry-after"] == "1"
    assert reply.error["code"] == "no_worker"


def test_a_lost_message_is_a_fault_of_the_server() -> None:
    assert shape(reply_to(MessageLost("x"))) == shape(reply_to(InternalError("x")))


def test_the_field_is_the_param_and_details_stand_beside() -> None:
    error = BY_CODE["CONTEXT_LENGTH_EXCEEDED"](
        "too long",
        details={"field": "max_tokens", "prompt_tokens": 9, "message": "x", "code": "x"},
    )
    assert reply_to(error).error == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "context_length_exceeded",
        "prompt_tokens": 9,
    }
    assert error.details["field"] == "max_tokens"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/responses", "use chat completions"),
        ("/v1/messages/", "use chat completions"),
        ("/chat/completions", "ends in /v1: /v1/chat/completions"),
        ("/completions", "ends in /v1: /v1/completions"),
        ("/models/", "ends in /v1: /v1/models"),
        ("/v1/audio", "POST /v1/chat/completions"),
    ],
)
def test_an_unknown_path_says_what_there_is(path: str, hint: str) -> None:
    refused = unknown_path(path)
    assert hint in refused.message
    assert str(refused) == refused.message


def test_of_a_long_path_the_beginning_is_said() -> None:
    message = unknown_path("/" + "x" * 10_000).message
    assert message.startswith(f"there is nothing at /{'x' * 63}; ")


def test_another_method_says_which_there_is() -> None:
    reply = reply_to(method_not_allowed("DELETE", ("GET", "HEAD")))
    assert reply.headers["allow"] == "GET, HEAD"
    assert reply.status == 405
