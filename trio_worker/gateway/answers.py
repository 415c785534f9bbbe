"""What a worker says, as OpenAI's clients expect to hear it.

A worker's bodies are OpenAI's already, so they are passed on without being read: only the last
message of a stream is taken apart, for its usage.

Rule 1: a stream ends with `[DONE]` after a worker's last word, and never otherwise: what fails
ends with the event of an `ErrorReply`.
Rule 2: a chunk without a choice is sent only to who has asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from trio_worker.errors import InternalError
from trio_worker.gateway.fields import Asked
from trio_worker.gateway.shapes import Endpoint

DONE = b"data: [DONE]\n\n"
WHOLE_HEADERS: Mapping[str, str] = {"content-type": "application/json"}
STREAM_HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Else a proxy collects what it is to pass on.
    "x-accel-buffering": "no",
}

_IN_USAGE_CHUNK = ("id", "object", "created", "model", "service_tier")
_NO_CHOICES = msgspec.Raw(b"[]")
_NULL = msgspec.Raw(b"null")


class AnswerWriter:
    """Writes the answer to one request, message by message; it keeps nothing of them."""

    def __init__(self, asked: Asked) -> None:
        self._include_usage = asked.include_usage
        said_again: dict[str, Any] = {}
        if asked.service_tier is not None and asked.endpoint is Endpoint.CHAT:
            said_again["service_tier"] = asked.service_tier
        self._end = _end_with(said_again)
        if asked.include_usage:
            said_again["usage"] = None
        self._end_of_chunk = _end_with(said_again)

    def whole(self, body: bytes) -> bytes:
        """The body of an answer that is not streamed."""
        return _with_end(body, self._end)

    def event(self, body: bytes) -> bytes:
        """A chunk of a stream, a keep-alive too, but not the last."""
        return _event(_with_end(body, self._end_of_chunk))

    def closing(self, body: bytes) -> bytes:
        """The last chunk of a stream, and what ends it.

        The usage is left out where it was not asked for, and so is a chunk that has nothing else:
        several choices end in chunks of their own. Raises `InternalError` if the chunk is not what
        a worker writes.
        """
        try:
            chunk = msgspec.json.decode(_with_end(body, self._end), type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise InternalError("what a worker sent last is no chunk of an answer") from exc
        usage = chunk.pop("usage", None)
        is_told = usage is not None and self._include_usage
        events = b""
        if chunk.get("choices") != _NO_CHOICES:
            events += _event(msgspec.json.encode(chunk | ({"usage": _NULL} if is_told else {})))
            chunk = {name: chunk[name] for name in _IN_USAGE_CHUNK if name in chunk}
        if is_told:
            told = chunk | {"choices": _NO_CHOICES, "usage": usage}
            events += _event(msgspec.json.encode(told))
        return events + DONE


def _event(body: bytes) -> bytes:
    if b"\n" in body or b"\r" in body:
        # Between the parts of JSON, which is the only place for it; it would end the event.
        body = b" ".join(body.splitlines())
    return b"data: " + body + b"\n\n"


def _with_end(body: bytes, end: bytes) -> bytes:
    """The object with another end, so that it has more fields without having been read."""
    return body if end == b"}" else body.rstrip()[:-1] + end


def _end_with(fields: Mapping[str, Any]) -> bytes:
    """The end of an object that has `fields`, too: `,"name":value}`."""
    return b"," + msgspec.json.encode(fields)[1:] if fields else b"}"
