"""What is asked and what is answered, as values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import unquote


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The head of a request."""

    method: str
    path: str
    """Percent-decoded, without the query."""
    query: str
    """As it came, without the question mark."""
    headers: Mapping[str, str]
    """By lower-case name; several of one name are joined by a comma."""
    has_body: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. Date, Content-Length and Connection are added where it is sent."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class CallerGone(Exception):
    """The caller has broken off, or does not take what it is sent."""


class Refused(Exception):
    """A request that cannot be read on; its connection is closed after the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.answer = refusal(status, message)


_CODES = {HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "payload_too_large"}
"""Where the phrase is another in another version of Python."""


def refusal(status: HTTPStatus, message: str) -> Answer:
    """An answer that says what is wrong, in the form in which OpenAI's clients look for it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = _CODES.get(status) or status.phrase.lower().replace(" ", "_").replace("-", "_")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return Answer(
        status=status,
        # What cannot be read will not be read the next time: client libraries try 408 again.
        headers={
            "Content-Type": "application/json",
            "X-Should-Retry": "true" if status >= 500 else "false",
        },
        body=json.dumps({"error": error}).encode(),
    )


def request_of(
    method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], *, has_body: bool
) -> Request:
    """The request that a head spells; a proxy's `http://host/path` is taken for its path."""
    text = target.decode("latin-1")
    if text.lower().startswith(("http://", "https://")):
        _, slash, rest = text.partition("://")[2].partition("/")
        text = f"/{rest}" if slash else "/"
    path, _, query = text.partition("?")
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return Request(
        method=method.decode("latin-1"),
        path=unquote(path) if "%" in path else path,
        query=query,
        headers=found,
        has_body=has_body,
    )


@lru_cache(maxsize=4)
def http_date(second: int) -> str:
    """A second since the epoch as the header `Date` spells it."""
    return formatdate(second, usegmt=True)
