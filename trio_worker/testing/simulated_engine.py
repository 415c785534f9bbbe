"""An engine that needs no model: words that depend on the prompt and the seed, on Trio's clock.

It keeps the contract of the engine port to the letter, so the whole worker runs with it, in tests
on the mock clock and from the command line with `--engine simulated`. A token is a word and a
space; the prompt has a token for each word between white space.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from trio_util import AsyncBool

from trio_worker.config import SimulatedConfig
from trio_worker.core.request import FinishReason, Request, RequestId
from trio_worker.core.statistics import EngineInfo, EngineStatistics
from trio_worker.core.turn import (
    Admit,
    EngineMemory,
    Output,
    Prefill,
    Report,
    SequenceFailure,
    TokenLogprob,
    Work,
)
from trio_worker.errors import EngineLost, WorkerFault

CACHE_BYTES_PER_TOKEN = 4096
MODEL_BYTES = 64 * 2**20
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "so", "tu")


def word(token: int) -> str:
    """The word of a token: its digits as syllables."""
    return "".join(_SYLLABLES[int(digit)] for digit in str(token))


def answer_tokens(prompt: tuple[int, ...], seed: int, count: int, vocabulary: int) -> list[int]:
    """The first `count` tokens of the answer to `prompt` under `seed`."""
    base = hashlib.blake2b(repr((prompt, seed)).encode(), digest_size=8).digest()
    return [
        zlib.crc32(base + position.to_bytes(8, "big")) % vocabulary for position in range(count)
    ]


class _Resident:
    """A sequence in the engine: how far its prefill is, and what it will say."""

    def __init__(self, admit: Admit, vocabulary: int) -> None:
        self.admit = admit
        self.to_prefill = len(admit.prompt) + len(admit.produced)
        self.prefilled = 0
        self.position = len(admit.produced)
        self._tokens = answer_tokens(
            admit.prompt, admit.sampling.seed, admit.max_tokens, vocabulary
        )
        self._text = "".join(f"{word(token)} " for token in admit.produced)
        self._shown = self._safe_end()

    @property
    def decoding(self) -> bool:
        return self.prefilled == self.to_prefill

    def step(self) -> Output:
        """The next token."""
        token = self._tokens[self.position]
        self.position += 1
        self._text += f"{word(token)} "
        finish = FinishReason.LENGTH if self.position == self.admit.max_tokens else None
        stops = [at for stop in self.admit.stop if (at := self._text.find(stop)) >= 0]
        end = self._safe_end()
        if stops:
            finish, end = FinishReason.STOP, min(stops)
        elif finish is not None:
            end = len(self._text)
        text, self._shown = self._text[self._shown : end], end
        return Output(
            request_id=self.admit.request_id,
            token=token,
            text=text,
            finish=finish,
            logprob=self._logprob(token) if self.admit.sampling.logprobs else None,
        )

    def _safe_end(self) -> int:
        """Where the text ends that no stop string can reach back into."""
        held = 0
        for stop in self.admit.stop:
            for length in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:length]):
                    held = length
                    break
        return len(self._text) - held

    def _logprob(self, token: int) -> TokenLogprob:
        value = -math.log(2)
        others = range(token, token + self.admit.sampling.top_logprobs)
        return TokenLogprob(
            token=f"{word(token)} ",
            logprob=value,
            top=tuple((f"{word(other)} ", value * (1 + other - token)) for other in others),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What shall go wrong, for tests."""

    deadly_words: frozenset[str] = frozenset()
    """A turn with a sequence whose prompt holds one of these ends the engine."""
    failing_words: frozenset[str] = frozenset()
    """A sequence whose prompt holds one of these fails by itself."""


class SimulatedEngine:
    """See `open_simulated_engine`."""

    def __init__(
        self,
        config: SimulatedConfig,
        *,
        model_name: str,
        context_length: int,
        faults: Faults,
    ) -> None:
        self._config = config
        self._faults = faults
        self._info = EngineInfo(
            model=model_name,
            context_length=context_length,
            cache_bytes_per_token=CACHE_BYTES_PER_TOKEN,
            device="simulated",
        )
        self._residents: dict[RequestId, _Resident] = {}
        self._ready = AsyncBool(value=False)
        self._lost = trio.Event()
        self._loaded_once = False
        self._turning = False
        self.restarts = 0
        self.largest_batch = 0
        """The most sequences that got a token in one turn."""

    @property
    def ready(self) -> AsyncBool:
        return self._ready

    @property
    def residents(self) -> frozenset[RequestId]:
        return frozenset(self._residents)

    def crash(self) -> None:
        """End as a killed process would: at once, with all it holds."""
        self._ready.value = False
        self._residents.clear()
        self._lost.set()

    async def run(self, *, load_s: float, restart_s: float, max_restarts: int) -> None:
        """Load, and come back `restart_s` after each crash, as a supervisor would make it."""
        await trio.sleep(load_s)
        while True:
            self._lost = trio.Event()
            self._loaded_once = True
            self._ready.value = True
            await self._lost.wait()
            self.restarts += 1
            if self.restarts > max_restarts:
                raise WorkerFault(f"the simulated engine ended {self.restarts} times")
            await trio.sleep(restart_s)

    async def wait_ready(self) -> EngineInfo:
        await self._ready.wait_value(True)
        return self._info

    async def tokenise(self, request: Request) -> tuple[int, ...]:
        await self.wait_ready()
        if request.prompt is not None:
            text = request.prompt
        else:
            text = " ".join(message.content for message in request.messages)
        tokens = tuple(self._token(each) for each in text.split())
        return tokens or (0,)

    async def turn(self, work: Work) -> Report:
        assert not self._turning, "one turn at a time"
        self._turning = True
        try:
            return await self._turn(work)
        finally:
            self._turning = False

    async def _turn(self, work: Work) -> Report:
        await trio.lowlevel.checkpoint()
        if not self._ready.value:
            raise EngineLost("the simulated engine is not running", reason="crash")
        for request_id in work.remove:
            self._residents.pop(request_id, None)
        for admit in work.admit:
            assert admit.request_id not in self._residents, f"{admit.request_id} is here already"
            self._residents[admit.request_id] = _Resident(admit, self._config.vocabulary)
        if self._hit_by(self._faults.deadly_words):
            self.crash()
            raise EngineLost("the simulated engine met a deadly prompt", reason="crash")
        failures = tuple(
            SequenceFailure(request_id=request_id, message="a word that cannot be computed")
            for request_id in self._hit_by(self._faults.failing_words)
        )
        for failure in failures:
            del self._residents[failure.request_id]
        began_at = trio.current_time()
        decoding = [each for each in self._residents.values() if each.decoding]
        prefills = self._prefill(work.prefill_tokens)
        prefilled = sum(count for _, count in prefills)
        await self._spend(decoding=bool(decoding), prefilled=prefilled)
        outputs = tuple(each.step() for each in decoding)
        self.largest_batch = max(self.largest_batch, len(outputs))
        for output in outputs:
            if output.finish is not None:
                del self._residents[output.request_id]
        return Report(
            outputs=outputs,
            prefills=tuple(progress for progress, _ in prefills),
            failures=failures,
            residents=self.residents,
            memory=self._memory(),
            seconds=trio.current_time() - began_at,
            prefill_tokens=prefilled,
        )

    def statistics(self) -> EngineStatistics:
        state = "ready" if self._ready.value else "restarting" if self._loaded_once else "loading"
        info = self._info if self._loaded_once else None
        return EngineStatistics(state=state, pid=None, restarts=self.restarts, info=info)

    async def _spend(self, *, decoding: bool, prefilled: int) -> None:
        """Let the time of a turn pass, unless the engine is lost meanwhile."""
        turn_ms = self._config.turn_ms if decoding or not prefilled else 0.0
        lost = self._lost
        with trio.move_on_after((turn_ms + self._config.prefill_ms_per_token * prefilled) / 1000):
            await lost.wait()
        if lost.is_set():
            raise EngineLost("the simulated engine crashed", reason="crash")

    def _prefill(self, budget: int) -> list[tuple[Prefill, int]]:
        """Spend the budget on the residents in order; returns each one's progress and share."""
        shares: list[tuple[Prefill, int]] = []
        for each in self._residents.values():
            count = min(budget, each.to_prefill - each.prefilled)
            if count:
                budget -= count
                each.prefilled += count
                progress = Prefill(
                    request_id=each.admit.request_id, done=each.prefilled, total=each.to_prefill
                )
                shares.append((progress, count))
        return shares

    def _memory(self) -> EngineMemory:
        tokens = sum(each.prefilled + each.position for each in self._residents.values())
        active = MODEL_BYTES + tokens * CACHE_BYTES_PER_TOKEN
        return EngineMemory(active=active, cache=0, peak=active)

    def _token(self, text: str) -> int:
        return zlib.crc32(text.encode("utf-8", "surrogatepass")) % self._config.vocabulary

    def _hit_by(self, words: frozenset[str]) -> list[RequestId]:
        tokens = {self._token(each) for each in words}
        return [
            request_id
            for request_id, each in self._residents.items()
            if tokens.intersection(each.admit.prompt)
        ]


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
) -> AsyncIterator[SimulatedEngine]:
    """A running engine; returns while it loads, as the real one does."""
    engine = SimulatedEngine(
        config,
        model_name=model_name,
        context_length=context_length,
        faults=faults or Faults(),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: engine.run(load_s=load_s, restart_s=restart_s, max_restarts=max_restarts)
        )
        yield engine
        nursery.cancel_scope.cancel(reason="closed")
