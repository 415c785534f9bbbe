"""Where the event loop's thread is while it is blocked: the standard library's faulthandler.

Its timer waits in C without Python's lock, so it sees also what never lets go of that lock. It is
one for the whole process; somebody else who uses it meanwhile would lose their sample or ours.
"""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from loguru import logger

FRAMES_MAX = 16
_BYTES_MAX = 65_536
"""What is read of a sample, which is of all threads."""
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)


class FaultHandlerSampler:
    """The `StackSampler` of the thread that made it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._thread = threading.get_ident()

    def arm(self, after_s: float) -> None:
        faulthandler.dump_traceback_later(after_s, file=self._file)

    def disarm(self) -> str | None:
        # Returns when a sample that is being written is complete.
        faulthandler.cancel_dump_traceback_later()
        if not self._file.seek(0, os.SEEK_END):
            return None
        self._file.seek(0)
        text = self._file.read(_BYTES_MAX).decode(errors="replace")
        self._file.seek(0)
        self._file.truncate()
        return _stack_of(self._thread, text)


@contextmanager
def open_stack_sampler() -> Iterator[FaultHandlerSampler | None]:
    """A sampler for the calling thread; None where no temporary file can be made."""
    with ExitStack() as stack:
        try:
            # Unbuffered: faulthandler writes to the descriptor.
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        except OSError as error:
            logger.warning("What blocks the event loop cannot be noted: {}", error)
            yield None
            return
        # Before the file is closed, whose number might be given to another one.
        stack.callback(faulthandler.cancel_dump_traceback_later)
        yield FaultHandlerSampler(file)


def _stack_of(thread: int, text: str) -> str | None:
    """The frames of one thread of a sample of all."""
    # Before the first thread, and then by turns: a thread's number, its frames.
    parts = _THREAD.split(text)[1:]
    for number, frames in zip(parts[::2], parts[1::2], strict=True):
        if int(number, 16) == thread:
            lines = [line.strip() for line in frames.splitlines()[1:] if line.strip()]
            return "\n".join(lines[:FRAMES_MAX]) or None
    return None
