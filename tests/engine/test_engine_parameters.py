"""What each sampling parameter does to an answer."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from support.batches import (
    NO_END,
    PROMPTS,
    admit,
    run,
    run_one,
    sampling,
)

from trio_worker.engine.sampling import Plan

pytestmark = pytest.mark.mlx


def test_another_seed_draws_other_tokens_and_the_same_seed_the_same(alone: Any, batch: Any) -> None:
    one = run_one(batch, temperature=1.0, seed=1)
    assert run_one(batch, temperature=1.0, seed=1).tokens == one.tokens
    assert run_one(batch, temperature=1.0, seed=2).tokens != one.tokens


def test_seeds_up_to_the_largest_are_taken(batch: Any) -> None:
    largest = run_one(batch, temperature=1.0, seed=2**53 - 1)
    assert largest.tokens != run_one(batch, temperature=1.0, seed=2**53 - 2).tokens


def test_a_tiny_temperature_is_greedy(batch: Any, alone: Any) -> None:
    assert run_one(batch, PROMPTS[0], temperature=1e-9).tokens == alone["greedy"].tokens


@pytest.mark.parametrize("filter_", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_filter_that_keeps_one_token_is_greedy(batch: Any, filter_: Any) -> None:
    """At a temperature that would otherwise choose wildly."""
    greedy = run_one(batch).tokens
    assert run_one(batch, temperature=2.0, seed=3, **filter_).tokens == greedy


def test_top_k_draws_among_the_k_likeliest(batch: Any) -> None:
    of = run_one(
        batch, max_tokens=60, temperature=2.0, seed=5, top_k=3, logprobs=True, top_logprobs=3,
        logit_bias=(),
    )  # fmt: skip
    ranks = set()
    for one in of.logprobs:
        values = [value for _, value in one.top]
        assert one.logprob >= min(values) - 1e-5
        ranks.add(min(range(3), key=lambda i: abs(values[i] - one.logprob)))
    assert len(ranks) > 1


def test_top_p_and_min_p_keep_what_their_definition_keeps(model: Any) -> None:
    """Against the plain definition, with thousands of draws from one distribution."""
    logits = mx.array([[math.log(p) for p in (0.5, 0.25, 0.15, 0.06, 0.04)]])

    def drawn(**settings: Any) -> Any:
        seen = set()
        for seed in range(300):
            row = SimpleNamespace(
                sampling=sampling(temperature=1.0, seed=seed, logit_bias=(), **settings),
                prompt_length=1,
            )
            tokens, _ = Plan([row], [[0]], 5).draw(logits, mx.array([0]), [[0]])
            seen.add(tokens.item())
        return seen

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.7) == {0, 1}
    assert drawn(top_p=0.8) == {0, 1, 2}
    assert drawn(min_p=0.29) == {0, 1, 2}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=2, top_p=0.6) == {0}


def test_a_top_k_beyond_the_vocabulary_keeps_every_token(batch: Any) -> None:
    free = run_one(batch, temperature=1.0, seed=3, top_p=0.999)
    assert run_one(batch, temperature=1.0, seed=3, top_p=0.999, top_k=10**6).tokens == free.tokens


def test_a_logit_bias_forces_and_forbids(batch: Any) -> None:
    assert set(run_one(batch, logit_bias=((100, 100.0),)).tokens) == {100}
    greedy = run_one(batch).tokens
    assert greedy[0] not in run_one(batch, logit_bias=(*NO_END, (greedy[0], -100.0))).tokens


def test_penalties_work_against_repetition(batch: Any) -> None:
    """With one token far ahead of all others, and a penalty that must push it back."""
    ahead = {"logit_bias": (*NO_END, (100, 30.0))}
    assert set(run_one(batch, **ahead).tokens) == {100}
    for penalty in (
        {"presence_penalty": 60.0}, {"frequency_penalty": 60.0}, {"repetition_penalty": 50.0},
    ):  # fmt: skip
        tokens = run_one(batch, **ahead, **penalty).tokens
        assert tokens.count(100) == 1, penalty


def test_only_the_repetition_penalty_looks_at_the_prompt(batch: Any) -> None:
    ahead = {"logit_bias": (*NO_END, (100, 30.0)), "max_tokens": 1}
    prompt = (100, 5)
    for penalty, first in (
        ({"presence_penalty": 60.0}, {100}),
        ({"frequency_penalty": 60.0}, {100}),
        ({"repetition_penalty": 50.0}, set()),
    ):
        assert set(run_one(batch, prompt, **ahead, **penalty).tokens) & {100} == first
    # The prompt's last token enters by another way than the others.
    assert run_one(batch, (5, 100), **ahead, presence_penalty=60.0).tokens == [100]
    assert run_one(batch, (5, 100), **ahead, repetition_penalty=50.0).tokens != [100]


def test_log_probabilities_are_the_models_own(batch: Any, model: Any) -> None:
    of = run_one(batch, logprobs=True, top_logprobs=4, max_tokens=3, temperature=1.0, seed=4)
    logits = model.module(mx.array([[*PROMPTS[1], *of.tokens]]))[0]
    normal = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for n, (token, one) in enumerate(zip(of.tokens, of.logprobs, strict=True)):
        row = normal[len(PROMPTS[1]) - 1 + n]
        assert one.logprob == pytest.approx(row[token].item(), abs=1e-3)
        best = sorted(row.tolist(), reverse=True)[:4]
        assert [value for _, value in one.top] == pytest.approx(best, abs=1e-3)


def test_log_probabilities_come_only_to_those_who_asked(batch: Any) -> None:
    runs = run(
        batch,
        admit("none"),
        admit("some", logprobs=True),
        admit("more", logprobs=True, top_logprobs=5),
        admit("fewer", logprobs=True, top_logprobs=2),
    )
    assert set(runs["none"].logprobs) == {None}
    for name, top in (("some", 0), ("more", 5), ("fewer", 2)):
        assert {len(one.top) for one in runs[name].logprobs} == {top}
    assert runs["more"].logprobs[0].top[:2] == runs["fewer"].logprobs[0].top
    assert runs["more"].logprobs[0].logprob == runs["more"].logprobs[0].top[0][1]
