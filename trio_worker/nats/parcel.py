"""What fits on the wire, and in which form.

What many messages have in common is checked and encoded once, as an `Envelope`; each message is
sealed in one, as a `Parcel`, which is ready to be written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import msgspec

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


class Parcel(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A message that has been checked and is as it will be on the wire."""

    envelope: Envelope
    headers: dict[str, str]
    """What it has beside those of the envelope, in their form on the wire."""
    head: bytes
    """What goes before the body: the command line and the block of all headers."""
    body: bytes
    payload_bytes: int
    """What the server compares with its `max_payload`: the header block and the body."""
    size: int
    """What the parcel counts for in the outbox: the payload and both subjects."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What messages have in common: checked, and in its form on the wire."""

    subject: str
    reply: str
    """Empty for none."""
    headers: dict[str, str]
    subjects: str
    """Both, as in the command line."""
    subject_bytes: int
    """Of both."""
    lines: str
    """The headers, as in their block."""

    def seal(self, body: bytes, headers: Mapping[str, str], *, max_payload: int) -> Parcel:
        """Fix the form of a message with more `headers`, which go behind those in common.

        Raises `MessageTooLarge` if the server would end the connection over it, and `ValueError`
        if a header's name is not one, or is there already.
        """
        own: dict[str, str] = {}
        lines = self.lines
        for name, value in headers.items():
            if name in self.headers:
                raise ValueError(f"the header {name!r} is on the envelope too")
            own[name] = plain = _plain(value)
            lines += _line(name, plain)
        # Headers are ASCII: as many bytes as characters.
        block = f"{_VERSION_LINE}{lines}\r\n" if lines else ""
        payload_bytes = len(block) + len(body)
        if payload_bytes > max_payload:
            raise MessageTooLarge(payload_bytes, max_payload)
        sizes = f"{len(block)} {payload_bytes}"
        line_bytes = len("HPUB   \r\n") + self.subject_bytes + len(sizes)
        if line_bytes > CONTROL_LINE_LIMIT_BYTES:
            raise MessageTooLarge(line_bytes, CONTROL_LINE_LIMIT_BYTES)
        line = f"HPUB {self.subjects} {sizes}" if block else f"PUB {self.subjects} {payload_bytes}"
        return Parcel(
            envelope=self,
            headers=own,
            head=f"{line}\r\n{block}".encode(),
            body=body,
            payload_bytes=payload_bytes,
            size=payload_bytes + self.subject_bytes,
        )


def address(subject: str, reply: str | None, headers: Mapping[str, str]) -> Envelope:
    """Check what messages have in common, and fix its form on the wire.

    Header values become printable ASCII without space at the ends: every other character,
    line ends included, is replaced by the percent-encoding of its UTF-8 bytes. A `%` stays as
    it is, so that what is plain already arrives unchanged.

    Raises `ValueError` if a subject or a header's name is not one.
    """
    for each in (subject, reply or ""):
        if _NOT_IN_SUBJECTS.search(each):
            raise ValueError(f"white space in the subject {each!r}")
    if not subject:
        raise ValueError("a message needs a subject")
    plain = {name: _plain(value) for name, value in headers.items()}
    return Envelope(
        subject=subject,
        reply=reply or "",
        headers=plain,
        subjects=f"{subject} {reply}" if reply else subject,
        subject_bytes=len(subject.encode()) + len((reply or "").encode()),
        lines="".join(_line(name, value) for name, value in plain.items()),
    )


def seal(message: Sendable, *, max_payload: int) -> Parcel:
    """One message in an envelope of its own. Raises as `address` and `Envelope.seal`."""
    envelope = address(message.subject, message.reply, message.headers)
    return envelope.seal(message.body, {}, max_payload=max_payload)


def _line(name: str, plain: str) -> str:
    return f"{_checked(name)}: {plain}\r\n"


@lru_cache(maxsize=64)
def _checked(name: str) -> str:
    """The name, if it is one: there are few, and each goes with very many messages."""
    if not _HEADER_NAME.match(name):
        raise ValueError(f"{name!r} is not the name of a header")
    return name


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
