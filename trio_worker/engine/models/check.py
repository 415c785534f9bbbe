"""Tells whether a model gives the same greedy answers in a batch as alone, token by token.

A mistake in a model's attention mask or cache shows only when rows of unequal length share a
batch; it is worth a minute before a new model is trusted with callers.
"""

from __future__ import annotations

from trio_worker.engine.batch import Batch
from trio_worker.engine.models.load import LoadedModel
from trio_worker.engine.serve import GREEDY, open_batch
from trio_worker.engine.template_renderer import Renderer
from trio_worker.engine.tokenising import Tokeniser
from trio_worker.protocol.frames import Tokenise, Tokenised
from trio_worker.protocol.prompt import Message
from trio_worker.protocol.turn import Admit, RequestId, Work

MAX_TOKENS = 24
PREFILL_TOKENS = 64
PROMPTS = (
    "Hi",
    "What is the capital of France?",
    "Count from one to ten.",
    "Write a short story about a lighthouse keeper, the sea, the lamp, a storm and a friend.",
    "List three colours. " * 12,
)


def check(model: LoadedModel) -> list[str]:
    """One line for each prompt whose answer differs; none if this model batches correctly."""
    with Renderer() as renderer:
        prompts = [_tokens(model, prompt, renderer) for prompt in PROMPTS]
    batch = open_batch(model, 0)
    alone = [_answers(batch, [prompt])[0] for prompt in prompts]
    together = _answers(batch, prompts)
    return [
        f"{prompt[:32]!r} ({len(tokens)} tokens): differs from token {_differs(one, other)} on"
        for prompt, tokens, one, other in zip(PROMPTS, prompts, alone, together, strict=True)
        if one != other
    ]


def _tokens(model: LoadedModel, prompt: str, renderer: Renderer) -> tuple[int, ...]:
    if model.tokenizer.has_chat_template:
        asked = Tokenise(prompt=None, messages=(Message(role="user", content=prompt),))
    else:
        asked = Tokenise(prompt=prompt, messages=None)
    answer = Tokeniser(model.tokenizer, renderer).answer(asked)
    assert isinstance(answer, Tokenised), answer
    return answer.prompt.tokens


def _answers(batch: Batch, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    admit = tuple(
        Admit(
            request_id=RequestId(str(index)),
            prompt=prompt,
            produced=(),
            max_tokens=MAX_TOKENS,
            sampling=GREEDY,
            stop=(),
        )
        for index, prompt in enumerate(prompts)
    )
    answers: list[list[int]] = [[] for _ in prompts]
    done = batch.turn(Work(admit=admit, prefill_tokens=PREFILL_TOKENS))
    while True:
        for output in done.outputs:
            answers[int(output.request_id)].append(output.token)
        if not done.residents:
            return answers
        done = batch.turn(Work(prefill_tokens=PREFILL_TOKENS))


def _differs(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
