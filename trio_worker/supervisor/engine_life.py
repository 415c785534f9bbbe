"""One life of the engine process: started, loaded, served, and killed when it comes to an end.

1. When `live` returns or raises, however that comes, the process has been killed and reaped, and
   nothing of it is left.
2. The first reason for its end is the one that counts, unless the engine has said what is wrong
   with its model. It is known before anybody is told that there will be no answer.
3. It serves from the moment its model is loaded until the moment its end has a reason.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio
from loguru import logger
from trio_util import AsyncBool

from trio_worker.errors import EngineLost, LossReason
from trio_worker.machine.child_process import (
    how_it_ended,
    kill_group,
    read_lines,
    start_group,
)
from trio_worker.ports import ProgressSink
from trio_worker.protocol.frames import Hello, encode
from trio_worker.protocol.framing import FrameError, HungUp
from trio_worker.protocol.turn import EngineInfo, Report, Work
from trio_worker.supervisor.engine_log import LINE_CHARACTERS, EngineLog
from trio_worker.supervisor.frame_stream import FrameStream
from trio_worker.supervisor.line import Line
from trio_worker.supervisor.load_patience import LoadPatience
from trio_worker.supervisor.loading import CannotLoad, Silent, load

# -P: no module comes from where we were started, which may be a model's folder.
ENGINE_PROGRAM = (sys.executable, "-P", "-m", "trio_worker.engine", "serve")

KILL_GRACE_S = 0.5
"""A killed child is gone in milliseconds; this bounds the wait for the system to say so."""

LOG_GRACE_S = 0.2
"""How long to read what a dead child had still written."""


LINE_ERRORS = (trio.TooSlowError, HungUp, FrameError, trio.ClosedResourceError)
"""What a line raises; the last where it was closed on our side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What is the same in every life."""

    hello: Hello
    turn_timeout_s: float
    """An answer on either line that takes longer ends the life."""
    on_progress: ProgressSink | None
    program: Sequence[str]
    """The command that serves; its ends of the two lines are appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why a life ended."""

    reason: LossReason
    message: str
    by_itself: bool = False
    """Rather than killed for it: then its exit status tells something."""
    is_models_fault: bool = False
    """It says itself that the model cannot be loaded."""


class EngineLife:
    """See above. Its state: the process's number while there is one, what is loaded, and the end.

    `serving` is shared by all lives, of which one at a time goes on: true while that one can be
    asked. What is to be tokenised goes into `tokenise`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        patience: LoadPatience,
        log: EngineLog,
        serving: AsyncBool,
    ) -> None:
        self._settings = settings
        self._patience = patience
        self._log = log
        self._serving = serving
        self._has_end = trio.Event()
        self._control: FrameStream | None = None
        """The line that turns are taken on; there is one while it serves."""
        self._reported_at = -math.inf
        """When the last turn was."""
        self.tokenise = Line()
        self.pid: int | None = None
        self.info: EngineInfo | None = None
        self.end: End | None = None

    async def live(self) -> End:
        """From start to end; returns why it ended, with the exit status where that tells more.

        Cancelled: takes less than a second all the same, whatever the process does.
        """
        self._log.begin()
        our_control, their_control = socket.socketpair()
        our_tokenise, their_tokenise = socket.socketpair()
        with FrameStream(our_control) as control, FrameStream(our_tokenise) as tokenise:
            with their_control, their_tokenise:
                process = await self._start(their_control.fileno(), their_tokenise.fileno())
            self._control = control
            async with trio.open_nursery() as logs:
                logs.start_soon(self._read_log, process)
                self.pid = process.pid
                try:
                    await self._run(process, control, tokenise)
                finally:
                    self._serving.value = False
                    # Before it can notice that a line ends: it would leave its children behind.
                    if process.returncode is None:
                        kill_group(process)
                    # Whoever waits for an answer is told now, and not when the process has gone.
                    control.close()
                    self.tokenise.close()
                    with trio.move_on_after(KILL_GRACE_S, shield=True):
                        await process.wait()
                    self.pid = None
                logs.cancel_scope.deadline = trio.current_time() + LOG_GRACE_S
        assert self.end is not None
        if self.end.by_itself:
            message = f"{self.end.message} ({how_it_ended(process.returncode)})"
            return replace(self.end, message=message)
        return self.end

    def finish(self, end: End) -> None:
        """Begin the end of this life, unless it has begun. Synchronous: it serves no more."""
        # What it says and that it has ended may be noticed at the same moment, in either order.
        if self.end is not None and not end.is_models_fault:
            return
        if self.info is None:
            end = replace(end, reason=LossReason.LOAD)
        self.end = end
        self._serving.value = False
        self._has_end.set()

    def begin(self, work: Work) -> ProcessTurn:
        """Tell the engine its next turn."""
        if self.end is None:
            assert self._control is not None
            try:
                self._control.send_now(encode(work))
            except HungUp as exc:
                self._end_over(exc)
        return ProcessTurn(self)

    async def report(self, *, began_at: float) -> Report:
        """What the oldest turn that is under way has done. As `Turn.report`."""
        assert self._control is not None
        since = max(began_at, self._reported_at)
        try:
            with trio.fail_at(since + self._settings.turn_timeout_s):
                answer = await self._control.receive()
        except LINE_ERRORS as exc:
            self._end_over(exc)
            raise self.lost() from None
        if self.end is not None:
            raise self.lost()
        assert isinstance(answer, Report)
        self._reported_at = trio.current_time()
        return answer

    def lost(self) -> EngineLost:
        """For whoever asked this life and gets no answer."""
        if self.end is None:  # it is cancelled
            return EngineLost("the engine was lost: it ended", reason=LossReason.CRASH)
        return EngineLost(f"the engine was lost: {self.end.message}", reason=self.end.reason)

    async def _start(self, control_fd: int, tokenise_fd: int) -> trio.Process:
        return await start_group(
            [
                *self._settings.program,
                *("--control-fd", str(control_fd)),
                *("--tokenise-fd", str(tokenise_fd)),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(control_fd, tokenise_fd),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    async def _run(
        self, process: trio.Process, control: FrameStream, tokenise: FrameStream
    ) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, process)
            nursery.start_soon(self._load_and_serve, control, tokenise)
            await self._has_end.wait()
            assert self.end is not None
            nursery.cancel_scope.cancel(reason=self.end.message)

    async def _load_and_serve(self, control: FrameStream, tokenise: FrameStream) -> None:
        self.info = await self._load(control)
        if self.info is None or self.end is not None:
            return
        logger.info("the engine is ready: {} on {}", self.info.model, self.info.device)
        self._serving.value = True
        try:
            await self.tokenise.serve(tokenise, answer_within_s=self._settings.turn_timeout_s)
        except LINE_ERRORS as exc:
            self._end_over(exc)

    async def _load(self, control: FrameStream) -> EngineInfo | None:
        settings = self._settings
        try:
            return await load(control, settings.hello, self._patience, settings.on_progress)
        except CannotLoad as exc:
            end = End(reason=LossReason.LOAD, message=str(exc), is_models_fault=True)
        except HungUp:
            end = End(reason=LossReason.LOAD, message="it ended while loading", by_itself=True)
        except (Silent, FrameError) as exc:
            end = End(reason=LossReason.LOAD, message=str(exc))
        self.finish(end)
        return None

    def _end_over(self, exc: Exception) -> None:
        """Something has gone wrong on a line while it served: that ends this life."""
        if isinstance(exc, trio.ClosedResourceError):
            return  # It has ended already, or is cancelled.
        end = End(reason=LossReason.CRASH, message=str(exc), by_itself=isinstance(exc, HungUp))
        if isinstance(exc, trio.TooSlowError):
            within_s = self._settings.turn_timeout_s
            end = End(reason=LossReason.HANG, message=f"it gave no answer within {within_s:g} s")
        self.finish(end)

    async def _watch(self, process: trio.Process) -> None:
        await process.wait()
        self.finish(End(reason=LossReason.CRASH, message="its process ended", by_itself=True))

    async def _read_log(self, process: trio.Process) -> None:
        await read_lines(process, self._log.take, longest_bytes=LINE_CHARACTERS)


class ProcessTurn:
    """A turn that has begun in one life, and is lost with it."""

    def __init__(self, life: EngineLife) -> None:
        self._life = life
        self._began_at = trio.current_time()

    async def report(self) -> Report:
        """See the port."""
        return await self._life.report(began_at=self._began_at)
