"""What every measurement is given: which worker to measure, and how thoroughly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TypeAlias

import msgspec

from trio_worker.bench.measured_worker import MeasuredWorker, open_measured_worker
from trio_worker.config import Config
from trio_worker.launch import EngineKind
from trio_worker.supervisor.engine_life import ENGINE_PROGRAM

OpenWorker: TypeAlias = Callable[
    [Config, EngineKind, Sequence[str]], AbstractAsyncContextManager[MeasuredWorker, bool | None]
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The worker to measure, and how thoroughly."""

    config: Config
    engine: EngineKind
    max_tokens: int
    """Of an answer whose length is not what is measured."""
    rounds: int
    """How often each measurement is repeated."""
    conversations: int = 200
    """With a fleet."""
    engine_program: Sequence[str] = ENGINE_PROGRAM
    """What serves as the engine's process, unless it is simulated."""
    open_worker: OpenWorker = open_measured_worker

    def having(self, section: str, **keys: object) -> Setup:
        """The same with keys of a section of `worker` replaced."""
        worker = self.config.worker
        changed = msgspec.structs.replace(getattr(worker, section), **keys)
        worker = msgspec.structs.replace(worker, **{section: changed})
        return replace(self, config=msgspec.structs.replace(self.config, worker=worker))

    def worker(self) -> AbstractAsyncContextManager[MeasuredWorker, bool | None]:
        """Such a worker, running, with its monitoring off."""
        quiet = self.having("monitoring", port=None)
        return self.open_worker(quiet.config, self.engine, self.engine_program)


Part: TypeAlias = Callable[[Setup], Awaitable[None]]
"""Measures something, and prints a line for each figure with what is required of it."""


async def run_parts(setup: Setup, parts: Sequence[Part]) -> None:
    """Measure one part after the other.

    Cancelled: what has been printed stands. Raises what `launch` raises, and `BrokenPipeError` when
    nobody reads standard output any more.
    """
    for part in parts:
        await part(setup)
