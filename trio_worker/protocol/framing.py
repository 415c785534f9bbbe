"""Cuts a stream of bytes into frames: four bytes of length (big endian), and a body.

Imports nothing slow: a process of which only the framing is needed starts with this alone.
"""

from __future__ import annotations

import struct

MAX_FRAME_BYTES = 64 * 2**20
RECEIVE_BYTES = 2**16
"""How much is read at a time: the allocator has that much at hand, and not four times of it."""
_LENGTH = struct.Struct(">I")


class FrameError(Exception):
    """The other side did not send a frame: a programmer's error, or two versions mixed."""


class HungUp(Exception):
    """The other side is gone."""

    def __init__(self) -> None:
        super().__init__("it hung up")


def framed(body: bytes, *, most_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The body with its length before it."""
    if len(body) > most_bytes:
        raise FrameError(f"a frame of {len(body)} bytes is over {most_bytes}")
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Its state is the bytes not yet cut off."""

    def __init__(self, *, most_bytes: int = MAX_FRAME_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data

    def take(self) -> bytes | None:
        """The next whole frame's body, or None if more bytes are needed."""
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > self._most_bytes:
            raise FrameError(f"a frame claims {length} bytes; the limit is {self._most_bytes}")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        return body
