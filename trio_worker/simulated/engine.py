"""An engine that needs no model: it takes Trio's time, and goes wrong as it is told to.

It keeps the contract of the engine port to the letter, so the whole worker runs with it, in tests
on the mock clock and from the command line with `--engine simulated`. What it says is worked out
in `batch.py`.
"""

from __future__ import annotations

import math
import random as randomness
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
from msgspec.structs import replace
from trio_util import AsyncBool

from trio_worker.config import SimulatedConfig
from trio_worker.core.request import Request
from trio_worker.errors import EngineFailed, EngineLost, InvalidRequest, LossReason, WorkerFault
from trio_worker.exception_groups import sole_exceptions
from trio_worker.grammar.forms import FormRefused
from trio_worker.ports import EngineState, EngineStatistics, Turn
from trio_worker.protocol.prompt import Prompt
from trio_worker.protocol.turn import (
    TURNS_UNDER_WAY_MAX,
    EngineInfo,
    EngineMemory,
    Output,
    Prefill,
    Report,
    RequestId,
    SequenceFailure,
    Work,
)
from trio_worker.simulated.batch import Resident, SimulatedBatch
from trio_worker.simulated.forms import form_of
from trio_worker.simulated.speech import word

CACHE_BYTES_PER_TOKEN = 4096
MODEL_BYTES = 64 * 2**20
PREFIX_CACHE_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What shall go wrong: on certain words, and with certain probabilities.

    Each probability is asked for once per turn, per sequence that enters, or per prompt to be
    tokenised.
    """

    deadly_words: frozenset[str] = frozenset()
    """A turn with a sequence whose prompt holds one of these ends the engine."""
    failing_words: frozenset[str] = frozenset()
    """A sequence whose prompt holds one of these fails by itself."""
    slow_turn: float = 0.0
    slow_turn_s: float = 1.0
    """How much longer a slow turn takes."""
    hang: float = 0.0
    """A turn never returns; `turn_timeout_s` ends this incarnation of the engine."""
    crash: float = 0.0
    """The engine ends somewhere in a turn."""
    fail_sequence: float = 0.0
    """A sequence that enters fails by itself."""
    out_of_memory: float = 0.0
    """The engine ends over a sequence that enters."""
    refuse_tokenise: float = 0.0
    """As a chat template does that does not know a role."""
    crash_tokenise: float = 0.0
    """Tokenising this prompt brings the engine down."""
    hang_tokenise: float = 0.0
    """There is no answer before the engine has been restarted."""
    slow_tokenise: float = 0.0
    slow_tokenise_s: float = 0.2
    wrong_token: float = 0.0
    """A broken engine, for checks that must notice: a token that is not the sequence's."""
    duplicate_output: float = 0.0
    """A broken engine, as above: a token is handed out twice."""


class SimulatedEngine:
    """See `open_simulated_engine`."""

    def __init__(
        self,
        config: SimulatedConfig,
        *,
        model_name: str,
        context_length: int,
        faults: Faults,
        random: randomness.Random,
        turn_timeout_s: float,
        prefix_cache_tokens: int,
        model_bytes: int,
        cache_bytes_per_token: int,
    ) -> None:
        self._config = config
        self._faults = faults
        self._random = random
        self._turn_timeout_s = turn_timeout_s
        self._model_bytes = model_bytes
        self._info = EngineInfo(
            model=model_name,
            context_length=context_length,
            cache_bytes_per_token=cache_bytes_per_token,
            vocabulary_size=config.vocabulary,
            device="simulated",
        )
        self._batch = SimulatedBatch(
            vocabulary=config.vocabulary, prefix_cache_tokens=prefix_cache_tokens
        )
        self._ready = AsyncBool(value=False)
        self._lost = trio.Event()
        """Of the present incarnation, or the one before; set while there is none."""
        self._lost.set()
        self._end_reason = LossReason.LOAD
        self._loaded_once = False
        self._under_way: deque[SimulatedTurn] = deque()
        """The oldest first."""
        self._hangs_next = False
        self._deaths = 0
        """Ends that count against `max_restarts`."""
        self._restarts: Counter[LossReason] = Counter()
        """By the reason of the end before it."""
        self.largest_batch = 0
        """The most sequences that got a token in one turn."""

    @property
    def ready(self) -> AsyncBool:
        return self._ready

    @property
    def info(self) -> EngineInfo | None:
        return self._info if self._loaded_once else None

    @property
    def residents(self) -> frozenset[RequestId]:
        return self._batch.residents

    @property
    def is_busy(self) -> bool:
        """Whether turns are under way."""
        return bool(self._under_way)

    def crash(self) -> None:
        """End as a killed process would: at once, with all it holds."""
        self._end(LossReason.CRASH)

    def hang(self) -> None:
        """Let the next turn not return: `turn_timeout_s` ends it, and the engine with it."""
        self._hangs_next = True

    def recycle(self) -> None:
        self._end(LossReason.PLANNED)

    def pardon(self, crashes: int) -> None:
        self._deaths = max(0, self._deaths - crashes)

    def _end(self, reason: LossReason) -> None:
        self._batch.clear()
        self._under_way.clear()
        if self._ready.value:
            self._end_reason = reason
            self._ready.value = False
            self._lost.set()

    async def run(self, *, load_s: float, restart_s: float, max_restarts: int) -> None:
        """Load, and come back `restart_s` after each end, as a supervisor would make it."""
        await trio.sleep(load_s)
        while True:
            self._lost = trio.Event()
            self._loaded_once = True
            self._ready.value = True
            await self._lost.wait()
            if self._end_reason is not LossReason.PLANNED:
                self._deaths += 1
            if self._deaths > max_restarts:
                raise WorkerFault(f"the simulated engine ended {self._deaths} times")
            self._restarts[self._end_reason] += 1
            await trio.sleep(restart_s)

    async def wait_ready(self) -> EngineInfo:
        while True:
            await self._ready.wait_value(True)
            # It may have gone down again before this task ran.
            if self._ready.value:
                return self._info

    async def tokenise(self, request: Request) -> Prompt:
        if request.prompt is not None:
            text = request.prompt
        else:
            text = " ".join(message.content for message in request.messages)
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequest(
                "the prompt has a lone surrogate, which is no text",
                details={"field": request.text_field},
            ) from exc
        await self.wait_ready()
        # As in the process, where a question goes out and its answer comes back.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        if self._chance(self._faults.slow_tokenise):
            await trio.sleep(self._faults.slow_tokenise_s)
            await self.wait_ready()
        if self._chance(self._faults.hang_tokenise):
            await self._lost.wait()
            await self.wait_ready()
        if self._chance(self._faults.crash_tokenise):
            self.crash()
            raise EngineFailed("tokenising this request brought the engine down")
        if self._chance(self._faults.refuse_tokenise):
            raise InvalidRequest(
                "the template refuses these messages", details={"field": request.text_field}
            )
        try:
            form = form_of(request.wanted, self._batch.grammars, is_chat=request.is_chat)
        except FormRefused as refused:
            raise InvalidRequest(
                f"{refused.field}: {refused.message}", details={"field": refused.field}
            ) from None
        return Prompt(tokens=self._batch.tokens_of(text), form=form)

    def begin(self, work: Work) -> Turn:
        assert len(self._under_way) < TURNS_UNDER_WAY_MAX, "too many turns at once"
        turn = SimulatedTurn(self, self._lost, work)
        if not turn.is_lost:
            self._under_way.append(turn)
            if len(self._under_way) == 1:
                turn.course = self._decide(work, trio.current_time())
        return turn

    def _decide(self, work: Work, now: float) -> _Course:
        """What a turn that begins now will come to, unless the engine is ended from outside."""
        self._batch.take_in(work)
        if self._batch.with_a_word_of(self._faults.deadly_words) or any(
            self._chance(self._faults.out_of_memory) for _ in work.admit
        ):
            return _Course(began_at=now, ends_at=now, kills=LossReason.CRASH)
        failures = tuple(
            SequenceFailure(request_id=request_id, message="a word that cannot be computed")
            for request_id in self._failing(work)
        )
        for failure in failures:
            self._batch.fail(failure.request_id)
        decoding = self._batch.decoding()
        prefills = self._batch.prefill(work.prefill_tokens)
        prefilled = sum(count for _, count in prefills)
        duration_s, kills = self._duration(decoding=bool(decoding), prefilled=prefilled)
        return _Course(
            began_at=now,
            ends_at=now + duration_s,
            kills=kills,
            decoding=decoding,
            prefills=tuple(progress for progress, _ in prefills),
            prefilled=prefilled,
            failures=failures,
        )

    def _duration(self, *, decoding: bool, prefilled: int) -> tuple[float, LossReason | None]:
        """How long a turn takes, and what the engine is lost for at its end, if it is."""
        turn_ms = self._config.turn_ms if decoding or not prefilled else 0.0
        duration_s = (turn_ms + self._config.prefill_ms_per_token * prefilled) / 1000
        if self._chance(self._faults.slow_turn):
            duration_s += self._faults.slow_turn_s
        kills = None
        if self._chance(self._faults.crash):
            duration_s *= self._random.random()
            kills = LossReason.CRASH
        if self._hangs_next or self._chance(self._faults.hang):
            self._hangs_next = False
            if kills is None:
                duration_s = math.inf
        if duration_s > self._turn_timeout_s:
            return self._turn_timeout_s, LossReason.HANG
        return duration_s, kills

    def finish(self, turn: SimulatedTurn) -> Report:
        """The time of the oldest turn has passed: what it has done. Raises `EngineLost`."""
        course = turn.course
        if not turn.is_lost and course is not None and course.kills is not None:
            self._end(course.kills)
        if turn.is_lost or course is None:
            raise EngineLost("the simulated engine was lost in a turn", reason=self._end_reason)
        assert turn is self._under_way[0], "reports are taken in order"
        self._under_way.popleft()
        outputs = self._batch.step(course.decoding)
        self.largest_batch = max(self.largest_batch, len(outputs))
        report = Report(
            outputs=self._spoil(outputs),
            prefills=course.prefills,
            failures=course.failures,
            residents=self.residents,
            memory=self._memory(),
            seconds=course.ends_at - course.began_at,
            prefill_tokens=course.prefilled,
            prefill_calls=int(course.prefilled > 0),
            prefill_seconds=self._config.prefill_ms_per_token * course.prefilled / 1000,
        )
        if self._under_way:
            # It has gone on by itself, whenever this report is taken.
            following = self._under_way[0]
            following.course = self._decide(following.work, course.ends_at)
        return report

    def _failing(self, work: Work) -> list[RequestId]:
        hit = self._batch.with_a_word_of(self._faults.failing_words)
        unlucky = [
            admit.request_id for admit in work.admit if self._chance(self._faults.fail_sequence)
        ]
        return list(dict.fromkeys(hit + unlucky))

    @property
    def restarts(self) -> int:
        return self._restarts.total()

    def statistics(self) -> EngineStatistics:
        if self._ready.value:
            state = EngineState.READY
        else:
            state = EngineState.RESTARTING if self._loaded_once else EngineState.LOADING
        return EngineStatistics(
            state=state,
            pid=None,
            restarts=self.restarts,
            info=self.info,
            restarts_by_reason={each.value: count for each, count in self._restarts.items()},
        )

    def _spoil(self, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        spoilt: list[Output] = []
        for output in outputs:
            if self._chance(self._faults.wrong_token):
                other = (output.token + 1) % self._config.vocabulary
                spoilt.append(replace(output, token=other, text=f"{word(other)} "))
            else:
                spoilt.append(output)
            if output.finish is None and self._chance(self._faults.duplicate_output):
                spoilt.append(output)
        return tuple(spoilt)

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def _memory(self) -> EngineMemory:
        held = self._batch.held_tokens * self._info.cache_bytes_per_token
        return EngineMemory(active=self._model_bytes + held, cache=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """What a turn comes to, settled when it begins to be done."""

    began_at: float
    ends_at: float
    kills: LossReason | None = None
    """What the engine is lost for when the turn ends."""
    decoding: list[Resident] = field(default_factory=list)
    prefills: tuple[Prefill, ...] = ()
    prefilled: int = 0
    failures: tuple[SequenceFailure, ...] = ()


class SimulatedTurn:
    """A turn that has begun. Its state: its course, once those before it are done."""

    def __init__(self, engine: SimulatedEngine, lost: trio.Event, work: Work) -> None:
        """`lost` is the engine's of the moment: its next incarnation has another."""
        self.work = work
        self.course: _Course | None = None
        self._engine = engine
        self._lost = lost

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    async def report(self) -> Report:
        """See the port."""
        with trio.move_on_at(self.course.ends_at if self.course is not None else math.inf):
            await self._lost.wait()
        return self._engine.finish(self)


@asynccontextmanager
async def open_simulated_engine(
    config: SimulatedConfig,
    *,
    model_name: str = "simulated",
    context_length: int = 8192,
    load_s: float = 0.0,
    restart_s: float = 0.5,
    max_restarts: int = 1_000_000,
    faults: Faults | None = None,
    random: randomness.Random | None = None,
    turn_timeout_s: float = math.inf,
    prefix_cache_tokens: int = PREFIX_CACHE_TOKENS,
    model_bytes: int = MODEL_BYTES,
    cache_bytes_per_token: int = CACHE_BYTES_PER_TOKEN,
) -> AsyncIterator[SimulatedEngine]:
    """A running engine; returns while it loads, as the real one does.

    Args:
        config: what a turn costs.
        model_name: its name on the wire.
        context_length: tokens of prompt and answer together.
        load_s: how long the first start takes.
        restart_s: how long each later one takes.
        max_restarts: one unplanned end more than this is a `WorkerFault`.
        faults: what shall go wrong.
        random: decides where `faults` has probabilities.
        turn_timeout_s: a turn that takes longer ends the engine, for the reason `hang`.
        prefix_cache_tokens: this many tokens of sequences that have left are kept, the latest used;
            a sequence that begins with them pays prefill for the rest only.
        model_bytes: what the engine holds with no sequence in it.
        cache_bytes_per_token: what each token of residents and of kept caches takes.
    """
    engine = SimulatedEngine(
        config,
        model_name=model_name,
        context_length=context_length,
        faults=faults or Faults(),
        random=random or randomness.Random(0),  # noqa: S311 - no secrets
        turn_timeout_s=turn_timeout_s,
        prefix_cache_tokens=prefix_cache_tokens,
        model_bytes=model_bytes,
        cache_bytes_per_token=cache_bytes_per_token,
    )
    with sole_exceptions():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: engine.run(load_s=load_s, restart_s=restart_s, max_restarts=max_restarts)
            )
            yield engine
            nursery.cancel_scope.cancel(reason="closed")
