"""Which calls of the model a turn makes to compute prompts, by lengths alone: no MLX here."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.engine import stem_lengths
from trio_worker.engine.prefill_plan import (
    CALL_TOKENS,
    ComputeEnds,
    ComputePart,
    ModelCall,
    PrefillPlan,
    Prompt,
)
from trio_worker.protocol.turn import RequestId

ANY_PADDING = 10**6


def prompt(name: str, length: int, *, done: int = 0, stem: int = 0, plain: bool = True) -> Prompt:
    return Prompt(request_id=RequestId(name), length=length, done=done, stem=stem, is_plain=plain)


def part(name: str, count: int, *, ends_later: bool) -> ComputePart:
    return ComputePart(RequestId(name), count, ends_later)


def ends(*names: str) -> ComputeEnds:
    return ComputeEnds(tuple(map(RequestId, names)))


def planned(
    budget: int, *prompts: Prompt, padding_max: int = ANY_PADDING, share: bool = False
) -> list[ModelCall]:
    plan = PrefillPlan(budget, padding_max=padding_max, share=share)
    for each in prompts:
        if plan.is_full:
            break
        plan.add(each)
    plan.close()
    return plan.take()


def test_prompts_of_about_one_length_end_in_one_call() -> None:
    calls = planned(100, prompt("a", 20), prompt("b", 25), prompt("c", 30, done=4))
    assert calls == [ends("a", "b", "c")]


def test_a_prompt_that_does_not_end_in_this_turn_is_the_last() -> None:
    calls = planned(100, prompt("long", 300, done=50), prompt("short", 5))
    assert calls == [part("long", 100, ends_later=True)]


def test_without_a_bound_to_compute_in_nothing_is_planned() -> None:
    assert planned(0, prompt("a", 20)) == []
    assert PrefillPlan(0, padding_max=0, share=False).is_full


@pytest.mark.parametrize(
    ("budget", "second"),
    [
        (20, []),
        (20 + 2 * CALL_TOKENS - 1, []),
        (20 + 2 * CALL_TOKENS, [part("long", CALL_TOKENS, ends_later=True)]),
        (20 + CALL_TOKENS + 99, [part("long", 99, ends_later=True)]),
        (20 + CALL_TOKENS + 100, [ends("long")]),
    ],
)
def test_a_further_call_is_paid_and_a_further_beginning_is_worth_one(
    budget: int, second: list[ModelCall]
) -> None:
    calls = planned(budget, prompt("short", 20), prompt("long", 100))
    assert calls == [ends("short"), *second]


def test_the_first_call_may_be_as_small_as_the_bound() -> None:
    assert planned(1, prompt("a", 20)) == [part("a", 1, ends_later=True)]


def test_a_last_token_alone_costs_no_call() -> None:
    """It goes through the model in the first decode step."""
    calls = planned(30, prompt("a", 80, done=79), prompt("b", 300))
    assert calls == [ends("a"), part("b", 29, ends_later=True)]


def test_padding_counts_against_the_bound() -> None:
    assert planned(39, prompt("a", 10), prompt("b", 20)) == [ends("a")]
    assert planned(40, prompt("a", 10), prompt("b", 20)) == [ends("a", "b")]


def test_padding_that_takes_longer_than_a_call_is_not_computed() -> None:
    short, alike, longer = (prompt(name, n) for name, n in (("s", 8), ("a", 40), ("l", 41)))
    assert planned(500, short, alike) == [ends("s", "a")]
    assert planned(500, short, longer) == [ends("s"), ends("l")]


def test_rows_that_had_better_decode_apart_are_computed_apart() -> None:
    """What is left of them is alike, and they are not."""
    pair = (prompt("a", 30), prompt("b", 330, done=300))
    assert planned(500, *pair, padding_max=300) == [ends("a", "b")]
    assert planned(500, *pair, padding_max=299) == [ends("a"), ends("b")]
    behind_a_stem = prompt("b", 330, done=300, stem=288)
    assert planned(500, pair[0], behind_a_stem, padding_max=12) == [ends("a", "b")]


def test_caches_that_cannot_be_put_together_have_a_call_each() -> None:
    calls = planned(500, prompt("a", 20, plain=False), prompt("b", 20), prompt("c", 20))
    assert calls == [ends("a"), ends("b", "c")]


def test_most_of_a_long_end_has_a_call_of_its_own_and_is_no_padding_for_others() -> None:
    short, long = prompt("a", 30), prompt("b", 1100)
    most = part("b", 1099, ends_later=False)
    assert planned(5000, long, short, padding_max=100, share=True) == [
        most,
        # Its last token, and the twelve that the stem of 1088 leaves, are alike to the other.
        ends("b", "a"),
    ]
    assert planned(5000, long, short, padding_max=100) == [
        ends("b"),
        ends("a"),
    ]


def test_a_short_end_of_a_long_prompt_needs_no_call_of_its_own() -> None:
    for left, parts in ((stem_lengths.SHORTEST, 0), (stem_lengths.SHORTEST + 1, 1)):
        calls = planned(5000, prompt("a", 1500, done=1500 - left), share=True)
        assert sum(isinstance(call, ComputePart) for call in calls) == parts
        assert calls[-1] == ends("a")
    below = prompt("a", stem_lengths.ALONE + 287, stem=288)
    assert planned(5000, below, share=True) == [ends("a")]


def test_the_call_for_most_of_an_end_is_paid_too() -> None:
    rest = 2 * CALL_TOKENS
    long, next_ = prompt("a", 1100), prompt("b", 500)
    calls = planned(1099 + CALL_TOKENS + rest + 1, long, next_, share=True)
    assert calls == [
        part("a", 1099, ends_later=False),
        ends("a"),
        part("b", rest, ends_later=True),
    ]


def test_calls_are_taken_once_and_the_open_one_when_it_is_closed() -> None:
    plan = PrefillPlan(500, padding_max=ANY_PADDING, share=False)
    plan.add(prompt("a", 8))
    assert (plan.take(), plan.open_ids) == ([], ["a"])
    plan.add(prompt("b", 100))
    assert plan.take() == [ends("a")]
    assert plan.take() == []
    assert plan.open_ids == ["b"]
    plan.close()
    plan.close()
    assert (plan.take(), plan.open_ids) == ([ends("b")], [])


def test_a_turn_is_full_when_the_open_call_takes_all_of_it() -> None:
    plan = PrefillPlan(40, padding_max=ANY_PADDING, share=False)
    plan.add(prompt("a", 39))
    assert not plan.is_full
    plan = PrefillPlan(40, padding_max=ANY_PADDING, share=False)
    plan.add(prompt("a", 20))
    plan.add(prompt("b", 20))
    assert plan.is_full


PROMPTS = st.lists(
    st.builds(
        lambda length, done, stem, plain: prompt(
            "", length, done=int(done * (length - 1)), stem=int(stem * done * length), plain=plain
        ),
        st.integers(1, 1500),
        st.floats(0, 1),
        st.floats(0, 1),
        st.booleans(),
    ),
    max_size=8,
)


@given(PROMPTS, st.integers(0, 3000), st.integers(0, 2000), st.booleans())
def test_no_turn_computes_more_than_its_bound(
    prompts: list[Prompt], budget: int, padding_max: int, share: Any
) -> None:
    """Whatever comes: nobody is computed twice, and padding is computed too."""
    named = {str(i): prompt(str(i), p.length, done=p.done, stem=p.stem, plain=p.is_plain)
             for i, p in enumerate(prompts)}  # fmt: skip
    left = {name: each.left for name, each in named.items()}
    calls = planned(budget, *named.values(), padding_max=padding_max, share=share)
    computed = 0
    ended: list[str] = []
    for index, call in enumerate(calls):
        if isinstance(call, ComputePart):
            assert 0 < call.count < left[call.request_id]
            assert call.ends_later == (index == len(calls) - 1)
            left[call.request_id] -= call.count
            computed += call.count
        else:
            ended += call.request_ids
            computed += len(call.request_ids) * max(left[name] for name in call.request_ids)
    assert computed <= budget
    assert len(ended) == len(set(ended))
    assert ended == sorted(ended)
