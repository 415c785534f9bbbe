"""Bytes to a caller that may be slow, gone, or not reading at all."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

import trio

from trio_worker.http.messages import CallerGone

PIECE_BYTES = 64 * 1024
"""What a caller must take within the bound: whoever reads slowly, but reads, gets all."""
UNCHECKED_SENDS = 16
"""So many sends at once may do without a checkpoint, then others get their turn."""


class BoundedSender:
    """Sends over one stream, for one task at a time."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, send_s: float) -> None:
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._send_s = send_s
        self._unchecked = 0
        self._is_waiting = False

    async def checkpoint_if_due(self) -> None:
        """A checkpoint after several sends without one; nothing is under way when it cancels."""
        if self._unchecked >= UNCHECKED_SENDS:
            self._unchecked = 0
            await trio.lowlevel.checkpoint()

    async def send(self, data: bytes) -> None:
        """Return when the system has taken all of `data`.

        Mostly it takes it at once, and then this is no checkpoint: that is a third of what an
        event of a stream costs. Cancelled: a part is under way.

        Raises:
            CallerGone: if the connection is broken, or the caller takes nothing for too long.
        """
        self._unchecked += 1
        sent = self._send_nowait(data)
        if sent < len(data):
            self._unchecked = 0
            await self._send_rest(memoryview(data)[sent:])

    def _send_nowait(self, data: bytes) -> int:
        """How many bytes the system took; none where there is no socket."""
        # One task would send into the middle of what another one is sending.
        assert not self._is_waiting
        if self._socket is None or not data:
            return 0
        try:
            return os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise CallerGone from error

    async def _send_rest(self, rest: memoryview) -> None:
        self._is_waiting = True
        try:
            for start in range(0, len(rest), PIECE_BYTES):
                with trio.move_on_after(self._send_s) as sending:
                    await self._stream.send_all(rest[start : start + PIECE_BYTES])
                if sending.cancelled_caught:
                    raise CallerGone
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise CallerGone from error
        finally:
            self._is_waiting = False

    def make_close_a_reset(self) -> None:
        """Closing will tell the caller that it has not got everything."""
        if self._socket is not None:
            with suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
