"""The engine port over a child process, which is started again whenever it comes to an end.

1. One supervisor task owns the child: one life follows the other (`engine_life.py`). When the
   context ends, however it ends, nothing of the child is left.
2. The end of a life closes every answer still awaited; a turn's report then raises `EngineLost`,
   and `tokenise` asks the next one, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
from loguru import logger
from trio_util import AsyncBool

from trio_worker.core.request import Request
from trio_worker.errors import (
    ConfigError,
    EngineFailed,
    EngineLost,
    InvalidRequest,
    LossReason,
    WorkerFault,
)
from trio_worker.exception_groups import sole_exceptions
from trio_worker.ports import EngineState, EngineStatistics, ProgressSink, Turn
from trio_worker.protocol.frames import Hello, Tokenise, Tokenised, TokeniseFailed, encode
from trio_worker.protocol.prompt import Prompt
from trio_worker.protocol.turn import EngineInfo, Report, Work
from trio_worker.supervisor.engine_life import ENGINE_PROGRAM, End, EngineLife, EngineSettings
from trio_worker.supervisor.engine_log import EngineLog
from trio_worker.supervisor.line import NeverAsked, NoAnswer
from trio_worker.supervisor.load_patience import LoadPatience
from trio_worker.supervisor.restart_budget import RestartBudget

BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 1.0
TOKENISE_TRIES = 2


class EngineProcess:
    """The engine port. Its state: the life that goes on, and what the ones before came to."""

    def __init__(self, settings: EngineSettings, budget: RestartBudget) -> None:
        self._settings = settings
        self._budget = budget
        self._patience = LoadPatience(turn_timeout_s=settings.turn_timeout_s)
        self._log = EngineLog()
        self._ready = AsyncBool(value=False)
        """True exactly while `_life` can be asked."""
        self._life: EngineLife | None = None
        """The one that goes on, or went on last; None before the first."""
        self._last_end: End | None = None
        """Of the lives before that."""
        self._last_info: EngineInfo | None = None
        """Of the lives before that: the latest that was ready."""
        self._failed_loads = 0
        """In a row; these may be too far apart to spend the budget."""
        self._restarts: Counter[LossReason] = Counter()
        """By the reason of the end before each."""
        self._is_closed = False

    @property
    def ready(self) -> AsyncBool:
        """Whether a turn can be taken now; to be watched, not to be set."""
        return self._ready

    @property
    def info(self) -> EngineInfo | None:
        """See the port."""
        if self._life is not None and self._life.info is not None:
            return self._life.info
        return self._last_info

    async def wait_ready(self) -> EngineInfo:
        """See the port."""
        life = await self._wait_life()
        assert life.info is not None
        return life.info

    async def tokenise(self, request: Request) -> Prompt:
        """See the port."""
        question = Tokenise(
            prompt=request.prompt,
            messages=request.messages if request.prompt is None else None,
            wanted=request.wanted,
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
            life = self._life if self._ready.value else await self._wait_life()
            assert life is not None
            try:
                answer = await life.tokenise.ask(frame)
            except NeverAsked:
                continue
            except NoAnswer:
                tries += 1
                continue
            if isinstance(answer, TokeniseFailed) and answer.is_models_fault:
                raise EngineFailed(f"the model's chat template fails: {answer.message}")
            if isinstance(answer, TokeniseFailed):
                if answer.field is not None:
                    raise InvalidRequest(
                        f"{answer.field}: {answer.message}", details={"field": answer.field}
                    )
                raise InvalidRequest(
                    f"the prompt cannot be tokenised: {answer.message}",
                    details={"field": request.text_field},
                )
            assert isinstance(answer, Tokenised)
            return answer.prompt
        raise EngineFailed("tokenising this request brought the engine down twice")

    def begin(self, work: Work) -> Turn:
        """See the port."""
        if not self._ready.value:
            return LostTurn(EngineLost("the engine is not ready", reason=self._why_not_ready()))
        assert self._life is not None
        return self._life.begin(work)

    def recycle(self) -> None:
        """End this life and start the next, without touching the budget of restarts."""
        if self._ready.value:
            assert self._life is not None
            self._life.finish(End(reason=LossReason.PLANNED, message="a planned restart"))

    def pardon(self, crashes: int) -> None:
        """See the port."""
        self._budget.give_back(crashes)

    def statistics(self) -> EngineStatistics:
        life = self._life
        return EngineStatistics(
            state=self._state(),
            pid=None if life is None else life.pid,
            restarts=self._restarts.total(),
            info=self.info,
            restarts_by_reason={each.value: count for each, count in self._restarts.items()},
        )

    def _state(self) -> EngineState:
        if self._is_closed:
            return EngineState.STOPPED
        if self._ready.value:
            return EngineState.READY
        return EngineState.LOADING if self._latest_end() is None else EngineState.RESTARTING

    def _latest_end(self) -> End | None:
        if self._life is not None and self._life.end is not None:
            return self._life.end
        return self._last_end

    def _why_not_ready(self) -> LossReason:
        end = self._latest_end()
        return LossReason.LOAD if end is None else end.reason

    async def _wait_life(self) -> EngineLife:
        """The life that can be asked, once there is one."""
        while True:
            await self._ready.wait_value(True)
            # It may have gone down again before this task ran.
            if self._ready.value:
                assert self._life is not None
                return self._life

    async def _supervise(self) -> None:
        """Keep a child alive. Raises `ConfigError` or `WorkerFault` when that is hopeless."""
        try:
            while True:
                end = await self._live_once()
                if end.reason is LossReason.PLANNED:
                    logger.info("the engine restarts as planned")
                else:
                    logger.warning("the engine was lost ({}): {}", end.reason, end.message)
                    self._spend_restart(end)
                    await trio.sleep(self._backoff_s())
                self._restarts[end.reason] += 1
        finally:
            self._is_closed = True

    async def _live_once(self) -> End:
        self._life = EngineLife(
            self._settings, patience=self._patience, log=self._log, serving=self._ready
        )
        end = await self._life.live()
        self._last_info = self.info
        if end.is_models_fault:
            if self._last_info is None:
                raise ConfigError(end.message)
            # It was good before: whatever has become of it may be mended, or come back.
            message = f"the model cannot be loaded again: {end.message}"
            end = End(reason=end.reason, message=message)
        self._last_end = end
        self._failed_loads = self._failed_loads + 1 if end.reason is LossReason.LOAD else 0
        return end

    def _spend_restart(self, end: End) -> None:
        if not self._budget.spend(trio.current_time()):
            how_often = f"ended {self._budget.spent} times within {self._budget.window_s:g} s"
        elif self._failed_loads > self._budget.max_restarts:
            how_often = f"failed to load {self._failed_loads} times in a row"
        else:
            return
        said = "\n  ".join(self._log.last_lines)
        raise WorkerFault(
            f"the engine {how_often}, at last: {end.message}"
            + (f"; its last lines:\n  {said}" if said else "")
        )

    def _backoff_s(self) -> float:
        """None before the first restart of a window, then doubling, up to a second."""
        earlier = self._budget.spent - 1
        return min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** (earlier - 1)) if earlier > 0 else 0.0


class LostTurn:
    """A turn of an engine that could not be told."""

    def __init__(self, lost: EngineLost) -> None:
        self._lost = lost

    async def report(self) -> Report:
        """See the port."""
        await trio.lowlevel.checkpoint()
        raise self._lost


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
    general_tool_prompt: bool = False,
    on_progress: ProgressSink | None = None,
    program: Sequence[str] = ENGINE_PROGRAM,
) -> AsyncIterator[EngineProcess]:
    """An engine in a child process of its own, restarted when it dies, gone when this ends.

    Enters at once, while the model loads. Leaving takes at most a second, whatever the child
    does. Raises, out of the block: `ConfigError` if the model cannot be loaded, and `WorkerFault`
    if the child ends more than `max_restarts` times within `restart_window_s`, or fails to load
    more often than that in a row.
    """
    hello = Hello(
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
        general_tool_prompt=general_tool_prompt,
    )
    settings = EngineSettings(
        hello=hello, turn_timeout_s=turn_timeout_s, on_progress=on_progress, program=program
    )
    budget = RestartBudget(max_restarts=max_restarts, window_s=restart_window_s)
    engine = EngineProcess(settings, budget)
    with sole_exceptions():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine._supervise)  # noqa: SLF001 - the other half of this class
            try:
                yield engine
            finally:
                nursery.cancel_scope.cancel(reason="the engine is closed")
