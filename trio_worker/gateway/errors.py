"""What went wrong, as OpenAI's clients expect to be told: a status, headers and a body.

The words and the details are those of whoever found the fault, a worker mostly. What is decided
here is what a client library makes of it: its status and whether it is worth another try. By
themselves the libraries try again on 408, 409, 429 and 5xx, so `x-should-retry` is on every error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from trio_worker.errors import ErrorCode, NoWorker, RequestTimeout, WorkerError

RETRY_AFTER_MS = 1000
"""Where a retry is worth it and nobody has said when."""
MAY_BE_MET = "admission"
"""The stage of a deadline that was refused at the door: nothing has been computed."""


class Refusal(StrEnum):
    """The `code` of what is refused before it becomes a request to a worker."""

    INVALID_API_KEY = "invalid_api_key"
    HOST_NOT_ALLOWED = "host_not_allowed"
    UNKNOWN_PATH = "unknown_path"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    TOO_MANY_REQUESTS = "too_many_requests"
    NO_SUCH_OBJECT = "no_such_object"
    BATCH_IS_OVER = "batch_is_over"
    BATCHES_NOT_ENABLED = "batches_not_enabled"
    JOBS_UNAVAILABLE = "jobs_unavailable"


class Refused(Exception):
    """A call is refused by the gateway itself.

    Attributes:
        message: one sentence saying what was wrong, and what to do.
        headers: what the status wants said beside the body.
    """

    def __init__(
        self, code: Refusal, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers: Mapping[str, str] = headers or {}


class ErrorType(StrEnum):
    """The `type` of an error: how a client library classes it."""

    INVALID_REQUEST = "invalid_request_error"
    AUTHENTICATION = "authentication_error"
    PERMISSION = "permission_error"
    CONFLICT = "conflict_error"
    RATE_LIMIT = "rate_limit_error"
    CANCELLED = "cancelled"
    SERVER = "server_error"
    TIMEOUT = "timeout_error"


class Retry(StrEnum):
    """Whether a client is told to try again."""

    NEVER = "never"
    ALWAYS = "always"
    AS_SAID = "as said"
    """As the error's own `retryable` says."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind of error is told."""

    status: int
    type: ErrorType
    retry: Retry


BY_CODE: Mapping[ErrorCode | Refusal, Form] = {
    ErrorCode.INVALID_REQUEST: Form(400, ErrorType.INVALID_REQUEST, Retry.NEVER),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: Form(400, ErrorType.INVALID_REQUEST, Retry.NEVER),
    ErrorCode.MODEL_NOT_FOUND: Form(404, ErrorType.INVALID_REQUEST, Retry.NEVER),
    ErrorCode.DUPLICATE_REQUEST: Form(409, ErrorType.CONFLICT, Retry.NEVER),
    ErrorCode.PAYLOAD_TOO_LARGE: Form(413, ErrorType.INVALID_REQUEST, Retry.NEVER),
    ErrorCode.QUEUE_FULL: Form(429, ErrorType.RATE_LIMIT, Retry.ALWAYS),
    ErrorCode.CANCELLED: Form(499, ErrorType.CANCELLED, Retry.NEVER),
    ErrorCode.ENGINE_FAILED: Form(500, ErrorType.SERVER, Retry.NEVER),
    ErrorCode.INTERNAL: Form(500, ErrorType.SERVER, Retry.ALWAYS),
    ErrorCode.RESOURCE_LIMIT_EXCEEDED: Form(503, ErrorType.SERVER, Retry.AS_SAID),
    ErrorCode.WORKER_DRAINING: Form(503, ErrorType.SERVER, Retry.AS_SAID),
    # It would be computed from the start again, and be late again.
    ErrorCode.REQUEST_TIMEOUT: Form(504, ErrorType.TIMEOUT, Retry.NEVER),
    Refusal.INVALID_API_KEY: Form(401, ErrorType.AUTHENTICATION, Retry.NEVER),
    Refusal.HOST_NOT_ALLOWED: Form(403, ErrorType.PERMISSION, Retry.NEVER),
    Refusal.UNKNOWN_PATH: Form(404, ErrorType.INVALID_REQUEST, Retry.NEVER),
    Refusal.METHOD_NOT_ALLOWED: Form(405, ErrorType.INVALID_REQUEST, Retry.NEVER),
    Refusal.UNSUPPORTED_MEDIA_TYPE: Form(415, ErrorType.INVALID_REQUEST, Retry.NEVER),
    Refusal.TOO_MANY_REQUESTS: Form(429, ErrorType.RATE_LIMIT, Retry.ALWAYS),
    Refusal.NO_SUCH_OBJECT: Form(404, ErrorType.INVALID_REQUEST, Retry.NEVER),
    Refusal.BATCH_IS_OVER: Form(409, ErrorType.CONFLICT, Retry.NEVER),
    Refusal.BATCHES_NOT_ENABLED: Form(501, ErrorType.SERVER, Retry.NEVER),
    Refusal.JOBS_UNAVAILABLE: Form(503, ErrorType.SERVER, Retry.ALWAYS),
}
_NOTHING_WAS_COMPUTED = Form(503, ErrorType.SERVER, Retry.ALWAYS)
"""Of a deadline: nobody listened until then, or it was refused as unmeetable."""
_NO_WORKER = "no_worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """An error as it is sent."""

    status: int
    headers: Mapping[str, str]
    error: Mapping[str, Any]

    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.error})

    def event(self) -> bytes:
        """The last event of a stream that fails after its status has been sent."""
        return b"data: " + self.body() + b"\n\n"


def reply_to(error: WorkerError | Refused) -> ErrorReply:
    """How `error` is told to the caller."""
    form = form_of(error)
    if isinstance(error, Refused):
        details, headers = {}, dict(error.headers)
    else:
        details, headers = dict(error.details), {}
    param = details.pop("field", None)
    return ErrorReply(
        status=form.status,
        headers={
            "content-type": "application/json",
            **headers,
            **_retry_headers(form, error),
        },
        error={
            **details,
            "message": error.message,
            "type": form.type,
            "param": param,
            "code": _NO_WORKER if isinstance(error, NoWorker) else error.code.lower(),
        },
    )


def form_of(error: WorkerError | Refused) -> Form:
    if isinstance(error, NoWorker) or (
        isinstance(error, RequestTimeout) and error.details.get("stage") == MAY_BE_MET
    ):
        return _NOTHING_WAS_COMPUTED
    return BY_CODE[error.code]


def unknown_path(path: str) -> Refused:
    """What to answer where there is no such page; clients' other endpoints get a hint."""
    beginning = path[:64].rstrip("/")
    hint = (
        "the requests there are: POST /v1/chat/completions, POST /v1/completions, GET /v1/models, "
    )
    hint += "and those of /v1/files and /v1/batches"
    if beginning.endswith(("/responses", "/messages")):
        hint = "tell your client to use chat completions: POST /v1/chat/completions"
    elif beginning in {"/chat/completions", "/completions", "/models"}:
        hint = f"the base URL of this API ends in /v1: /v1{beginning}"
    return Refused(Refusal.UNKNOWN_PATH, f"there is nothing at {beginning}; {hint}")


def method_not_allowed(method: str, allowed: tuple[str, ...]) -> Refused:
    names = ", ".join(allowed)
    return Refused(
        Refusal.METHOD_NOT_ALLOWED,
        f"{method[:16]} is not answered here; send {names}",
        headers={"allow": names},
    )


def _retry_headers(form: Form, error: WorkerError | Refused) -> dict[str, str]:
    said = isinstance(error, WorkerError) and error.retryable
    if form.retry is Retry.NEVER or (form.retry is Retry.AS_SAID and not said):
        return {"x-should-retry": "false"}
    after_ms = RETRY_AFTER_MS
    if isinstance(error, WorkerError) and error.retry_after_ms is not None:
        after_ms = error.retry_after_ms
    return {
        "x-should-retry": "true",
        "retry-after": str(math.ceil(after_ms / 1000)),
        "retry-after-ms": str(after_ms),
    }
