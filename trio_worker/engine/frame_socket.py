"""A blocking socket in whole frames, for the engine process and for the one that it starts."""

from __future__ import annotations

import socket

from trio_worker.protocol.framing import (
    MAX_FRAME_BYTES,
    RECEIVE_BYTES,
    FrameBuffer,
    HungUp,
    framed,
)


class FrameSocket:
    """Takes over a connected socket. Its state: the bytes that have come and are no frame yet."""

    def __init__(self, connected: socket.socket, *, most_bytes: int = MAX_FRAME_BYTES) -> None:
        self.socket = connected
        self._most_bytes = most_bytes
        self._buffer = FrameBuffer(most_bytes=most_bytes)

    def send(self, body: bytes) -> None:
        """Send one frame. Raises `FrameError`, and `OSError`, which `TimeoutError` is."""
        self.socket.sendall(framed(body, most_bytes=self._most_bytes))

    def receive(self) -> bytes:
        """The next frame's body.

        Raises `HungUp`, `FrameError`, and `OSError` as the socket does.
        """
        while (body := self._buffer.take()) is None:
            data = self.socket.recv(RECEIVE_BYTES)
            if not data:
                raise HungUp
            self._buffer.feed(data)
        return body

    def receive_all(self) -> list[bytes]:
        """The bodies of the next frame and of those that have come with it. Raises as `receive`."""
        bodies = [self.receive()]
        while (body := self._buffer.take()) is not None:
            bodies.append(body)
        return bodies

    def close(self) -> None:
        self.socket.close()
