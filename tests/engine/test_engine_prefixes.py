"""What is computed of prompts, kept, and found again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec
import pytest
from support.batches import (
    MIXED,
    PROMPTS,
    admit,
    nbytes,
    run,
    run_one,
    tokens_of,
    turn,
)

from trio_worker.engine.serve import open_batch

pytestmark = pytest.mark.mlx


def test_a_common_prefix_is_computed_once(model: Any, batch: Any) -> None:
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    first, second = (*shared, 200, 201), (*shared, 300, 301, 302)
    expected = [run_one(batch, prompt).tokens for prompt in (first, second, first)]
    got = []
    for prompt, hit in ((first, 0), (second, 100), (first, 101)):
        done = turn(cached, admit("one", prompt))
        (prefill,) = done.prefills
        assert (prefill.cached, prefill.done, prefill.total) == (hit, len(prompt), len(prompt))
        assert done.prefill_tokens == len(prompt) - hit
        tokens = tokens_of(done)
        while done.residents:
            done = turn(cached)
            tokens += tokens_of(done)
        got.append(tokens)
    assert got == expected


def test_a_sequence_that_was_removed_comes_back_without_computing_again(
    model: Any, alone: Any
) -> None:
    cached = open_batch(model, 2**20)
    one = admit("one", PROMPTS[2], **MIXED["seeded"])
    tokens = tokens_of(turn(cached, one))
    for _ in range(5):
        tokens += tokens_of(turn(cached))
    done = turn(cached, remove=["one"])
    assert not done.residents
    done = turn(cached, msgspec.structs.replace(one, produced=tuple(tokens)))
    assert done.prefill_tokens == 1
    tokens += tokens_of(done)
    while done.residents:
        done = turn(cached)
        tokens += tokens_of(done)
    assert tokens == run_one(open_batch(model, 0), PROMPTS[2], **MIXED["seeded"]).tokens


def test_one_that_leaves_while_it_prefills_comes_back_to_what_was_computed(model: Any) -> None:
    cached = open_batch(model, 2**20)
    turn(cached, admit("one", PROMPTS[5]), prefill_tokens=50)
    turn(cached, remove=["one"])
    done = turn(cached, admit("one", PROMPTS[5]))
    assert [prefill.cached for prefill in done.prefills] == [50]
    assert done.prefill_tokens == len(PROMPTS[5]) - 50


def test_one_that_leaves_before_anything_of_it_was_computed_leaves_nothing(model: Any) -> None:
    """Its turn to be computed came when the turn's bound was spent."""
    cached = open_batch(model, 2**20)
    turn(cached, admit("first", PROMPTS[3]), admit("later", PROMPTS[5]), prefill_tokens=30)
    assert turn(cached, remove=["later"], prefill_tokens=0).residents == {"first"}
    assert nbytes(cached) == 0


def test_a_prefix_serves_the_next_prompt_of_the_same_turn(model: Any) -> None:
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    one, other = admit("one", (*shared, 200), max_tokens=5), admit("two", (*shared, 300, 301))
    done = turn(cached, one, other)
    assert [prefill.cached for prefill in done.prefills] == [0, 100]
    tokens = {name: tokens_of(done, name) for name in ("one", "two")}
    while done.residents:
        done = turn(cached)
        for name in tokens:
            tokens[name] += tokens_of(done, name)
    plain = run(open_batch(model, 0), one, other)
    assert tokens == {name: of.tokens for name, of in plain.items()}


def test_a_running_row_lends_its_beginning_and_nothing_is_kept_before(model: Any) -> None:
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    one = admit("one", (*shared, 200), max_tokens=40)
    tokens = defaultdict(list)

    def take(done: Any) -> Any:
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
        return done

    take(turn(cached, one))
    for _ in range(5):
        take(turn(cached))
    assert nbytes(cached) == 0, "a copy for nobody would take the memory twice"
    others = [admit(name, (*shared, 300, n)) for n, name in enumerate("ab", 301)]
    done = take(turn(cached, *others))
    assert [(p.request_id, p.cached) for p in done.prefills] == [("a", 100), ("b", 100)]
    kept = nbytes(cached)
    assert 0 < kept <= 100 * model.cache_bytes_per_token
    while done.residents:
        done = take(turn(cached))
    plain = run(open_batch(model, 0), one, *others)
    assert tokens == {name: of.tokens for name, of in plain.items()}


def test_answers_that_differ_only_at_their_ends_are_not_all_kept(model: Any) -> None:
    """Each would take the memory of the whole; one that goes on from what is kept replaces it."""
    cached = open_batch(model, 2**22)
    shared = tuple(range(10, 210))
    run_one(cached, (*shared, 300), max_tokens=5)
    one = nbytes(cached)
    run(cached, *(admit(str(n), (*shared, 301 + n), max_tokens=5) for n in range(6)))
    assert nbytes(cached) == one
    run_one(cached, (*shared, *range(400, 460)), max_tokens=5)
    assert nbytes(cached) > 2 * one, "a quarter of it was new"
    again = turn(cached, admit("again", (*shared, *range(400, 460), 5)))
    assert [prefill.cached for prefill in again.prefills] == [260]


def test_trimming_gives_back_what_is_kept_for_reuse(model: Any, alone: Any) -> None:
    """And nothing else: who decodes goes on, and who leaves in this turn is not kept either."""
    cached = open_batch(model, 2**20)
    run_one(cached, PROMPTS[5])
    done = turn(cached, admit("greedy", PROMPTS[0]), admit("leaves", PROMPTS[2]))
    assert nbytes(cached) > 0
    tokens = tokens_of(done, "greedy")
    done = turn(cached, remove=["leaves"], trim=True)
    assert nbytes(cached) == 0
    tokens += tokens_of(done, "greedy")
    done = turn(cached, admit("again", PROMPTS[5], max_tokens=1))
    assert [prefill.cached for prefill in done.prefills] == [0]
    while True:
        tokens += [o.token for o in done.outputs if o.request_id == "greedy"]
        if not done.residents:
            break
        done = turn(cached)
    assert tokens == alone["greedy"].tokens


def test_the_prefixes_stay_within_their_bytes(model: Any) -> None:
    per_token = model.cache_bytes_per_token
    cached = open_batch(model, per_token * 130)
    for start in range(3, 10):
        run_one(cached, tuple(range(start, start + 60)), max_tokens=2)
        assert 0 < nbytes(cached) <= per_token * 130
