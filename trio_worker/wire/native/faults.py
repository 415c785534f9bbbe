"""What is wrong with a request, in OpenAI's words where these are known."""

from __future__ import annotations

import re

import msgspec

from trio_worker.errors import InvalidRequest

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_NAME_MAX = 64
_QUOTED_MAX = 256
"""Characters of a fault's description, which may quote what the caller sent."""


def place_and_fault(exc: msgspec.ValidationError) -> tuple[str, str]:
    """Where a value is not of its type, such as `a[0].b`, and what is wrong there."""
    # `Expected … - at `$.a[0].b``; the last such words, for others may be the caller's own.
    what, _, path = str(exc).rpartition(" - at `$.")
    return path.removesuffix("`"), what[:_QUOTED_MAX]


def refused(message: str, where: str, *, limit: int | None = None) -> InvalidRequest:
    """The error with this message, about the field or the place in one that is `where`."""
    return InvalidRequest(
        message, details={"field": where, **({} if limit is None else {"limit": limit})}
    )


def invalid_value(value: str, supported: str, where: str) -> InvalidRequest:
    return refused(f"Invalid value: {value[:64]!r}. Supported values are: {supported}.", where)


def missing(where: str) -> InvalidRequest:
    return refused(f"Missing required parameter: '{where}'.", where)


def streamed_job() -> InvalidRequest:
    return refused("stream: a job is answered as a whole; leave it out", "stream")


def too_long(what: str, length: int, limit: int, where: str) -> InvalidRequest:
    """`what` is `string` or `array`."""
    article = "an" if what == "array" else "a"
    return refused(
        f"Invalid '{where}': {what} too long. Expected {article} {what} with maximum length "
        f"{limit}, but got {article} {what} with length {length} instead.",
        where,
        limit=limit,
    )


def check_name(name: str, where: str) -> None:
    """Raise `InvalidRequest` unless this may be the name of a function or of a schema."""
    if len(name) > _NAME_MAX:
        raise too_long("string", len(name), _NAME_MAX, where)
    if not _NAME.fullmatch(name):
        raise refused(
            f"Invalid '{where}': string does not match pattern. Expected a string that matches "
            f"the pattern '^{_NAME.pattern}$'.",
            where,
        )
