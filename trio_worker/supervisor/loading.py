"""Has the engine process load its model, and waits for that with patience, but not for ever."""

from __future__ import annotations

import trio

from trio_worker.ports import ProgressSink
from trio_worker.protocol.frames import PREWARMING, Hello, LoadFailed, Progress, encode
from trio_worker.protocol.turn import EngineInfo
from trio_worker.supervisor.frame_stream import FrameStream
from trio_worker.supervisor.load_patience import LoadPatience


class CannotLoad(Exception):
    """The engine says that the model cannot be loaded, and that trying again would not help."""


class Silent(Exception):
    """The engine has said nothing for longer than the next step may take."""


async def load(
    stream: FrameStream, hello: Hello, patience: LoadPatience, on_progress: ProgressSink | None
) -> EngineInfo:
    """Tell the engine what to load; returns what it says of itself once it is ready.

    A download may take its time; computing may not: `patience` knows how long, and learns.
    Raises `CannotLoad`, `Silent`, `HungUp` and `FrameError`. Cancelled: the engine goes on.
    """
    await stream.send(encode(hello))
    patience.begun(trio.current_time())
    step = ""
    while True:
        try:
            with trio.fail_after(patience.patience_s):
                frame = await stream.receive()
        except trio.TooSlowError:
            where = f", at {step}" if step else ""
            raise Silent(
                f"it did not {patience.step} within {patience.patience_s:g} s{where}"
            ) from None
        if isinstance(frame, EngineInfo):
            patience.loaded(trio.current_time())
            return frame
        if isinstance(frame, LoadFailed):
            raise CannotLoad(frame.message)
        assert isinstance(frame, Progress)
        if frame.step == PREWARMING:
            patience.prewarming()
        elif frame.step != step:
            patience.stepped(trio.current_time())
        step = frame.step
        if on_progress is not None:
            on_progress(frame.step, frame.done, frame.total, frame.unit)
