"""An engine process without a model: it speaks as the real one does and is ready in no time.

`tests/supervisor` runs it where it matters how a process is watched and not what it computes.
It loads whatever exists, and prewarms for a millisecond a token.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from trio_worker.engine.sockets import Line, leave
from trio_worker.errors import ExitStatus
from trio_worker.grammar.forms import FormRefused
from trio_worker.protocol.frames import (
    PREWARMING,
    Hello,
    LoadFailed,
    Progress,
    ToEngine,
    Tokenise,
    Tokenised,
    TokeniseFailed,
)
from trio_worker.protocol.prompt import Prompt
from trio_worker.protocol.turn import EngineInfo, EngineMemory, Report, Work
from trio_worker.simulated.batch import SimulatedBatch
from trio_worker.simulated.forms import form_of

SCRIPTED = (sys.executable, "-P", __file__)
VOCABULARY = 1000


def main() -> NoReturn:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--tokenise-fd", type=int, required=True)
    asked = parser.parse_args()
    control, tokenising = Line(asked.control_fd), Line(asked.tokenise_fd)
    control.leave_when_hung_up()
    try:
        serve(control, tokenising)
    except Exception as exc:  # noqa: BLE001 - as the real one
        sys.stderr.write(f"ERROR trio_worker.engine: {exc}\n")
        leave(ExitStatus.SOFTWARE)


def serve(control: Line, tokenising: Line) -> NoReturn:
    hello = control.receive()
    assert isinstance(hello, Hello)
    control.send(Progress(step="loading", done=0, total=0, unit=""))
    if not Path(hello.model).exists():
        time.sleep(0.05)  # by now the worker has read what came before
        control.send(LoadFailed(message=f"there is no folder '{hello.model}'"))
        leave(ExitStatus.CONFIG)
    if hello.prewarm:
        control.send(Progress(step=PREWARMING, done=0, total=0, unit=""))
        time.sleep(hello.prewarm_max_tokens / 1000)
    batch = SimulatedBatch(vocabulary=VOCABULARY, prefix_cache_tokens=0)
    threading.Thread(target=tokenise, args=(tokenising, batch), daemon=True).start()
    control.send(
        EngineInfo(
            model=hello.model_name or Path(hello.model).name,
            context_length=2**17,
            cache_bytes_per_token=1,
            vocabulary_size=VOCABULARY,
            device="none",
        )
    )
    while True:
        work = control.receive()
        assert isinstance(work, Work)
        control.send(turn(batch, work))


def turn(batch: SimulatedBatch, work: Work) -> Report:
    batch.take_in(work)
    decoding = batch.decoding()
    prefills = batch.prefill(work.prefill_tokens)
    prefilled = sum(count for _, count in prefills)
    return Report(
        outputs=batch.step(decoding),
        prefills=tuple(progress for progress, _ in prefills),
        failures=(),
        residents=batch.residents,
        memory=EngineMemory(active=batch.held_tokens, cache=0),
        seconds=0.0,
        prefill_tokens=prefilled,
        prefill_calls=int(prefilled > 0),
        prefill_seconds=0.0,
    )


def tokenise(line: Line, batch: SimulatedBatch) -> None:
    def answer(asked: ToEngine) -> Tokenised | TokeniseFailed:
        assert isinstance(asked, Tokenise)
        text = asked.prompt
        if text is None:
            text = " ".join(each.content for each in asked.messages or ())
        try:
            form = form_of(asked.wanted, batch.grammars, is_chat=asked.prompt is None)
        except FormRefused as refused:
            return TokeniseFailed(message=refused.message, field=refused.field)
        return Tokenised(prompt=Prompt(tokens=batch.tokens_of(text), form=form))

    line.answer(answer)


if __name__ == "__main__":
    main()
