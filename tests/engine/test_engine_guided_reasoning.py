"""Reasoning, and calls that must come, in the running batch: drawn by chance, held by grammars."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest
from support.batches import PROMPTS, admit, run, turn
from support.guided import PERSON
from support.marked_models import write_marked_model

from trio_worker.engine import decoding
from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch
from trio_worker.engine.style import style_of
from trio_worker.grammar.forms import grammar_of
from trio_worker.protocol.prompt import (
    CallArguments,
    CallBegun,
    Choice,
    Form,
    JsonSchema,
    Reasoning,
    Regex,
    Tool,
    ToolUse,
    Wanted,
)

pytestmark = pytest.mark.mlx

DATE = {
    "type": "object",
    "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
    "required": ["day"],
    "additionalProperties": False,
}
TOOLS = (Tool(name="look_up", parameters=json.dumps(DATE)), Tool(name="now"))
PERSONS = JsonSchema(schema=json.dumps(PERSON))


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Any:
    return {
        family: load(
            str(write_marked_model(tmp_path_factory.mktemp(family), family)), None, lambda *_: None
        )
        for family in ("hermes", "gemma", "mistral")
    }


@pytest.fixture
def hermes(models: Any) -> Any:
    return models["hermes"]


def form(model: Any, *, starts: bool = False, **wanted: Any) -> Form:
    """As the tokeniser works it out for a chat, of a prompt that ends in reasoning or does not."""
    asked, style = Wanted(**wanted), style_of(model.tokenizer)
    return Form(
        grammar=grammar_of(asked, style, model.grammars, starts_in_reasoning=starts),
        finds_reasoning=style.reasoning is not None,
        starts_in_reasoning=starts,
        max_reasoning_tokens=asked.max_reasoning_tokens,
        tools=asked.tools,
        one_call=bool(asked.tools) and not asked.parallel_calls,
    )


def asks(form: Form, name: str = "one", **settings: Any) -> Any:
    settings = {"temperature": 1.0, "max_tokens": 200, "logit_bias": (), **settings}
    return msgspec.structs.replace(admit(name, PROMPTS[2], **settings), form=form)


def outputs_of(batch: Any, one: Any) -> Any:
    done, outputs = turn(batch, one), []
    while True:
        assert not done.failures, done.failures
        outputs += [each for each in done.outputs if each.request_id == one.request_id]
        if outputs and outputs[-1].finish is not None:
            return outputs
        done = turn(batch)


def text_of(outputs: Any) -> str:
    return "".join(each.text for each in outputs)


def pieces_of(outputs: Any, kind: Any) -> Any:
    return [piece for each in outputs for piece in each.beside if isinstance(piece, kind)]


def calls_of(outputs: Any) -> list[tuple[str, Any]]:
    arguments = pieces_of(outputs, CallArguments)
    return [
        (
            begun.name,
            json.loads("".join(each.text for each in arguments if each.index == begun.index)),
        )
        for begun in pieces_of(outputs, CallBegun)
    ]


@pytest.mark.parametrize("family", ["hermes", "gemma"])
@pytest.mark.parametrize("seed", range(4))
def test_what_follows_the_reasoning_keeps_to_its_schema(
    models: Any, family: str, seed: int
) -> None:
    model = models[family]
    held = form(model, starts=True, constraint=PERSONS, max_reasoning_tokens=12)
    outputs = outputs_of(open_batch(model, 0), asks(held, seed=seed))
    assert outputs[-1].finish == "stop"
    jsonschema.validate(json.loads(text_of(outputs)), PERSON)
    assert pieces_of(outputs, Reasoning)
    thought = [each.is_reasoning for each in outputs]
    # A character that was begun is ended first, and the mark is one token more.
    assert 13 <= sum(thought) <= 13 + 3
    assert thought == sorted(thought, reverse=True)


@pytest.mark.parametrize("most", [0, 1, 7])
def test_reasoning_that_nothing_else_holds_ends_after_its_tokens(hermes: Any, most: int) -> None:
    held = form(hermes, starts=True, max_reasoning_tokens=most)
    assert not held.grammar
    outputs = outputs_of(open_batch(hermes, 0), asks(held, seed=3, max_tokens=30))
    (end,) = hermes.tokenizer.think_end_tokens
    assert [each.token for each in outputs].index(end) == most
    assert [each.is_reasoning for each in outputs][: most + 2] == [True] * (most + 1) + [False]


def test_a_row_with_reasoning_to_spare_draws_as_if_it_had_no_bound(
    monkeypatch: Any, hermes: Any
) -> None:
    monkeypatch.setattr(decoding, "allowed", None)
    batch = open_batch(hermes, 0)
    asked: Any = {"seed": 5, "max_tokens": 40}
    free = outputs_of(batch, asks(form(hermes, starts=True), **asked))
    bound = outputs_of(batch, asks(form(hermes, starts=True, max_reasoning_tokens=99), **asked))
    assert [each.token for each in bound] == [each.token for each in free]


HELD: dict[str, Any] = {
    "budget": {"starts": True, "max_reasoning_tokens": 5},
    "both": {"starts": True, "constraint": PERSONS, "max_reasoning_tokens": 5},
    "calls": {"tools": TOOLS, "tool_use": ToolUse.REQUIRED, "max_reasoning_tokens": 3},
    "strict": {"tools": tuple(msgspec.structs.replace(each, strict=True) for each in TOOLS)},
}


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("hermes", name) for name in HELD), ("gemma", "budget"), ("gemma", "both")],
)
def test_it_goes_on_the_same_after_any_token_and_in_any_company(
    models: Any, family: str, name: str
) -> None:
    model = models[family]
    batch = open_batch(model, 0)
    one = asks(form(model, **HELD[name]), name, seed=11, max_tokens=60)
    alone = run(batch, one)[name]
    back = [
        msgspec.structs.replace(one, request_id=str(after), produced=tuple(alone.tokens[:after]))
        for after in range(len(alone.tokens))
    ]
    for request_id, of in run(batch, *back, prefill_tokens=4096).items():
        assert of.failure is None
        assert of.tokens == alone.tokens[int(request_id) :]
        assert of.finish == alone.finish


@pytest.mark.parametrize("family", ["hermes", "mistral"])
@pytest.mark.parametrize("seed", range(3))
def test_calls_that_must_come_do_and_with_the_arguments_that_they_may_have(
    models: Any, family: str, seed: int
) -> None:
    model = models[family]
    held = form(
        model,
        tools=TOOLS,
        tool_use=ToolUse.REQUIRED,
        parallel_calls=False,
        max_reasoning_tokens=5,
    )
    outputs = outputs_of(open_batch(model, 0), asks(held, seed=seed))
    assert outputs[-1].finish == "tool_calls"
    assert text_of(outputs) == ""
    ((name, arguments),) = calls_of(outputs)
    jsonschema.validate(arguments, {"look_up": DATE, "now": {"type": "object"}}[name])


def test_a_named_tool_is_called(hermes: Any) -> None:
    for name in ("look_up", "now"):
        held = form(hermes, tools=TOOLS, tool_use=ToolUse.REQUIRED, allowed_tools=(name,))
        outputs = outputs_of(open_batch(hermes, 0), asks(held, seed=1, max_tokens=400))
        assert {called for called, _ in calls_of(outputs)} == {name}
        assert outputs[-1].finish == "tool_calls"


def test_calls_may_come_in_place_of_a_constrained_answer(hermes: Any) -> None:
    held = form(hermes, tools=TOOLS, constraint=Choice(options=("yes", "no")))
    mark = hermes.tokenizer.convert_tokens_to_ids("<tool_call>")
    for bias, finish in ((-50.0, "stop"), (50.0, "tool_calls")):
        one = asks(held, seed=1, max_tokens=400, logit_bias=((mark, bias),))
        outputs = outputs_of(open_batch(hermes, 0), one)
        assert outputs[-1].finish == finish
        assert (text_of(outputs) in ("yes", "no")) == (finish == "stop")
        assert bool(calls_of(outputs)) == (finish == "tool_calls")


def test_a_stop_string_is_not_looked_for_in_what_is_reasoned(hermes: Any) -> None:
    held = form(hermes, starts=True, constraint=Regex(pattern="0{30}"), max_reasoning_tokens=6)
    one = asks(held, seed=2, stop=["00000"])
    outputs = outputs_of(open_batch(hermes, 0), one)
    assert outputs[-1].finish == "stop"
    assert text_of(outputs) == ""
    assert 6 < len(outputs) < 16


def test_log_probabilities_come_beside_what_is_held_to_a_form(hermes: Any) -> None:
    held = form(hermes, starts=True, constraint=Regex(pattern="0{5}"), max_reasoning_tokens=6)
    outputs = outputs_of(open_batch(hermes, 0), asks(held, seed=2, logprobs=True))
    assert [each.token for output in outputs for each in output.logprobs] == ["0"] * 5
