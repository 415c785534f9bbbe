"""The engine's ends of the two lines to the worker, and the end of the process when it hangs up.

Imports nothing slow: the process must notice a vanished worker while it still imports MLX.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from trio_worker.engine.frame_socket import FrameSocket
from trio_worker.errors import ExitStatus
from trio_worker.protocol.frames import FromEngine, ToEngine, decode_to_engine, encode
from trio_worker.protocol.framing import HungUp

TOGETHER_S = 0.001
"""How long an answer may wait for those to what was asked with it."""


class Line:
    """One end of a socket pair, in whole frames."""

    def __init__(self, file_descriptor: int) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._socket.setblocking(True)
        self._frames = FrameSocket(self._socket)

    def receive(self) -> ToEngine:
        """The next frame; the process ends here if the worker has gone."""
        try:
            body = self._frames.receive()
        except (HungUp, OSError):
            leave(ExitStatus.OK)
        return decode_to_engine(body)

    def answer(self, answer: Callable[[ToEngine], FromEngine]) -> NoReturn:
        """Answer whatever comes, in order; what has come together is answered together.

        Unless that takes its time: then what there is goes out.
        """
        while True:
            answers: list[FromEngine] = []
            until = time.monotonic() + TOGETHER_S
            for asked in self._receive_all():
                answers.append(answer(asked))
                if time.monotonic() > until:
                    self.send(*answers)
                    answers.clear()
                    until = time.monotonic() + TOGETHER_S
            self.send(*answers)

    def _receive_all(self) -> list[ToEngine]:
        """The next frame, and those that have come with it."""
        try:
            bodies = self._frames.receive_all()
        except (HungUp, OSError):
            leave(ExitStatus.OK)
        return [decode_to_engine(body) for body in bodies]

    def send(self, *frames: FromEngine) -> None:
        try:
            self._socket.sendall(b"".join(map(encode, frames)))
        except OSError:
            leave(ExitStatus.OK)

    def leave_when_hung_up(self) -> None:
        """From now on the process ends with the worker, whatever its other threads do."""
        threading.Thread(target=self._watch, name="hang-up", daemon=True).start()

    def _watch(self) -> None:
        poll = select.poll()
        # Only errors and hang-ups, which are reported without being asked for.
        poll.register(self._socket, 0)
        while not poll.poll():
            pass
        leave(ExitStatus.OK)


def leave(status: ExitStatus) -> NoReturn:
    """End the process now, from whatever thread, in the middle of whatever the others do."""
    logging.shutdown()
    os._exit(status)
