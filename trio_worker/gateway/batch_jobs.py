"""From the lines of a file of requests to jobs, and from their answers to the lines of another.

A line's body is read as a request to its `url` would be, by the same rules, so that what runs at
once runs in a batch, too, and the other way round. What is wrong with a line is found before any
of its file is put into the queue, but for what only a worker can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from trio_worker.calling.attempts import error_of
from trio_worker.core.priority import NAMES, level_of
from trio_worker.errors import InternalError, InvalidRequest, WorkerError
from trio_worker.gateway.errors import reply_to
from trio_worker.gateway.fields import Asked, Rules, read_request
from trio_worker.gateway.json_body import read_object
from trio_worker.gateway.keys import Key
from trio_worker.gateway.models import Limits
from trio_worker.gateway.shapes import Endpoint
from trio_worker.wire import native, subjects
from trio_worker.wire.batch_file import BadLine, RequestLine, answer_line, request_lines
from trio_worker.wire.native.faults import streamed_job

_HEADERS_BYTES = 1024
"""More than the headers of a job have; they count as a part of the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for all lines of a file."""

    key: Key
    rules: Rules
    priority: str
    """Of lines that name none."""
    limits_of: Callable[[str | None], Limits]
    message_bytes: int
    """The largest message that the server takes."""
    model: str | None = None
    """Asked instead of the one that a line names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A line as it is put into the queue."""

    custom_id: str
    request_id: str
    subject: str
    body: bytes


def request_id_of(batch_id: str, number: int) -> str:
    """The id of the job of a file's request; the first has the number 1.

    It is the same whenever the file is read, so nothing of it is run twice.
    """
    return f"{batch_id}-{number}"


def jobs_of(
    text: bytes, terms: Terms, *, batch_id: str, url: str | None = None
) -> Iterator[Job | BadLine]:
    """The jobs of a file, each made when it is asked for, and what is wrong with other lines.

    `url` is what every line has to ask for; None leaves it to the lines.
    """
    for number, line in enumerate(request_lines(text), start=1):
        if isinstance(line, BadLine):
            yield line
        elif url is not None and line.url != url:
            yield BadLine(line.line, f"url: {line.url}; all lines of this batch ask {url}", "url")
        else:
            yield _job(line, terms, request_id_of(batch_id, number))


def _job(line: RequestLine, terms: Terms, request_id: str) -> Job | BadLine:
    try:
        body = line.body
        if terms.model is not None:
            given = read_object(body, limit_bytes=terms.rules.body_limit_bytes)
            body = msgspec.json.encode({**given, "model": terms.model})
        asked = read_request(
            Endpoint(line.url),
            body,
            {"x-priority": terms.priority},
            key=terms.key,
            rules=terms.rules,
            limits_of=terms.limits_of,
        )
        if asked.stream:
            raise streamed_job()
        job = Job(
            custom_id=line.custom_id,
            request_id=request_id,
            subject=_subject(asked, terms),
            body=msgspec.json.encode({**asked.fields, "request_id": request_id}),
        )
        if len(job.body) + _HEADERS_BYTES > terms.message_bytes:
            raise InvalidRequest(
                f"the request has {len(job.body)} bytes; the NATS server takes "
                f"{terms.message_bytes}, headers counted"
            )
    except WorkerError as error:
        where = error.details.get("field")
        return BadLine(line.line, error.message, f"body.{where}" if where else "body")
    return job


def _subject(asked: Asked, terms: Terms) -> str:
    if asked.model is None:
        raise InvalidRequest(
            "model: it is needed in a batch, and not there; name the model that is to answer",
            details={"field": "model"},
        )
    if not subjects.can_be_in_one(asked.model):
        raise InvalidRequest(
            f"model: {asked.model[:64]!r} cannot be a part of a NATS subject",
            details={"field": "model"},
        )
    levels = terms.limits_of(asked.model).priority_levels
    level = level_name(asked.fields["priority"], levels)
    return subjects.job(level=level, caller=asked.fields.get("caller"), model=asked.model)


def level_name(priority: int | str, levels: int) -> str:
    """The level of a priority in the subjects of jobs, which know three."""
    if isinstance(priority, str):
        return priority
    high, medium, low = NAMES
    if priority <= level_of(high, levels):
        return high
    return low if priority >= level_of(low, levels) else medium


def line_of_answer(
    headers: Mapping[str, str], body: bytes, *, custom_id: str, request_id: str
) -> tuple[bytes, bool]:
    """The line of an answer as it is stored, and whether it is one that succeeded.

    What failed is told as it would have been over HTTP.
    """
    if headers.get(native.Header.TERMINAL) != "error":
        line = answer_line(custom_id=custom_id, request_id=request_id, status=200, body=body)
        return line, True
    try:
        error = error_of(msgspec.json.decode(body))
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError):
        error = InternalError("what is stored is no answer")
    reply = reply_to(error)
    line = answer_line(
        custom_id=custom_id, request_id=request_id, status=reply.status, body=reply.body()
    )
    return line, False
