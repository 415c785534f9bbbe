"""The demo model, drawn at temperature 1: with a grammar what ends is valid, without it is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
from support.schemas import SCHEMAS

from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch
from trio_worker.engine.template_renderer import Renderer
from trio_worker.engine.tokenising import Tokeniser
from trio_worker.protocol.frames import Tokenise, Tokenised
from trio_worker.protocol.prompt import ANYTHING, FREE, JsonSchema, Message, Prompt, Wanted
from trio_worker.protocol.turn import Admit, FinishReason, RequestId, Sampling, Work

pytestmark = pytest.mark.mlx

MAX_TOKENS = 200
TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Said:
    schema: Any
    text: str
    finish: FinishReason

    @property
    def is_valid(self) -> bool:
        try:
            jsonschema.validate(json.loads(self.text), self.schema)
        except (ValueError, jsonschema.ValidationError):
            return False
        return True


@pytest.fixture(scope="module")
def model() -> Any:
    return load("smollm2-135m-instruct", None, lambda *_: None)


@pytest.fixture(scope="module")
def prompts(model: Any) -> Iterator[Any]:
    """By the name of a schema; with its form, or free."""
    with Renderer() as renderer:
        tokeniser = Tokeniser(model.tokenizer, renderer, grammars=model.grammars)

        def prompt(schema: Any, wanted: Wanted) -> Prompt:
            asked = f"Answer with JSON that fits this schema: {json.dumps(schema)}"
            messages = (Message(role="user", content=asked),)
            answer = tokeniser.answer(Tokenise(prompt=None, messages=messages, wanted=wanted))
            assert isinstance(answer, Tokenised), answer
            return answer.prompt

        yield {
            name: (
                prompt(schema, Wanted(constraint=JsonSchema(schema=json.dumps(schema)))),
                prompt(schema, ANYTHING),
            )
            for name, schema in SCHEMAS.items()
        }


def answers(model: Any, prompts: Any, seeds: range, *, constrained: bool) -> list[Said]:
    """What is said under every schema, for every seed; `TOGETHER` at a time."""
    batch = open_batch(model, 2**28)
    waiting = []
    for name, both in prompts.items():
        prompt = both[0] if constrained else both[1]
        assert (prompt.form != FREE) == constrained
        waiting += [
            Admit(
                request_id=RequestId(f"{name}/{seed}"),
                prompt=prompt.tokens,
                produced=(),
                max_tokens=MAX_TOKENS,
                sampling=Sampling(temperature=1.0, seed=seed),
                stop=(),
                form=prompt.form,
            )
            for seed in seeds
        ]
    texts: dict[str, str] = {}
    said = []
    report = batch.turn(Work(admit=tuple(waiting[:TOGETHER])))
    del waiting[:TOGETHER]
    while True:
        assert not report.failures
        for output in report.outputs:
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
            if output.finish is not None:
                schema = SCHEMAS[output.request_id.partition("/")[0]]
                said.append(Said(schema, texts.pop(output.request_id), output.finish))
        if not report.residents and not waiting:
            return said
        count = TOGETHER - len(report.residents)
        report = batch.turn(Work(admit=tuple(waiting[:count])))
        del waiting[:count]


def test_an_answer_that_is_held_to_a_schema_is_valid(model: Any, prompts: Any) -> None:
    some = {name: prompts[name] for name in ("enums", "numbers with ranges")}
    for said in answers(model, some, range(1), constrained=True):
        assert said.finish is FinishReason.STOP
        assert said.is_valid


@pytest.mark.thorough
def test_what_has_come_to_its_end_is_valid_and_without_a_grammar_it_is_not(
    model: Any, prompts: Any
) -> None:
    constrained = answers(model, prompts, range(20), constrained=True)
    assert len(constrained) == 20 * len(SCHEMAS)
    ended = [each for each in constrained if each.finish is FinishReason.STOP]
    assert [each for each in ended if not each.is_valid] == []
    assert len(ended) == len(constrained), "these schemas leave no way to go on and on"
    free = answers(model, prompts, range(2), constrained=False)
    assert sum(each.is_valid for each in free) <= len(free) // 10
