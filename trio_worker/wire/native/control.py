"""What is said on the control subjects: a request is to end."""

from __future__ import annotations

import msgspec

from trio_worker.protocol.turn import RequestId

CANCEL_BODY = b"cancel"
"""On the control subject of the request itself."""


class _CancelById(msgspec.Struct):
    request_id: str


def cancel_by_id(request_id: str) -> bytes:
    """The message on `inference.cancel` that ends this request, wherever it is."""
    return msgspec.json.encode(_CancelById(request_id))


def cancelled_id(body: bytes) -> RequestId | None:
    """The id in a message on `inference.cancel`; None if there is none to be found."""
    try:
        return RequestId(msgspec.json.decode(body, type=_CancelById).request_id)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def cancel_reply(request_id: RequestId, *, cancelled: bool) -> bytes:
    """What came of a cancel, for whoever asked to be told."""
    return msgspec.json.encode({"request_id": request_id, "cancelled": cancelled})
