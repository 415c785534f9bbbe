"""The worker's end of a socket pair to the engine process, in whole frames."""

from __future__ import annotations

import socket
from contextlib import suppress
from types import TracebackType
from typing import Self

import trio

from trio_worker.exception_groups import sole_exceptions
from trio_worker.protocol.frames import FromEngine, decode_from_engine
from trio_worker.protocol.framing import RECEIVE_BYTES, FrameBuffer, HungUp


class FrameStream:
    """Takes over a connected socket, which is closed when the `with` block is left.

    Its state: the bytes of whole frames that the socket has not taken yet, and those that have
    come and are no frame yet. Bounds: what is to be sent next, and one frame.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._unsent = bytearray()
        self._buffer = FrameBuffer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; whoever waits for it raises `trio.ClosedResourceError`. Also twice."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def send_now(self, frame: bytes) -> None:
        """Send as much of a frame as the socket takes at once; `flush` sends the rest.

        Raises `HungUp`.
        """
        self._unsent += frame
        self._push()

    async def send(self, frame: bytes) -> None:
        """Send one frame. Raises `HungUp`. Cancelled: the next `flush` sends the rest."""
        self.send_now(frame)
        await self.flush()

    async def flush(self) -> None:
        """Return when the socket has taken everything. Raises `HungUp`.

        Not a checkpoint if it has already. Cancelled: the next call sends the rest.
        """
        while self._unsent:
            await trio.lowlevel.wait_writable(self._socket)
            self._push()

    async def receive(self) -> FromEngine:
        """The next frame; a checkpoint. Meanwhile what is unsent is sent.

        Raises `HungUp`, `FrameError`, and `trio.ClosedResourceError` if it is closed on our side.
        Cancelled: nothing is lost.
        """
        if self._unsent:
            return await self._receive_and_flush()
        return await self._receive()

    async def _receive(self) -> FromEngine:
        await trio.lowlevel.checkpoint_if_cancelled()
        has_waited = False
        while (body := self._buffer.take()) is None:
            if not self._read():
                await trio.lowlevel.wait_readable(self._socket)
                has_waited = True
        if not has_waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return decode_from_engine(body)

    def receive_nowait(self) -> FromEngine | None:
        """The next frame of those that have come already, or None. Raises `FrameError`."""
        body = self._buffer.take()
        return None if body is None else decode_from_engine(body)

    async def _receive_and_flush(self) -> FromEngine:
        """Both at once: the other side may read no more before what it has written is read."""
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._flush_until_closed)
                frame = await self._receive()
                nursery.cancel_scope.cancel(reason="a frame has come")
        return frame

    async def _flush_until_closed(self) -> None:
        """The end of the line is told by who receives, once."""
        with suppress(trio.ClosedResourceError, HungUp):
            await self.flush()

    def _read(self) -> bool:
        """Take in what has come; False if nothing has."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            raise HungUp
        self._buffer.feed(data)
        return True

    def _push(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except ConnectionError as exc:
            raise HungUp from exc
        del self._unsent[:sent]
