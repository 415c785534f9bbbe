"""Files of requests, and of their answers, as OpenAI's batch API has them: an object a line.

Nothing here knows what a request means: its body is taken as it is, and an answer is put into its
line as it came. Lines are counted from 1, blank ones too, as an editor counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from trio_worker.errors import InvalidRequest
from trio_worker.wire.native.faults import place_and_fault

URLS = ("/v1/chat/completions", "/v1/completions")
"""What a line may ask for."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXAMPLE = (
    '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", '
    '"body": {"model": …, "messages": […]}}'
)


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    url: str
    body: msgspec.Raw
    method: str = "POST"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """A line of a file of requests."""

    line: int
    custom_id: str
    """What the answer's line is called by; no other line of the file has it."""
    url: str
    body: bytes
    """The JSON of what is asked, not looked into."""


class BadLine(InvalidRequest):
    """A line that is no request; `line` is its number.

    Attributes:
        where: the place in the line, such as `body.temperature`; None is the line as a whole.
    """

    def __init__(self, line: int, what: str, where: str | None = None) -> None:
        super().__init__(f"line {line}: {what}", details={"field": where})
        self.line = line
        self.what = what
        self.where = where


def request_lines(text: bytes) -> Iterator[RequestLine | BadLine]:
    """The lines of a file of requests, blank ones left out, each read when it is asked for.

    One that is no request comes as what is wrong with it; the next ones come all the same.
    """
    numbers: dict[str, int] = {}
    """The line of each id: as many as the file has lines."""
    for number, line in enumerate(text.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if not line.strip():
            continue
        read = _read(number, line)
        if isinstance(read, RequestLine):
            first = numbers.setdefault(read.custom_id, number)
            if first != number:
                read = BadLine(
                    number,
                    f"custom_id: {read.custom_id[:64]!r} is that of line {first}, too; give each "
                    "line one of its own",
                    "custom_id",
                )
        yield read


def _read(number: int, line: bytes) -> RequestLine | BadLine:
    try:
        read = msgspec.json.decode(line, type=_Line)
    except msgspec.ValidationError as exc:
        where, what = place_and_fault(exc)
        if not what:
            # It is the line itself, which has no place.
            return BadLine(number, f"{exc}; expected {_EXAMPLE}")
        return BadLine(number, f"{where[:64]}: {what}; expected {_EXAMPLE}", where[:64])
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        return BadLine(
            number, f"it is not JSON: {exc}; expected an object on each line: {_EXAMPLE}"
        )
    if read.method != "POST":
        return BadLine(number, f"method: {read.method[:16]!r}; expected POST", "method")
    if read.url not in URLS:
        expected = " or ".join(URLS)
        return BadLine(number, f"url: {read.url[:64]!r}; expected {expected}", "url")
    return RequestLine(line=number, custom_id=read.custom_id, url=read.url, body=bytes(read.body))


class _Error(msgspec.Struct, frozen=True):
    code: str
    message: str


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _AnswerLine(msgspec.Struct, frozen=True):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


def answer_line(*, custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """The line of an answer, or of the error that it is, with its end."""
    response = _Response(status, request_id, msgspec.Raw(body))
    return _line(_AnswerLine(f"batch_req_{request_id}", custom_id, response, None))


def unanswered_line(*, custom_id: str, request_id: str, code: str, message: str) -> bytes:
    """The line of a request that nobody will answer any more, with its end."""
    error = _Error(code, message)
    return _line(_AnswerLine(f"batch_req_{request_id}", custom_id, None, error))


def answered_id(line: bytes) -> str | None:
    """The `custom_id` of a whole line of answers; None for anything else, such as half of one."""
    try:
        read: Any = msgspec.json.decode(line, type=_AnswerLine)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return str(read.custom_id)


def _line(value: _AnswerLine) -> bytes:
    return msgspec.json.encode(value).replace(b"\n", b" ") + b"\n"
