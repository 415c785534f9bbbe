"""What waits to be published: a queue with one account per caller, and what fits on the wire.

Rules:

1. Parcels leave in the order they came, whoever put them in.
2. A parcel of a share leaves the queue by `take` or by `discard`, never otherwise: a share is
   bounded by its owner, who reads `unpublished_bytes`.
3. Parcels that belong to no share hold at most `loose_limit_bytes` together; what comes on top
   is dropped and counted.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from trio_worker.errors import MessageTooLarge

CONTROL_LINE_LIMIT_BYTES = 4096
"""A server's default. It ends a connection whose PUB line is longer, for good."""

_VERSION_LINE_BYTES = len(b"NATS/1.0\r\n")
_LINE_OVERHEAD_BYTES = len(b": \r\n")
_BLOCK_END_BYTES = len(b"\r\n")
_HEADER_NAME = re.compile(r"\A[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
_NOT_IN_SUBJECTS = re.compile(r"[ \t\r\n]")


class Sendable(Protocol):
    """The shape of `ports.Message`."""

    @property
    def subject(self) -> str: ...
    @property
    def body(self) -> bytes: ...
    @property
    def reply(self) -> str | None: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A message that has been checked and is as it will be on the wire."""

    subject: str
    body: bytes
    reply: str
    """Empty for none."""
    headers: dict[str, str] | None
    payload_bytes: int
    """What the server compares with its `max_payload`: the header block and the body."""
    size: int
    """What the parcel counts for in the outbox: the payload and both subjects."""


def seal(message: Sendable, *, max_payload: int) -> Parcel:
    """Check `message` and fix its form on the wire.

    Header values become printable ASCII without space at the ends: every other character,
    line ends included, is replaced by the percent-encoding of its UTF-8 bytes. A `%` stays as
    it is, so that what is plain already arrives unchanged.

    Raises `MessageTooLarge` if the server would end the connection over it, and `ValueError`
    if a subject or a header's name is not one.
    """
    reply = message.reply or ""
    for subject in (message.subject, reply):
        if _NOT_IN_SUBJECTS.search(subject):
            raise ValueError(f"white space in the subject {subject!r}")
    if not message.subject:
        raise ValueError("a message needs a subject")
    headers = {name: _plain(value) for name, value in message.headers.items()} or None
    header_bytes = 0
    if headers is not None:
        header_bytes = _VERSION_LINE_BYTES + _BLOCK_END_BYTES
        for name, value in headers.items():
            if not _HEADER_NAME.match(name):
                raise ValueError(f"{name!r} is not the name of a header")
            header_bytes += len(name) + len(value) + _LINE_OVERHEAD_BYTES
    payload_bytes = header_bytes + len(message.body)
    if payload_bytes > max_payload:
        raise MessageTooLarge(payload_bytes, max_payload)
    subject_bytes = len(message.subject.encode()) + len(reply.encode())
    line_bytes = len(f"HPUB   {header_bytes} {payload_bytes}\r\n") + subject_bytes
    if line_bytes > CONTROL_LINE_LIMIT_BYTES:
        raise MessageTooLarge(line_bytes, CONTROL_LINE_LIMIT_BYTES)
    return Parcel(
        subject=message.subject,
        body=message.body,
        reply=reply,
        headers=headers,
        payload_bytes=payload_bytes,
        size=payload_bytes + subject_bytes,
    )


def _plain(value: str) -> str:
    value = value.strip()
    if value.isascii() and value.isprintable():
        return value
    return "".join(
        character
        if character.isascii() and character.isprintable()
        else "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
        for character in value
    )


class Share:
    """One caller's account in an outbox."""

    __slots__ = ("_numbers", "_outbox", "unpublished_bytes")

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._numbers: set[int] = set()
        self.unpublished_bytes = 0

    def put(self, parcel: Parcel) -> None:
        self._numbers.add(self._outbox._append(parcel, self))  # noqa: SLF001 - one mechanism
        self.unpublished_bytes += parcel.size

    def discard(self) -> None:
        """Forget every parcel of this share that has not been taken."""
        self._outbox._remove(self._numbers)  # noqa: SLF001 - one mechanism
        self._numbers.clear()
        self.unpublished_bytes = 0

    def _taken(self, number: int, parcel: Parcel) -> None:
        self._numbers.remove(number)
        self.unpublished_bytes -= parcel.size


class Outbox:
    """The queue. Its state: the parcels by number of arrival, and what they add up to."""

    def __init__(self, *, loose_limit_bytes: int) -> None:
        self._entries: OrderedDict[int, tuple[Parcel, Share | None]] = OrderedDict()
        self._next_number = 0
        self._loose_bytes = 0
        self._loose_limit_bytes = loose_limit_bytes
        self.unpublished_bytes = 0
        self.dropped = 0
        """Loose parcels that found no room."""

    def __len__(self) -> int:
        return len(self._entries)

    def open_share(self) -> Share:
        return Share(self)

    def put(self, parcel: Parcel) -> bool:
        """Append a parcel that belongs to no share; False if it was dropped."""
        if self._loose_bytes + parcel.size > self._loose_limit_bytes:
            self.dropped += 1
            return False
        self._append(parcel, None)
        self._loose_bytes += parcel.size
        return True

    def take(self) -> Parcel | None:
        """The oldest parcel, which leaves the queue; None if there is none."""
        if not self._entries:
            return None
        number, (parcel, share) = self._entries.popitem(last=False)
        self.unpublished_bytes -= parcel.size
        if share is None:
            self._loose_bytes -= parcel.size
        else:
            share._taken(number, parcel)  # noqa: SLF001 - one mechanism
        return parcel

    def mark(self) -> int:
        """A point in the queue behind everything that is in it now."""
        return self._next_number

    def is_past(self, mark: int) -> bool:
        """Whether everything before `mark` has left the queue."""
        return not self._entries or next(iter(self._entries)) >= mark

    def _append(self, parcel: Parcel, share: Share | None) -> int:
        number = self._next_number
        self._next_number += 1
        self._entries[number] = (parcel, share)
        self.unpublished_bytes += parcel.size
        return number

    def _remove(self, numbers: set[int]) -> None:
        for number in numbers:
            parcel, _ = self._entries.pop(number)
            self.unpublished_bytes -= parcel.size


class ShareOutlet:
    """An `Outlet` of either broker: a share, and the broker's own way of filling it."""

    def __init__(self, share: Share, put: Callable[[Sendable, Share], None]) -> None:
        self._share = share
        self._put = put

    @property
    def unpublished_bytes(self) -> int:
        return self._share.unpublished_bytes

    def publish(self, message: Sendable) -> None:
        self._put(message, self._share)

    def discard(self) -> None:
        self._share.discard()
