"""A running batch of the tiny model without its process, and what to ask of it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import msgspec

from support.tiny_model import (
    END,
)
from trio_worker.engine.serve import GREEDY, open_batch
from trio_worker.protocol.turn import Admit, Work

NO_END = ((END, -100.0),)
"""Random models end at random; most tests want answers of a known length."""


PROMPTS = [tuple(range(3 + n, 3 + n + length)) for n, length in enumerate((1, 5, 40, 17, 2, 80))]


def opened(model: Any, prefix_bytes: int, padding_max: int) -> Any:
    batch = open_batch(model, prefix_bytes)
    batch._padding_max = padding_max
    return batch


def sampling(**settings: Any) -> Any:
    return msgspec.structs.replace(GREEDY, **{"logit_bias": NO_END, **settings})


def admit(
    request_id: Any,
    prompt: Any = PROMPTS[1],
    *,
    produced: Any = (),
    max_tokens: Any = 12,
    stop: Any = (),
    **settings: Any,
) -> Any:
    return Admit(
        request_id=request_id,
        prompt=tuple(prompt),
        produced=tuple(produced),
        max_tokens=max_tokens,
        sampling=sampling(**settings),
        stop=tuple(stop),
    )


def turn(
    batch: Any, *admits: Any, remove: Any = (), prefill_tokens: Any = 512, trim: Any = False
) -> Any:
    return batch.turn(
        Work(
            admit=admits,
            remove=tuple(remove),
            prefill_tokens=prefill_tokens,
            trim_caches=trim,
        )
    )


def run(batch: Any, *admits: Any, prefill_tokens: Any = 512) -> Any:
    """Every admitted sequence to its end."""
    runs: dict[str, SimpleNamespace] = defaultdict(
        lambda: SimpleNamespace(
            tokens=[],
            text="",
            texts=[],
            finish=None,
            logprobs=[],
            failure=None,
            is_askers_fault=False,
        )
    )
    done = turn(batch, *admits, prefill_tokens=prefill_tokens)
    while True:
        for output in done.outputs:
            of = runs[output.request_id]
            assert of.finish is None
            of.tokens.append(output.token)
            of.texts.append(output.text)
            of.text += output.text
            of.finish = output.finish
            of.logprobs += output.logprobs or (None,)
        for failure in done.failures:
            runs[failure.request_id].failure = failure.message
            runs[failure.request_id].is_askers_fault = failure.is_askers_fault
        if not done.residents:
            return runs
        done = turn(batch, prefill_tokens=prefill_tokens)


def tokens_of(done: Any, request_id: Any = "one") -> Any:
    return [output.token for output in done.outputs if output.request_id == request_id]


def run_one(batch: Any, *args: Any, prefill_tokens: Any = 512, **settings: Any) -> Any:
    return run(batch, admit("one", *args, **settings), prefill_tokens=prefill_tokens)["one"]


MIXED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7},
    "other seed": {"temperature": 1.0, "seed": 8},
    "top_p": {"temperature": 1.2, "seed": 9, "top_p": 0.5},
    "top_k": {"temperature": 1.5, "seed": 10, "top_k": 5},
    "min_p": {"temperature": 1.5, "seed": 11, "min_p": 0.2},
    "filters": {"temperature": 0.7, "seed": 12, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.5, "temperature": 0.9, "seed": 13},
    "frequency": {"frequency_penalty": 0.7},
    "biased": {"logit_bias": (*NO_END, (70, 3.0), (71, -3.0))},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "temperature": 1.0, "seed": 14},
}


def mixed() -> Any:
    return {
        name: admit(name, PROMPTS[n % len(PROMPTS)], **settings)
        for n, (name, settings) in enumerate(MIXED.items())
    }


def together(batch: Any) -> list[list[str]]:
    """The ids of those that decode together."""
    return [[row.request_id for row in each.rows] for each in batch._decodings]


class Watched:
    """A model, and the shapes of what went through it."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, tokens: Any, **others: Any) -> Any:
        self.shapes.append(tokens.shape)
        return self._module(tokens, **others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def segments(batch: Any) -> list[list[tuple[int, int]]]:
    """Of each set of rows that decode together: how many rows begin with a stem of what length."""
    return [
        [(rows, 0 if stem is None else stem[0].shape[2]) for rows, stem in each.caches[0].shared()]
        for each in batch._decodings
    ]


def nbytes(batch: Any) -> int:
    return int(batch._beginnings.nbytes)
