"""Rows that are held to a form: the same tokens in any company, and nobody else pays."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import jsonschema
import mlx.core as mx
import msgspec
import pytest
from support.batches import (
    PROMPTS,
    admit,
    mixed,
    opened,
    run,
    together,
    turn,
)
from support.guided import (
    CONSTRAINTS,
    GUIDED,
    MAX_TOKENS,
    NUMBERS,
    PERSON,
    all_guided,
    form,
    guided,
)
from support.tiny_model import END

from trio_worker.engine import decoding
from trio_worker.engine.grammars import open_grammars
from trio_worker.engine.guide import GrammarBroken, Guide
from trio_worker.engine.serve import open_batch
from trio_worker.protocol.prompt import Choice, Form, Regex

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def guided_alone(model: Any) -> Any:
    batch = open_batch(model, 0)
    return {each.request_id: run(batch, each)[each.request_id] for each in all_guided(model)}


def tokens_by_row(runs: Any) -> dict[str, list[int]]:
    return {name: of.tokens for name, of in runs.items()}


def test_a_guided_row_gets_the_tokens_in_company_that_it_gets_alone(
    batch: Any, model: Any, guided_alone: Any
) -> None:
    others = [
        msgspec.structs.replace(each, request_id=f"free {name}") for name, each in mixed().items()
    ]
    runs = run(batch, *all_guided(model), *others)
    assert {name: runs[name].tokens for name in guided_alone} == tokens_by_row(guided_alone)


def test_a_free_row_gets_the_same_tokens_beside_guided_ones(
    batch: Any, model: Any, alone: Any
) -> None:
    renamed = [
        msgspec.structs.replace(each, request_id=f"guided {each.request_id}")
        for each in all_guided(model)
    ]
    runs = run(batch, *renamed, *mixed().values())
    assert {name: runs[name].tokens for name in alone} == tokens_by_row(alone)


@pytest.mark.parametrize("padding_max", [10**6, 60, 0])
@pytest.mark.parametrize("prefix_bytes", [0, 2**18])
def test_it_does_not_matter_who_comes_and_goes_beside_a_guided_row(
    model: Any, guided_alone: Any, padding_max: int, prefix_bytes: int
) -> None:
    """Every turn another membership, in one batch of rows or in several."""
    batch = opened(model, prefix_bytes, padding_max)
    tokens = defaultdict(list)
    waiting = all_guided(model)
    residents = True
    while waiting or residents:
        done = turn(batch, *waiting[:1], prefill_tokens=13)
        waiting = waiting[1:]
        residents = done.residents
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
        assert not done.failures
    assert tokens == tokens_by_row(guided_alone)


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_row_that_comes_back_after_any_token_goes_on_with_the_same(
    batch: Any, model: Any, guided_alone: Any, name: str
) -> None:
    whole = guided_alone[name]
    back = [
        msgspec.structs.replace(
            guided(model, name), request_id=str(after), produced=tuple(whole.tokens[:after])
        )
        for after in range(1, len(whole.tokens))
    ]
    for request_id, of in run(batch, *back, prefill_tokens=2048).items():
        assert of.failure is None
        assert of.tokens == whole.tokens[int(request_id) :]
        assert of.text == "".join(whole.texts[int(request_id) :])
        assert of.finish == whole.finish


@pytest.mark.parametrize("prefix_bytes", [0, 2**20])
def test_guided_rows_that_give_way_again_and_again_say_the_same(
    model: Any, guided_alone: Any, prefix_bytes: int
) -> None:
    """Each takes out the other every third turn, as who is more urgent does."""
    batch = opened(model, prefix_bytes, 10**6)
    wanted = {name: guided(model, name) for name in ("drawn", "top_p", "greedy")}
    tokens: dict[str, list[int]] = {name: [] for name in wanted}
    ended: set[str] = set()
    inside: str | None = None
    for number in range(400):
        admits, removed = [], []
        if number % 3 == 0:
            removed = [inside] if inside else []
            waiting = [name for name in wanted if name not in ended and name != inside]
            inside = waiting[number // 3 % len(waiting)] if waiting else inside
            if inside and inside not in ended:
                back = wanted[inside]
                admits = [msgspec.structs.replace(back, produced=tuple(tokens[inside]))]
        done = turn(batch, *admits, remove=removed)
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
            if output.finish is not None:
                ended.add(output.request_id)
        if len(ended) == len(wanted):
            break
    assert tokens == {name: guided_alone[name].tokens for name in wanted}


def test_an_answer_that_ends_keeps_to_its_form_and_any_other_says_length(
    batch: Any, model: Any
) -> None:
    schemas = {"person": PERSON, "numbers": NUMBERS, "object": {"type": "object"}}
    ended = 0
    for seed in range(12):
        asked = [
            msgspec.structs.replace(
                admit(name, PROMPTS[seed % 6], max_tokens=50, temperature=1.0, seed=seed,
                      logit_bias=()),
                form=form(model, constraint),
            )
            for name, constraint in CONSTRAINTS.items()
        ]  # fmt: skip
        for name, of in run(batch, *asked).items():
            assert of.failure is None
            assert (of.finish == "length") == (len(of.tokens) == 50 and of.finish != "stop")
            if of.finish != "stop":
                continue
            ended += 1
            if name in schemas:
                jsonschema.validate(json.loads(of.text), schemas[name])
            elif name == "regex":
                assert re.fullmatch(CONSTRAINTS["regex"].pattern, of.text)  # type: ignore[attr-defined]
            else:
                assert of.text in CONSTRAINTS["choice"].options  # type: ignore[attr-defined]
    assert ended > 20


def test_an_answer_that_nothing_can_follow_ends_with_its_last_token(batch: Any, model: Any) -> None:
    one = msgspec.structs.replace(
        admit("one", max_tokens=5), form=form(model, Choice(options=("hello",)))
    )
    of = run(batch, one)["one"]
    assert (of.text, of.finish, len(of.tokens)) == ("hello", "stop", 1)
    assert END not in of.tokens
    exactly = msgspec.structs.replace(one, max_tokens=1)
    assert run(batch, exactly)["one"].finish == "stop"


def test_a_stop_string_ends_a_guided_answer(batch: Any, model: Any) -> None:
    one = msgspec.structs.replace(
        admit("one", stop=["wor"], max_tokens=30),
        form=form(model, Choice(options=("hello world",))),
    )
    of = run(batch, one)["one"]
    assert (of.text, of.finish) == ("hello ", "stop")


def test_log_probabilities_of_a_guided_row_are_the_models_own(batch: Any, model: Any) -> None:
    one = msgspec.structs.replace(
        guided(model, "logprobs"),
        sampling=msgspec.structs.replace(guided(model, "logprobs").sampling, top_logprobs=1),
    )
    of = run(batch, one)["logprobs"]
    tokens = [*one.prompt, *of.tokens]
    logits = model.module(mx.array([tokens[:-1]]))[0, len(one.prompt) - 1 :]
    own = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected: Any = mx.take_along_axis(own, mx.array(of.tokens)[:, None], axis=-1)[:, 0].tolist()
    assert [each.logprob for each in of.logprobs] == pytest.approx(expected, abs=1e-3)
    assert [each.top[0][1] for each in of.logprobs] == pytest.approx(
        own.max(axis=-1).tolist(), abs=1e-3
    )
    assert any(each.logprob < each.top[0][1] - 2 for each in of.logprobs), "something was forbidden"


def test_a_token_that_breaks_its_grammar_fails_that_row_alone(
    batch: Any, model: Any, alone: Any
) -> None:
    broken = msgspec.structs.replace(
        guided(model, "greedy"), request_id="broken", produced=(END + 70, END + 71)
    )
    runs = run(batch, broken, guided(model, "drawn"), *mixed().values())
    assert "GrammarBroken" in runs["broken"].failure
    assert not runs["broken"].is_askers_fault
    assert not runs["broken"].tokens
    assert runs["drawn"].finish is not None
    assert {name: runs[name].tokens for name in alone} == tokens_by_row(alone)


def test_tokens_that_break_their_grammar_are_not_computed_again(batch: Any, model: Any) -> None:
    broken = msgspec.structs.replace(guided(model, "greedy"), produced=(END + 70,))
    done = turn(batch, broken)
    assert [each.request_id for each in done.failures] == ["greedy"]
    assert not done.residents
    assert not done.prefills


def test_a_guide_asks_for_no_mask_where_nothing_is_drawn_any_more(model: Any) -> None:
    grammar = form(model, Choice(options=("hello",))).grammar
    (hello,) = model.tokenizer.encode("hello")
    guide = Guide(model.grammars.matcher(grammar), None)
    assert guide.limits
    guide.consume(hello)
    assert (guide.is_done, guide.limits, guide.failure) == (True, False, None)
    broken = Guide(model.grammars.matcher(grammar, [hello + 1]), None)
    assert (broken.is_done, broken.limits) == (False, False)
    assert isinstance(broken.failure, GrammarBroken)


def test_a_grammar_that_cannot_be_had_fails_its_sequence_alone(batch: Any, model: Any) -> None:
    bad = msgspec.structs.replace(admit("bad"), form=Form(grammar="start: nothing"))
    runs = run(batch, bad, guided(model, "drawn"))
    assert "unknown name" in runs["bad"].failure
    assert runs["drawn"].failure is None
    unheld = open_batch(replace(model, grammars=None), 0)
    assert "tokenizer" in run(unheld, guided(model, "drawn"))["drawn"].failure


def test_masks_that_take_too_long_fail_their_row_alone(
    monkeypatch: Any, model: Any, alone: Any
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.3
        return now[0]

    batch = open_batch(model, 0)
    monkeypatch.setattr(model.grammars, "_clock", clock)
    runs = run(batch, guided(model, "drawn"), *mixed().values())
    assert "too complex" in runs["drawn"].failure
    assert runs["drawn"].is_askers_fault
    assert 0 < len(runs["drawn"].tokens) < 5
    assert {name: runs[name].tokens for name in alone} == tokens_by_row(alone)


def test_only_a_step_with_a_guided_row_is_launched_in_two_parts(
    monkeypatch: Any, batch: Any, model: Any
) -> None:
    launched = []
    launch: Any = mx.async_eval

    def counting(*arrays: Any) -> None:
        launched.append(arrays)
        launch(*arrays)

    monkeypatch.setattr(mx, "async_eval", counting)
    run(batch, admit("one", max_tokens=12))
    free = len(launched)
    guided_one = msgspec.structs.replace(
        admit("one", max_tokens=12), form=form(model, Regex(pattern="[0-9]{20}"))
    )
    run(batch, guided_one)
    assert (free, len(launched) - free) == (13, 26)


def test_nothing_is_worked_out_for_a_batch_without_a_guided_row(
    monkeypatch: Any, batch: Any, alone: Any
) -> None:
    monkeypatch.setattr(decoding, "allowed", None)
    assert tokens_by_row(run(batch, *mixed().values())) == tokens_by_row(alone)


def test_a_vocabulary_narrower_than_the_logits_is_held_to_its_tokens(model: Any) -> None:
    grammars: Any = open_grammars(
        model.tokenizer, end_tokens=model.end_tokens, size=model.vocabulary_size + 50
    )
    assert grammars.size == model.vocabulary_size + 50
    assert open_grammars(model.tokenizer, end_tokens=(), size=model.vocabulary_size) is None


def test_the_longest_that_an_answer_may_be_is_kept_to(batch: Any, model: Any) -> None:
    one = msgspec.structs.replace(
        admit("one", max_tokens=MAX_TOKENS), form=form(model, Regex(pattern="[0-9]{500}"))
    )
    of = run(batch, one)["one"]
    assert (of.finish, len(of.tokens)) == ("length", MAX_TOKENS)
    assert together(batch) == []
