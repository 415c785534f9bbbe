"""What callers get of a worker, and what that costs the process in which it runs: this one.

The callers are another process (`load.py`), and so are the engine and the NATS server; so what is
measured here of processor time is the worker's, and the little that the bench does meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from trio_worker.bench.load import Load, Measured
from trio_worker.bench.programs import open_program


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one measurement."""

    got: Measured
    worker_cpu_s: float

    @property
    def token_rate(self) -> float:
        """Tokens a second."""
        return self.got.tokens / self.got.seconds

    @property
    def answer_rate(self) -> float:
        """Answers a second."""
        return self.got.answers / self.got.seconds


def median(costs: Sequence[Cost], figure: Callable[[Cost], float]) -> float:
    """Of this figure of them all."""
    return statistics.median(map(figure, costs))


async def cost_of(load: Load, *, callers: str = "trio_worker.bench.load") -> Cost:
    """Let callers, which are a program of this name, do as the load says.

    Raises `WorkerFault` if they end for another reason; they have said why.
    """
    async with open_program(callers) as program:
        await program.write(msgspec.to_builtins(load))
        await program.read()
        began_at = time.process_time()
        got = msgspec.convert(await program.read(), Measured)
        return Cost(got=got, worker_cpu_s=time.process_time() - began_at)
