"""Requests as a worker reads them, from their fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from trio_worker.core.request import Request
from trio_worker.errors import InvalidRequest
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native

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
ROOMY = replace(LIMITS, max_body_bytes=10_000_000)


def read(body: bytes, limits: native.RequestLimits = LIMITS) -> Request:
    fields = native.parse_body(body, limits)
    request_id = native.request_id_of(fields) or RequestId("drawn")
    return native.to_request(fields, limits, request_id=request_id, draw_seed=lambda: 42)


def read_chat(limits: native.RequestLimits = ROOMY, **fields: Any) -> Request:
    """One with a message, where `fields` have none."""
    chat = {"messages": [{"role": "user", "content": "x"}]}
    return read(msgspec.json.encode({**chat, **fields}), limits)


def refusal_of(limits: native.RequestLimits = ROOMY, **fields: Any) -> tuple[str, str, int | None]:
    """The message, the place and the limit with which a chat is refused."""
    with pytest.raises(InvalidRequest) as caught:
        read_chat(limits, **fields)
    details = dict(caught.value.details)
    place, limit = details.pop("field"), details.pop("limit", None)
    assert details == {}
    return caught.value.message, place, limit  # type: ignore[return-value]
