"""An engine without a model, whose steps take a given time: what `trio-worker bench device` serves.

A process of its own on the same lines and with the same frames as the engine's, and a batch with
the same turns, so that all but the model is real. It imports nothing slow, and starts at once.

1. The device computes beside the host, as a GPU does: a turn starts the next step before it waits
   for the one under way, and the device is idle only where the host is slower than it.
2. When a step ends is told by the device's own clock, not by how long the host has slept, so that
   late wake-ups do not add up.
3. A prompt takes no time, but counts against what a turn may prefill.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from trio_worker.engine.sockets import Line
from trio_worker.protocol.frames import Hello, ToEngine, Tokenise, Tokenised
from trio_worker.protocol.prompt import Prompt
from trio_worker.protocol.turn import (
    Admit,
    EngineInfo,
    EngineMemory,
    FinishReason,
    Output,
    Prefill,
    Report,
    RequestId,
    Work,
)

TOKEN = 7
TEXT = "tick "
"""Of every token."""
VOCABULARY = 256
"""A prompt's tokens are its bytes."""
CONTEXT = 2**20


class Device:
    """Computes one step after the other, beside the host. Its state: when it is free again."""

    def __init__(
        self,
        step_s: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._step_s = step_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()

    def start(self) -> float:
        """Begin a step once those before are done; returns when this one will be."""
        self._free_at = max(self._clock(), self._free_at) + self._step_s
        return self._free_at

    def wait(self, until: float) -> None:
        while (left := until - self._clock()) > 0:
            self._sleep(left)


def keep_busy(seconds: float) -> None:
    """What the host computes, on one core."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


@dataclass(slots=True)
class _Row:
    request_id: RequestId
    to_prefill: int
    left: int
    """Tokens that it may still be given."""
    prefilled: int = 0
    started: bool = False
    """Whether the step under way is one of its own."""


class ClockedBatch:
    """The rows that the engine holds, and the step under way; the turns are `engine/batch.py`'s."""

    def __init__(
        self, device: Device, host_s: float, *, compute: Callable[[float], None] = keep_busy
    ) -> None:
        self._device = device
        self._half_s = host_s / 2
        """Of a step the host builds what the device is to do, and turns tokens into text."""
        self._compute = compute
        self._arriving: dict[RequestId, _Row] = {}
        self._decoding: dict[RequestId, _Row] = {}
        self._done_at = 0.0
        """When the step under way ends."""

    def turn(self, work: Work) -> Report:
        """Remove, admit, some prefill, and one step, or two where prompts have ended."""
        started = time.perf_counter()
        for request_id in work.remove:
            self._arriving.pop(request_id, None)
            self._decoding.pop(request_id, None)
        for admit in work.admit:
            self._admit(admit)
        prefills = self._prefill(work.prefill_tokens)
        outputs: list[Output] = []
        if self._step(outputs):
            self._step(outputs)
        return Report(
            outputs=tuple(outputs),
            prefills=tuple(progress for progress, _ in prefills),
            failures=(),
            residents=frozenset((*self._arriving, *self._decoding)),
            memory=EngineMemory(active=0, cache=0),
            seconds=time.perf_counter() - started,
            prefill_tokens=sum(count for _, count in prefills),
            prefill_calls=int(bool(prefills)),
            prefill_seconds=0.0,
        )

    def _admit(self, admit: Admit) -> None:
        assert admit.request_id not in {*self._arriving, *self._decoding}
        self._arriving[admit.request_id] = _Row(
            request_id=admit.request_id,
            to_prefill=len(admit.prompt) + len(admit.produced),
            left=admit.max_tokens - len(admit.produced),
        )

    def _prefill(self, budget: int) -> list[tuple[Prefill, int]]:
        """Spend the budget on prompts in order; returns how far each is, and its share."""
        shares = []
        for row in list(self._arriving.values()):
            if not budget:
                break
            count = min(budget, row.to_prefill - row.prefilled)
            budget -= count
            row.prefilled += count
            done = Prefill(request_id=row.request_id, done=row.prefilled, total=row.to_prefill)
            shares.append((done, count))
            if row.prefilled == row.to_prefill:
                self._decoding[row.request_id] = self._arriving.pop(row.request_id)
        return shares

    def _step(self, outputs: list[Output]) -> bool:
        """Start a step and take the tokens of the one before; whether any row had none in it."""
        if not self._decoding:
            return False
        self._compute(self._half_s)
        taken_at, self._done_at = self._done_at, self._device.start()
        self._device.wait(taken_at)
        self._compute(self._half_s)
        starting = [row for row in self._decoding.values() if not row.started]
        for row in [row for row in self._decoding.values() if row.started]:
            row.left -= 1
            finish = None if row.left else FinishReason.LENGTH
            outputs.append(Output(request_id=row.request_id, token=TOKEN, text=TEXT, finish=finish))
            if finish is not None:
                del self._decoding[row.request_id]
        for row in starting:
            row.started = True
        return bool(starting)


def tokenise(asked: Tokenise) -> Tokenised:
    """At least one token, also of no text."""
    text = asked.prompt
    if text is None:
        text = "\n".join(each.content for each in asked.messages or ())
    return Tokenised(prompt=Prompt(tokens=tuple(text.encode()) or (0,)))


def _serve(control: Line, tokenising: Line, batch: ClockedBatch) -> NoReturn:
    hello = control.receive()
    assert isinstance(hello, Hello)
    threading.Thread(target=_tokenise, args=(tokenising,), daemon=True).start()
    control.send(
        EngineInfo(
            model=hello.model_name or "clocked",
            context_length=CONTEXT,
            cache_bytes_per_token=1,
            vocabulary_size=VOCABULARY,
            device="a clock",
        )
    )
    while True:
        work = control.receive()
        assert isinstance(work, Work)
        control.send(batch.turn(work))


def _tokenise(line: Line) -> None:
    line.answer(_answer)


def _answer(asked: ToEngine) -> Tokenised:
    assert isinstance(asked, Tokenise)
    return tokenise(asked)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="trio_worker.bench.clocked_engine")
    parser.add_argument("--device-ms", type=float, required=True)
    parser.add_argument("--host-ms", type=float, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--tokenise-fd", type=int, required=True)
    asked = parser.parse_args()
    control, tokenising = Line(asked.control_fd), Line(asked.tokenise_fd)
    control.leave_when_hung_up()
    batch = ClockedBatch(Device(asked.device_ms / 1000), asked.host_ms / 1000)
    _serve(control, tokenising, batch)


if __name__ == "__main__":
    main()
