"""Writes the message that ends an answer with an error.

The controller makes of it a 503 where the text contains `No workers`, and a 500 otherwise. It never
asks another worker, so these words are all by which a caller learns that asking again may help.
"""

from __future__ import annotations

import msgspec

from trio_worker.errors import (
    QueueFull,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.protocol.turn import RequestId

_TEXT_MAX = 512
"""Characters of the text, so that the message is below any server's `max_payload`."""


class _Error(msgspec.Struct, frozen=True, tag_field="type", tag="error", rename="camel"):
    request_id: str
    error: str
    code: str


_encode = msgspec.json.Encoder().encode


def error_body(error: WorkerError, request_id: RequestId) -> bytes:
    """The message that ends a request which was not served, or not to its end."""
    text = error.message
    if _another_may_serve(error):
        text = f"No workers have room: {text}"
    return _encode(_Error(request_id, text[:_TEXT_MAX], error.code))


def _another_may_serve(error: WorkerError) -> bool:
    if isinstance(error, RequestTimeout):
        return error.details.get("stage") == "admission"
    return error.retryable and isinstance(error, QueueFull | WorkerDraining | ResourceLimitExceeded)
