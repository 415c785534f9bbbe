"""Writes the body of an error reply."""

from __future__ import annotations

import msgspec

from trio_worker.errors import WorkerError


def error_body(error: WorkerError, retry_after_ms: int | None) -> bytes:
    """The body of an error reply; `retry_after_ms` is null where retrying would not help."""
    return msgspec.json.encode(
        {
            "error": {
                "code": error.code,
                "message": error.message,
                "retryable": error.retryable,
                "retry_after_ms": retry_after_ms if error.retryable else None,
                "details": error.details,
            }
        }
    )
