"""The worker's own dialect: JSON with OpenAI's names. Pure: bytes in, bytes out.

What a caller sends is read by `request` and `control`; what it gets is written by `answer`,
`error_reply` and `reply_headers`.
"""

from trio_worker.core.request import SEED_END
from trio_worker.wire.native.answer import AnswerWriter, Usage, WorkerNote, is_silent
from trio_worker.wire.native.control import (
    CANCEL_BODY,
    cancel_by_id,
    cancel_reply,
    cancelled_id,
)
from trio_worker.wire.native.error_reply import error_body
from trio_worker.wire.native.fields import CALLER, FIELD_NAMES, RequestLimits
from trio_worker.wire.native.reply_headers import Header, common_headers, headers
from trio_worker.wire.native.request import (
    WITHOUT_EFFECT,
    Fields,
    parse_body,
    request_id_of,
    to_request,
)
from trio_worker.wire.native.whole_choice import WholeChoice

__all__ = [
    "CALLER",
    "CANCEL_BODY",
    "FIELD_NAMES",
    "SEED_END",
    "WITHOUT_EFFECT",
    "AnswerWriter",
    "Fields",
    "Header",
    "RequestLimits",
    "Usage",
    "WholeChoice",
    "WorkerNote",
    "cancel_by_id",
    "cancel_reply",
    "cancelled_id",
    "common_headers",
    "error_body",
    "headers",
    "is_silent",
    "parse_body",
    "request_id_of",
    "to_request",
]
