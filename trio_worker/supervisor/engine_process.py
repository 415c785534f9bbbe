"""The engine port over a child process: starts it, talks to it, restarts it, and kills it.

1. One supervisor task owns the child. When the context ends, however it ends, the child has been
   killed and reaped, and nothing of it is left.
2. Each line to the child is one task that asks and awaits the answer. Who wanted to know may give
   up at any time: no half frame is left behind, and a hung engine is noticed all the same.
3. The end of a child closes every answer still awaited; `turn` then raises `EngineLost`, and
   `tokenise` asks the next child, once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import trio
from loguru import logger
from trio_util import AsyncBool

from trio_worker.core.request import Request
from trio_worker.errors import (
    ConfigError,
    EngineFailed,
    EngineLost,
    InvalidRequest,
    WorkerFault,
)
from trio_worker.machine.child_process import (
    how_it_ended,
    kill_group,
    read_lines,
    start_group,
)
from trio_worker.ports import EngineStatistics, ProgressSink
from trio_worker.protocol.frames import (
    PREWARMING,
    FrameBuffer,
    FrameError,
    FromEngine,
    Hello,
    LoadFailed,
    Progress,
    Tokenise,
    Tokenised,
    TokeniseFailed,
    decode_from_engine,
    encode,
)
from trio_worker.protocol.turn import EngineInfo, Report, Work
from trio_worker.supervisor.load_patience import LoadPatience
from trio_worker.supervisor.restart_budget import RestartBudget

KILL_GRACE_S = 0.5
"""A killed child is gone in milliseconds; this bounds the wait for the system to say so."""

LOG_GRACE_S = 0.2
"""How long to read what a dead child had still written."""

LAST_LINES = 20
LINE_CHARACTERS = 400
LEVELS = frozenset({"INFO", "WARNING", "ERROR"})
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 1.0
TOKENISE_TRIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    hello: Hello
    turn_timeout_s: float
    max_restarts: int
    restart_window_s: float
    on_progress: ProgressSink | None


@dataclass(frozen=True, slots=True)
class _Call:
    """One question, and where its answer goes: a channel of one, closed if there will be none."""

    frame: bytes
    answer: trio.MemorySendChannel[FromEngine]


@dataclass(frozen=True, slots=True)
class _End:
    """Why a child's life ended; `reason` as in `EngineLost`."""

    reason: str
    message: str
    by_itself: bool = False
    """Rather than killed for it: then its exit status tells something."""


class _Child:
    """One life of the engine process: its lines, and the reason of its end once there is one."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self.scope = scope
        self.end: _End | None = None
        self.has_loaded = False
        self.load_failed: str | None = None
        # Without a buffer: a question that nobody has taken yet can be taken back.
        self.control, self.control_calls = trio.open_memory_channel[_Call](0)
        self.tokenise, self.tokenise_calls = trio.open_memory_channel[_Call](0)

    def close(self) -> None:
        for channel in (self.control, self.control_calls, self.tokenise, self.tokenise_calls):
            channel.close()


class EngineProcess:
    """The engine port. Its state: the ready child, if any, and what the last ones came to."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._state = "loading"
        self._pid: int | None = None
        self._restarts: Counter[str] = Counter()
        """By the reason of the end before each."""
        self._last_end = "load"
        """Why there is no child, while there is none: a planned end is nobody's fault."""
        self._failed_loads = 0
        """In a row; these may be too far apart to spend the budget."""
        self._info: EngineInfo | None = None
        self._patience = LoadPatience(turn_timeout_s=settings.turn_timeout_s)
        self._child: _Child | None = None
        # True exactly while there is a `_child`.
        self._is_ready = AsyncBool(value=False)
        self._budget = RestartBudget(
            max_restarts=settings.max_restarts, window_s=settings.restart_window_s
        )
        self._lines: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def ready(self) -> AsyncBool:
        """Whether a turn can be taken now; to be watched, not to be set."""
        return self._is_ready

    async def wait_ready(self) -> EngineInfo:
        """Return once the engine can take a turn; leaves nothing behind when cancelled."""
        await self._wait_child()
        assert self._info is not None
        return self._info

    async def tokenise(self, request: Request) -> tuple[int, ...]:
        """The prompt's tokens. Waits while the engine is down; see the port."""
        messages = tuple((message.role, message.content) for message in request.messages)
        question = Tokenise(
            prompt=request.prompt, messages=messages if request.prompt is None else None
        )
        try:
            frame = encode(question)
        except UnicodeEncodeError as exc:
            raise InvalidRequest(
                "the prompt has a lone surrogate, which is no text",
                details={"field": request.text_field},
            ) from exc
        tries = 0
        while tries < TOKENISE_TRIES:
            child = await self._wait_child()
            try:
                answer = await _ask(child, child.tokenise, frame)
            except _NeverAskedError:
                continue
            except EngineLost:
                tries += 1
                continue
            if isinstance(answer, TokeniseFailed) and answer.is_models_fault:
                raise EngineFailed(f"the model's chat template fails: {answer.message}")
            if isinstance(answer, TokeniseFailed):
                raise InvalidRequest(
                    f"the prompt cannot be tokenised: {answer.message}",
                    details={"field": request.text_field},
                )
            assert isinstance(answer, Tokenised)
            return answer.tokens
        raise EngineFailed("tokenising this request brought the engine down twice")

    async def turn(self, work: Work) -> Report:
        """Do one turn. Raises `EngineLost` if the engine is, or becomes, unavailable.

        Cancelled: the turn is done all the same and its results are lost.
        """
        child = self._child
        if child is None:
            raise EngineLost("the engine is not ready", reason=self._last_end)
        try:
            answer = await _ask(child, child.control, encode(work))
        except _NeverAskedError as exc:
            raise _lost(child) from exc
        assert isinstance(answer, Report)
        return answer

    def recycle(self) -> None:
        """End this child and start the next, without touching the restart budget."""
        if self._child is not None:
            self._finish(self._child, "planned", "a planned restart")

    def pardon(self, count: int) -> None:
        """Give back so many of the latest deaths to the budget: one request was guilty of them."""
        self._budget.give_back(count)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            state=self._state,
            pid=self._pid,
            restarts=self._restarts.total(),
            info=self._info,
            restarts_by_reason=dict(self._restarts),
        )

    async def _wait_child(self) -> _Child:
        # It may have gone down again before a waiting task runs.
        while self._child is None:
            await self._is_ready.wait_value(True)
        return self._child

    async def _supervise(self) -> None:
        """Keep a child alive. Raises `ConfigError` or `WorkerFault` when that is hopeless."""
        try:
            while True:
                end = await self._live_once()
                if end.reason == "planned":
                    logger.info("the engine restarts as planned")
                else:
                    logger.warning("the engine was lost ({}): {}", end.reason, end.message)
                    self._spend_restart(end)
                    await trio.sleep(self._backoff_s())
                self._restarts[end.reason] += 1
        finally:
            self._state = "stopped"

    def _spend_restart(self, end: _End) -> None:
        self._failed_loads += end.reason == "load"
        if not self._budget.spend(trio.current_time()):
            how_often = f"ended {self._budget.spent} times within {self._budget.window_s:g} s"
        elif self._failed_loads > self._budget.max_restarts:
            how_often = f"failed to load {self._failed_loads} times in a row"
        else:
            return
        said = "\n  ".join(self._lines)
        raise WorkerFault(
            f"the engine {how_often}, at last: {end.message}"
            + (f"; its last lines:\n  {said}" if said else "")
        )

    def _backoff_s(self) -> float:
        """0.0 before the first restart of a window, then doubling."""
        earlier = self._budget.spent - 1
        return min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** (earlier - 1)) if earlier > 0 else 0.0

    async def _live_once(self) -> _End:
        """One child from its start to its end, of which nothing is left when this returns."""
        self._lines.clear()
        control, their_control = trio.socket.socketpair()
        tokenise, their_tokenise = trio.socket.socketpair()
        with control, tokenise:
            with their_control, their_tokenise:
                process = await _start(their_control.fileno(), their_tokenise.fileno())
            async with trio.open_nursery() as logs:
                logs.start_soon(self._read_log, process)
                self._pid = process.pid
                try:
                    child = await self._run_child(process, control, tokenise)
                finally:
                    if process.returncode is None:
                        kill_group(process)
                    with trio.move_on_after(KILL_GRACE_S, shield=True):
                        await process.wait()
                    self._pid = None
                logs.cancel_scope.deadline = trio.current_time() + LOG_GRACE_S
        if child.load_failed is not None:
            if self._info is None:
                raise ConfigError(child.load_failed)
            # It was good before: whatever has become of it may be mended, or come back.
            return _End("load", f"the model cannot be loaded again: {child.load_failed}")
        assert child.end is not None
        if child.end.by_itself:
            message = f"{child.end.message} ({how_it_ended(process.returncode)})"
            return replace(child.end, message=message)
        return child.end

    async def _run_child(
        self,
        process: trio.Process,
        control: trio.socket.SocketType,
        tokenise: trio.socket.SocketType,
    ) -> _Child:
        """Load and serve until the child ends; everything it was asked is answered or closed."""
        with trio.CancelScope() as scope:
            child = _Child(scope)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, child, process)
                    line = _Line(control)
                    if not await self._load(child, line):
                        scope.cancel(reason="the model was not loaded")
                    else:
                        nursery.start_soon(self._serve_line, child, line, child.control_calls)
                        nursery.start_soon(
                            self._serve_line, child, _Line(tokenise), child.tokenise_calls
                        )
                        self._state = "ready"
                        self._failed_loads = 0
                        self._child = child
                        self._is_ready.value = True
            finally:
                self._forget(child)
                child.close()
        return child

    def _finish(self, child: _Child, reason: str, message: str, *, by_itself: bool = False) -> None:
        """Begin the end of this child; the first reason counts, and `load` until it has loaded."""
        if child.end is None:
            if not child.has_loaded:
                reason = "load"
            self._last_end = reason
            child.end = _End(reason, message, by_itself)
            self._forget(child)
            child.scope.cancel(reason=message)

    def _forget(self, child: _Child) -> None:
        if self._child is child:
            self._child = None
            self._is_ready.value = False
        self._state = "restarting"

    async def _load(self, child: _Child, line: _Line) -> bool:
        try:
            await line.send(encode(self._settings.hello))
            # A download may take its time; computing may not.
            self._patience.begun(trio.current_time())
            step = ""
            while True:
                with trio.fail_after(self._patience.patience_s):
                    frame = await line.receive()
                if isinstance(frame, EngineInfo):
                    self._patience.loaded(trio.current_time())
                    child.has_loaded = True
                    self._info = frame
                    logger.info("the engine is ready: {} on {}", frame.model, frame.device)
                    return True
                if isinstance(frame, LoadFailed):
                    child.load_failed = frame.message
                    return False
                assert isinstance(frame, Progress)
                if frame.step == PREWARMING:
                    self._patience.prewarming()
                elif frame.step != step:
                    self._patience.stepped(trio.current_time())
                step = frame.step
                if self._settings.on_progress is not None:
                    self._settings.on_progress(frame.step, frame.done, frame.total, frame.unit)
        except _HungUpError:
            self._finish(child, "load", "it ended while loading", by_itself=True)
        except trio.TooSlowError:
            late = self._patience
            where = f", at {step}" if step else ""
            self._finish(
                child, "load", f"it did not {late.step} within {late.patience_s:g} s{where}"
            )
        except FrameError as exc:
            self._finish(child, "load", str(exc))
        return False

    async def _serve_line(
        self, child: _Child, line: _Line, calls: trio.MemoryReceiveChannel[_Call]
    ) -> None:
        async with calls:
            async for call in calls:
                with call.answer:
                    try:
                        with trio.fail_after(self._settings.turn_timeout_s):
                            await line.send(call.frame)
                            answer = await line.receive()
                    except trio.TooSlowError:
                        timeout_s = self._settings.turn_timeout_s
                        self._finish(child, "hang", f"it gave no answer within {timeout_s:g} s")
                        return
                    except (_HungUpError, FrameError) as exc:
                        hung_up = isinstance(exc, _HungUpError)
                        self._finish(child, "crash", str(exc), by_itself=hung_up)
                        return
                    with suppress(trio.BrokenResourceError):
                        call.answer.send_nowait(answer)

    async def _watch(self, child: _Child, process: trio.Process) -> None:
        await process.wait()
        self._finish(child, "crash", "its process ended", by_itself=True)

    async def _read_log(self, process: trio.Process) -> None:
        await read_lines(process, self._log, longest_bytes=LINE_CHARACTERS)

    def _log(self, line: str) -> None:
        text = line.rstrip()[:LINE_CHARACTERS]
        if text:
            self._lines.append(text)
            # What libraries say is for those who look for it; what the engine itself says is not.
            level, _, rest = text.partition(" trio_worker.")
            logger.log(level if rest and level in LEVELS else "DEBUG", "engine: {}", text)


@asynccontextmanager
async def open_engine(
    *,
    model: str,
    model_name: str | None,
    max_batch_size: int,
    turn_timeout_s: float,
    max_restarts: int,
    restart_window_s: float,
    prewarm: bool,
    prewarm_prompt: str,
    prewarm_max_tokens: int,
    prefix_cache_bytes: int,
    wired_limit_bytes: int | None = None,
    allocator_cache_bytes: int | None = None,
    on_progress: ProgressSink | None = None,
) -> AsyncIterator[EngineProcess]:
    """An engine in a child process of its own, restarted when it dies, gone when this ends.

    Enters at once, while the model loads. Leaving takes at most a second, whatever the child
    does. Raises, as an exception group: `ConfigError` if the model cannot be loaded, and
    `WorkerFault` if the child ends more than `max_restarts` times within `restart_window_s`.
    """
    engine = EngineProcess(
        _Settings(
            hello=Hello(
                model=model,
                model_name=model_name,
                max_batch_size=max_batch_size,
                prewarm=prewarm,
                prewarm_prompt=prewarm_prompt,
                prewarm_max_tokens=prewarm_max_tokens,
                prefix_cache_bytes=prefix_cache_bytes,
                wired_limit_bytes=wired_limit_bytes,
                allocator_cache_bytes=allocator_cache_bytes,
                answer_within_s=turn_timeout_s,
            ),
            turn_timeout_s=turn_timeout_s,
            max_restarts=max_restarts,
            restart_window_s=restart_window_s,
            on_progress=on_progress,
        )
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine._supervise)  # noqa: SLF001 - the other half of this class
        try:
            yield engine
        finally:
            nursery.cancel_scope.cancel(reason="the engine is closed")


class _HungUpError(Exception):
    """The child's end of a line is closed."""


class _NeverAskedError(Exception):
    """The child ended before it could be asked."""


class _Line:
    """The worker's end of one line, in whole frames."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._stream = trio.SocketStream(sock)
        self._buffer = FrameBuffer()

    async def send(self, frame: bytes) -> None:
        try:
            await self._stream.send_all(frame)
        except trio.BrokenResourceError as exc:
            raise _HungUpError("it hung up") from exc

    async def receive(self) -> FromEngine:
        while (body := self._buffer.take()) is None:
            try:
                data = await self._stream.receive_some(2**18)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise _HungUpError("it hung up")
            self._buffer.feed(data)
        return decode_from_engine(body)


async def _ask(child: _Child, line: trio.MemorySendChannel[_Call], frame: bytes) -> FromEngine:
    send, receive = trio.open_memory_channel[FromEngine](1)
    with receive:
        try:
            await line.send(_Call(frame, send))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            send.close()
            raise _NeverAskedError from None
        except trio.Cancelled:
            send.close()
            raise
        try:
            return await receive.receive()
        except trio.EndOfChannel:
            raise _lost(child) from None


def _lost(child: _Child) -> EngineLost:
    end = child.end or _End("crash", "it ended")
    return EngineLost(f"the engine was lost: {end.message}", reason=end.reason)


async def _start(control_fd: int, tokenise_fd: int) -> trio.Process:
    return await start_group(
        [
            sys.executable,
            # -P: no module comes from where we were started, which may be a model's folder.
            *("-P", "-m", "trio_worker.engine", "serve"),
            *("--control-fd", str(control_fd)),
            *("--tokenise-fd", str(tokenise_fd)),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=(control_fd, tokenise_fd),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
