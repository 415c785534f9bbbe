"""The running batch on the demo model: what a person would call the same answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trio_worker.engine.models.load import load
from trio_worker.engine.serve import GREEDY, open_batch
from trio_worker.engine.template_renderer import Renderer
from trio_worker.engine.tokenising import Tokeniser
from trio_worker.protocol.frames import Tokenise, Tokenised
from trio_worker.protocol.prompt import Message
from trio_worker.protocol.turn import Admit, RequestId, Work

pytestmark = pytest.mark.mlx

QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "Write a short story about a lighthouse.",
    "List three colours. " * 4,
)
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return load("smollm2-135m-instruct", None, lambda *_: None)


@pytest.fixture(scope="module")
def admits(model: Any) -> Any:
    frames = []
    with Renderer() as renderer:
        tokeniser = Tokeniser(model.tokenizer, renderer)
        answers = [
            tokeniser.answer(Tokenise(prompt=None, messages=(Message(role="user", content=each),)))
            for each in QUESTIONS
        ]
    for index, tokenised in enumerate(answers):
        assert isinstance(tokenised, Tokenised)
        frames.append(
            Admit(
                request_id=RequestId(str(index)),
                prompt=tokenised.prompt.tokens,
                produced=(),
                max_tokens=MAX_TOKENS,
                sampling=GREEDY,
                stop=(),
            )
        )
    return frames


def run(batch: Any, *admits: Any, prefill_tokens: int = 512) -> tuple[dict[str, list[int]], int]:
    """The tokens of every sequence, and how many prompt tokens were computed."""
    tokens: dict[str, list[int]] = {one.request_id: list(one.produced) for one in admits}
    done = batch.turn(Work(admit=admits, prefill_tokens=prefill_tokens))
    computed = 0
    while True:
        computed += done.prefill_tokens
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
        if not done.residents:
            return tokens, computed
        done = batch.turn(Work(prefill_tokens=prefill_tokens))


@pytest.fixture(scope="module")
def alone(model: Any, admits: Any) -> Any:
    batch = open_batch(model, 0)
    return {one.request_id: run(batch, one)[0][one.request_id] for one in admits}


def test_a_batch_says_what_each_says_alone(model: Any, admits: Any, alone: Any) -> None:
    assert len({len(one.prompt) for one in admits}) == len(QUESTIONS)
    assert run(open_batch(model, 0), *admits, prefill_tokens=40)[0] == alone


def test_reused_prefixes_change_no_token(model: Any, admits: Any, alone: Any) -> None:
    """The second time around only the last token of every prompt is computed."""
    batch = open_batch(model, 2**30)
    tokens, computed = run(batch, *admits)
    assert tokens == alone
    assert computed < sum(len(one.prompt) for one in admits)
    assert run(batch, *admits) == (alone, len(admits))


@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**30])
def test_who_comes_back_goes_on_as_if_undisturbed(
    model: Any, admits: Any, alone: Any, prefix_cache_bytes: int
) -> None:
    batch = open_batch(model, prefix_cache_bytes)
    half = [msgspec.structs.replace(one, max_tokens=MAX_TOKENS // 2) for one in admits]
    produced, _ = run(batch, *half)
    back = [
        msgspec.structs.replace(one, produced=tuple(produced[one.request_id])) for one in admits
    ]
    tokens, computed = run(batch, *back)
    assert tokens == alone
    if prefix_cache_bytes:
        assert computed == len(admits)
