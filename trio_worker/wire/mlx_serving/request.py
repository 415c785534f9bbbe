"""Reads a controller's request: bytes in, a checked `Request` out.

The checks are those of the worker's own dialect, which knows the spellings too; what differs is
which fields there are, and what stands for those that the controller leaves out.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from trio_worker.core.request import Request
from trio_worker.errors import InvalidRequest
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native
from trio_worker.wire.native import Fields, RequestLimits
from trio_worker.wire.native.fields import REQUEST_ID

_TAKEN = frozenset({"request_id", "model", "prompt", "max_tokens", "temperature", "top_p"})
_WITHOUT_EFFECT = frozenset({"sessionId", "stream"})
"""In the controller's schema, and never sent by it: the answer is a message a token anyhow."""
_MAX_TOKENS = 100
_TEMPERATURE = 0.7
_TOP_P = 0.9
"""What mlx-serving's own worker takes for options that are left out: whoever asks the controller
does not know which worker answers, and should not see it."""


class _Named(msgspec.Struct):
    """The one field that has to be known before anything can be answered."""

    request_id: str = msgspec.field(name="requestId")


_named = msgspec.json.Decoder(_Named)


def request_id_in(body: bytes) -> RequestId | None:
    """The request's id; None where the body has none that may be a token of a subject.

    Then nobody waits for an answer, or nobody can be told.
    """
    try:
        value = _named.decode(body).request_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return RequestId(value) if REQUEST_ID.match(value) else None


def parse_body(body: bytes, limits: RequestLimits) -> Fields:
    """The fields of a request under their canonical names, without nulls and what has no effect.

    Raises as the native one, and `InvalidRequest` for a field that a controller does not send.
    """
    fields = native.parse_body(body, limits)
    for name in _WITHOUT_EFFECT:
        fields.pop(name, None)
    for name in fields.keys() - _TAKEN:
        raise InvalidRequest(
            f"{name[:64]} is not a field of a controller's request", details={"field": name[:64]}
        )
    return fields


def to_request(
    fields: Fields, limits: RequestLimits, *, request_id: RequestId, draw_seed: Callable[[], int]
) -> Request:
    """The checked request, with the defaults of mlx-serving's worker. Raises as the native one.

    A `maxTokens` that is not there is cut down to what the context leaves.
    """
    defaults: Fields = {"temperature": _TEMPERATURE, "top_p": _TOP_P}
    if "max_tokens" not in fields:
        defaults |= {"max_tokens": _MAX_TOKENS, "fit_max_tokens": True}
    return native.to_request(
        {**defaults, **fields, "stream": True}, limits, request_id=request_id, draw_seed=draw_seed
    )
