"""Which prompts are computed in which calls of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.batches import (
    PROMPTS,
    Watched,
    admit,
    run,
    run_one,
    tokens_of,
    turn,
)

from trio_worker.engine.prefill_plan import CALL_TOKENS
from trio_worker.engine.serve import open_batch, prewarm

pytestmark = pytest.mark.mlx


def test_the_ends_of_alike_prompts_are_computed_in_one_call(model: Any) -> None:
    """A call reads the weights; a row that is short of the widest computes a little again."""
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    run_one(cached, (*shared, 200), max_tokens=1)
    cached._model = watched = Watched(model.module)
    admits = [admit(str(n), (*shared, *range(300, 302 + 3 * n))) for n in range(4)]
    done = turn(cached, *admits)
    assert watched.shapes == [(4, 10), (4, 1), (4, 1)]
    assert done.prefill_tokens == 2 + 5 + 8 + 11
    tokens = {one.request_id: tokens_of(done, one.request_id) for one in admits}
    while done.residents:
        done = turn(cached)
        for name in tokens:
            tokens[name] += tokens_of(done, name)
    for one in admits:
        assert tokens[one.request_id] == run(open_batch(model, 0), one)[one.request_id].tokens


def test_who_comes_makes_the_first_step_with_all_others(batch: Any, model: Any) -> None:
    """A step of their own would read the weights once more; the turn has two steps for all."""
    old = admit("old", PROMPTS[1])
    done = turn(batch, old)
    tokens = {"old": tokens_of(done, "old")}
    batch._model = watched = Watched(model.module)
    for each in batch._decodings:
        each._model = watched
    done = turn(batch, admit("new", PROMPTS[3]), admit("other", PROMPTS[3]))
    assert watched.shapes == [(2, 16), (3, 1), (3, 1)]
    counts = {name: len(tokens_of(done, name)) for name in ("old", "new", "other")}
    assert counts == {"old": 2, "new": 1, "other": 1}
    while True:
        tokens["old"] += tokens_of(done, "old")
        if not done.residents:
            break
        done = turn(batch)
    assert tokens["old"] == run(open_batch(model, 0), old)["old"].tokens


def test_prewarming_computes_a_prompt_as_well(batch: Any, model: Any) -> None:
    batch._model = watched = Watched(model.module)
    prewarm(batch, model, "Hello", 2)
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(1, 64)]
    watched.shapes.clear()
    prewarm(batch, replace(model, context_length=20), "Hello", 2)
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(1, 17)]
    assert not batch.residents


def test_prompts_of_very_different_lengths_are_computed_apart(batch: Any, model: Any) -> None:
    batch._model = watched = Watched(model.module)
    turn(batch, admit("long", PROMPTS[5]), admit("short", PROMPTS[1]), admit("other", PROMPTS[3]))
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(1, 79), (2, 16)]


@pytest.mark.parametrize(
    ("budget", "shapes"),
    [
        (30, [(1, 16)]),
        (60, [(1, 16)]),
        (17 + 2 * CALL_TOKENS, [(1, 16), (1, CALL_TOKENS)]),
        (17 + CALL_TOKENS + 80, [(1, 16), (1, 79)]),
    ],
)
def test_a_further_call_of_the_model_is_paid_from_the_turns_bound(
    batch: Any, model: Any, budget: int, shapes: Any
) -> None:
    """Each reads the weights: a few tokens more of another prompt are not worth one."""
    batch._model = watched = Watched(model.module)
    short, long = admit("short", PROMPTS[3]), admit("long", PROMPTS[5])
    done = turn(batch, short, long, prefill_tokens=budget)
    assert [shape for shape in watched.shapes if shape[1] > 1] == shapes
    assert done.prefill_calls == len(shapes)
    assert 0 < done.prefill_seconds < done.seconds
    first: list[int] = []
    while not (first := tokens_of(done, "long")):
        done = turn(batch, prefill_tokens=budget)
    assert first[0] == run(open_batch(model, 0), long)["long"].tokens[0]


@pytest.mark.parametrize("budget", [20, 33, 47, 64, 100])
def test_padding_counts_against_the_turns_bound(batch: Any, model: Any, budget: int) -> None:
    batch._model = watched = Watched(model.module)
    admits = [admit(str(n), range(3, 6 + 7 * n)) for n in range(6)]
    done = turn(batch, *admits, prefill_tokens=budget)
    together = False
    while True:
        prefilled = [shape for shape in watched.shapes if shape[1] > 1]
        together = together or any(rows > 1 for rows, _ in prefilled)
        assert sum(rows * width for rows, width in prefilled) <= budget
        watched.shapes.clear()
        if not done.residents:
            break
        done = turn(batch, prefill_tokens=budget)
    assert together
