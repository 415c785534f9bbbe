"""The headers of a request that one worker passes to another: who is to be answered, and so on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from trio_worker.protocol.turn import RequestId
from trio_worker.wire.native.request import request_id_of

_NUMBER = re.compile(r"\A[0-9]{1,9}\Z")
_FORWARDED = re.compile(r"\Ainference\.[^.\s]+\.fwd\.\d+\Z")


class HopHeader(StrEnum):
    """Every header that is added to a request that is passed on."""

    REPLY_TO = "Reply-To"
    """The caller's reply subject; on the message's own the server says that nobody listens."""
    ROUTE = "Route"
    """Who has passed it on, from the first to the last."""
    CALLER = "Caller"
    """Who asks, where the server's permissions vouch for it; absent otherwise."""
    REQUEST_ID = "Request-Id"
    """With the next two, on a request that was waiting here already: its id."""
    SEQUENCE = "Sequence"
    """The number that the next message of its answer has."""
    LEFT_MS = "Left-Ms"
    """What is left of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """What a worker says about a request that it passes on."""

    reply_to: str | None
    route: tuple[str, ...] = ()
    caller: str | None = None
    request_id: RequestId | None = None
    """Set for one that was waiting there."""
    sequence: int = 0
    """How many messages its caller has got."""
    left_ms: int | None = None


def read_hop(reply: str | None, headers: Mapping[str, str]) -> Hop | None:
    """What another worker has said about a request; None for one that comes from a caller.

    `reply` and `headers` are those of the message, which came on the worker's own subject.
    """
    if reply is None or HopHeader.ROUTE not in headers or not _FORWARDED.match(reply):
        return None
    return Hop(
        reply_to=headers.get(HopHeader.REPLY_TO),
        route=tuple(filter(None, headers[HopHeader.ROUTE].split(","))),
        caller=headers.get(HopHeader.CALLER),
        request_id=request_id_of({"request_id": headers.get(HopHeader.REQUEST_ID)}),
        sequence=_number(headers.get(HopHeader.SEQUENCE)) or 0,
        left_ms=_number(headers.get(HopHeader.LEFT_MS)),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and _NUMBER.match(text) else None


def with_hop(headers: Mapping[str, str], hop: Hop) -> dict[str, str]:
    """The headers of a request as it is passed on: those it has, with what is said of it."""
    passed = {name: value for name, value in headers.items() if name not in set(HopHeader)}
    passed[HopHeader.ROUTE] = ",".join(hop.route)
    if hop.reply_to is not None:
        passed[HopHeader.REPLY_TO] = hop.reply_to
    if hop.caller is not None:
        passed[HopHeader.CALLER] = hop.caller
    if hop.request_id is not None:
        passed[HopHeader.REQUEST_ID] = hop.request_id
        passed[HopHeader.SEQUENCE] = str(hop.sequence)
    if hop.left_ms is not None:
        passed[HopHeader.LEFT_MS] = str(hop.left_ms)
    return passed
