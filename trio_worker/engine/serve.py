"""Serves one worker: turns on the control line, tokenising on the other.

1. Every MLX call happens on the main thread: MLX's streams belong to a thread.
2. The tokenise line is served by a thread of its own, from the moment the model is loaded.
3. When the worker is gone, so is this process, whatever it is doing (`sockets.py`).
4. The model's chat template is rendered in yet another process (`template_renderer.py`).
"""

from __future__ import annotations

import gc
import logging
import threading
from contextlib import suppress
from itertools import cycle, islice
from typing import NoReturn

import mlx.core as mx

from trio_worker.engine.batch import Batch
from trio_worker.engine.guide import Guides
from trio_worker.engine.mended_mlx_lm import has_text_template
from trio_worker.engine.models import CannotLoad
from trio_worker.engine.models.device import blas_warning
from trio_worker.engine.models.load import LoadedModel, load
from trio_worker.engine.models.progress import LoadProgress, measure_of
from trio_worker.engine.read_answer import Answers
from trio_worker.engine.sockets import Line, leave
from trio_worker.engine.style import style_of
from trio_worker.engine.template_renderer import Renderer, TemplateFailed
from trio_worker.engine.text import Vocabulary
from trio_worker.engine.tokenising import Tokeniser
from trio_worker.errors import ExitStatus
from trio_worker.protocol.frames import (
    PREWARMING,
    FromEngine,
    Hello,
    LoadFailed,
    Progress,
    ToEngine,
    Tokenise,
)
from trio_worker.protocol.turn import Admit, EngineInfo, RequestId, Sampling, Work

log = logging.getLogger("trio_worker.engine")

MB = 2**20
PREWARM_PREFILL_TOKENS = 512
PREWARM_TOKENS = 65
"""At least: all but the last are computed together, as a prompt's are."""

GREEDY = Sampling()


def serve(control: Line, tokenising: Line, renderer: Renderer) -> NoReturn:
    """Load what the worker's `Hello` names, then do as it says until it hangs up."""
    try:
        _serve(control, tokenising, renderer)
    except BaseException:
        # What MLX holds after an error is not worth the risk of an orderly end.
        log.exception("the engine failed")
        leave(ExitStatus.SOFTWARE)


def _serve(control: Line, tokenising: Line, renderer: Renderer) -> NoReturn:
    hello = control.receive()
    assert isinstance(hello, Hello)

    def say(step: str, done: int, total: int, unit: str) -> None:
        control.send(Progress(step=step, done=done, total=total, unit=unit))

    try:
        set_limits(hello)
        with LoadProgress(say, measure_of(hello.model)) as progress:
            model = load(hello.model, hello.model_name, progress)
    except CannotLoad as exc:
        control.send(LoadFailed(message=str(exc)))
        leave(ExitStatus.CONFIG)
    if (warning := blas_warning()) is not None:
        log.warning("%s", warning)
    batch = open_batch(model, hello.prefix_cache_bytes)
    if has_text_template(model.tokenizer):
        with suppress(TemplateFailed):
            renderer.wait_ready()
    else:
        renderer.stop()
    renderer.limit(hello.answer_within_s)
    tokeniser = Tokeniser(
        model.tokenizer,
        renderer,
        model=model.name,
        grammars=model.grammars,
        general_tool_prompt=hello.general_tool_prompt,
    )
    tells = "tells" if tokeniser.knows_tools else "does not tell"
    log.info("the chat template %s of tools", tells)
    if hello.prewarm:
        say(PREWARMING, 0, 0, "")
        prewarm(batch, model, hello.prewarm_prompt, hello.prewarm_max_tokens)
    # What is there by now stays: no later collection, which stops a turn, has to look at it.
    gc.collect()
    gc.freeze()
    threading.Thread(target=_tokenise, args=(tokenising, tokeniser), daemon=True).start()
    control.send(
        EngineInfo(
            model=model.name,
            context_length=model.context_length,
            cache_bytes_per_token=model.cache_bytes_per_token,
            vocabulary_size=model.vocabulary_size,
            device=model.device,
            accelerator=model.accelerator,
        )
    )
    while True:
        work = control.receive()
        assert isinstance(work, Work)
        control.send(batch.turn(work))


def set_limits(hello: Hello) -> None:
    """Bound MLX's memory as the worker asks, and say so; nothing else in this process does.

    Raises `CannotLoad` for a limit that Metal refuses.
    """
    if (size := hello.allocator_cache_bytes) is not None:
        mx.set_cache_limit(size)
        log.info("MLX keeps at most %d MB of freed memory for reuse", size // MB)
    if (size := hello.wired_limit_bytes) is None:
        return
    if not mx.metal.is_available():
        log.info("the wired limit of %d MB is not set: this is no Metal device", size // MB)
        return
    try:
        mx.set_wired_limit(size)
    except (RuntimeError, ValueError) as exc:
        raise CannotLoad(f"a wired limit of {size // MB} MB is refused: {exc}") from exc
    log.info("Metal may wire down %d MB", size // MB)


def open_batch(model: LoadedModel, prefix_cache_bytes: int) -> Batch:
    vocabulary = Vocabulary(model.tokenizer)
    style = style_of(model.tokenizer)
    return Batch(
        model.module,
        Answers(vocabulary, style),
        end_tokens=model.end_tokens,
        vocabulary_size=model.vocabulary_size,
        padding_max=model.padding_max,
        prefix_cache_bytes=prefix_cache_bytes,
        guides=Guides(
            grammars=model.grammars,
            marks=style.reasoning,
            end_mark=tuple(model.tokenizer.think_end_tokens or ()),
            text_of=vocabulary.token_text,
        ),
    )


def prewarm(batch: Batch, model: LoadedModel, prompt: str, max_tokens: int) -> None:
    """Really generate: the kernels are compiled and the memory is touched before anybody waits.

    A short prompt is said again and again.
    """
    max_tokens = max(max_tokens, 1)
    tokens = tuple(model.tokenizer.encode(prompt)) or (0,)
    wanted = max(len(tokens), min(PREWARM_TOKENS, model.context_length - max_tokens))
    admit = Admit(
        request_id=RequestId("prewarm"),
        prompt=tuple(islice(cycle(tokens), wanted)),
        produced=(),
        max_tokens=max_tokens,
        sampling=GREEDY,
        stop=(),
    )
    done = batch.turn(Work(admit=(admit,), prefill_tokens=PREWARM_PREFILL_TOKENS))
    while done.residents:
        done = batch.turn(Work(prefill_tokens=PREWARM_PREFILL_TOKENS))


def _tokenise(line: Line, tokeniser: Tokeniser) -> None:
    try:
        line.answer(lambda asked: _answer(asked, tokeniser))
    except BaseException:
        # A thread that dies alone would leave the worker waiting.
        log.exception("the tokenise line failed")
        leave(ExitStatus.SOFTWARE)


def _answer(asked: ToEngine, tokeniser: Tokeniser) -> FromEngine:
    assert isinstance(asked, Tokenise)
    return tokeniser.answer(asked)
