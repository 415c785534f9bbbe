"""What callers get, and what that costs the process that is measured.

The callers are another process (`load.py`), and so are the engine and the NATS server. A worker
runs in this one: its processor time is the worker's, and the little that the bench does meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from trio_worker.bench.load import Load, Measured
from trio_worker.bench.programs import open_program


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one measurement."""

    got: Measured
    cpu_s: float
    """Of the process that is measured."""

    @property
    def token_rate(self) -> float:
        """Tokens a second."""
        return self.got.tokens / self.got.seconds

    @property
    def message_rate(self) -> float:
        """Messages a second, or events."""
        return self.got.messages / self.got.seconds

    @property
    def answer_rate(self) -> float:
        """Answers a second."""
        return self.got.answers / self.got.seconds


def median(costs: Sequence[Cost], figure: Callable[[Cost], float]) -> float:
    """Of this figure of them all."""
    return statistics.median(map(figure, costs))


async def own_cpu_s() -> float:
    """The processor time of this process, threads included."""
    return time.process_time()


async def cost_of(
    load: Load,
    *,
    callers: str = "trio_worker.bench.load",
    cpu_s: Callable[[], Awaitable[float]] = own_cpu_s,
) -> Cost:
    """Let callers, which are a program of this name, do as the load says.

    `cpu_s` asks for the processor time of what is measured. Raises `WorkerFault` if the callers end
    for another reason; they have said why.
    """
    async with open_program(callers) as program:
        await program.write(msgspec.to_builtins(load))
        await program.read()
        before_s = await cpu_s()
        got = msgspec.convert(await program.read(), Measured)
        return Cost(got=got, cpu_s=await cpu_s() - before_s)
