"""What fits on the wire, and in which form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from trio_worker.errors import MessageTooLarge

CONTROL_LINE_LIMIT_BYTES = 4096
"""A server's default. It ends a connection whose PUB line is longer, for good."""

BODY_END = b"\r\n"
"""What goes behind the body, and no size counts it."""

_VERSION_LINE = "NATS/1.0\r\n"
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
    headers: dict[str, str]
    head: bytes
    """What goes before the body: the command line and the block of the headers."""
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
    headers = {name: _plain(value) for name, value in message.headers.items()}
    for name in headers:
        if not _HEADER_NAME.match(name):
            raise ValueError(f"{name!r} is not the name of a header")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    # Headers are ASCII: as many bytes as characters.
    block = f"{_VERSION_LINE}{lines}\r\n" if lines else ""
    payload_bytes = len(block) + len(message.body)
    if payload_bytes > max_payload:
        raise MessageTooLarge(payload_bytes, max_payload)
    subject_bytes = len(message.subject.encode()) + len(reply.encode())
    sizes = f"{len(block)} {payload_bytes}"
    line_bytes = len("HPUB   \r\n") + subject_bytes + len(sizes)
    if line_bytes > CONTROL_LINE_LIMIT_BYTES:
        raise MessageTooLarge(line_bytes, CONTROL_LINE_LIMIT_BYTES)
    subjects = f"{message.subject} {reply}" if reply else message.subject
    line = f"HPUB {subjects} {sizes}" if block else f"PUB {subjects} {payload_bytes}"
    return Parcel(
        subject=message.subject,
        body=message.body,
        reply=reply,
        headers=headers,
        head=f"{line}\r\n{block}".encode(),
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
