"""How many prompt tokens a turn may compute, in numbers that can be followed by hand."""

from __future__ import annotations

from random import Random

import pytest

from trio_worker.core.prefill import CHUNK_FIRST, CHUNK_MIN, PrefillBudget

MUCH = 10**6
"""More tokens than could be prefilled at once."""


def make_budget(
    *points: tuple[int, float], decode_s: float = 0.05, chunk_max: int = 5000, target_s: float = 0.2
) -> PrefillBudget:
    """After turns with so many tokens in so many seconds each."""
    budget = PrefillBudget(chunk_max=chunk_max, gap_target_s=target_s)
    if decode_s:
        budget.decoded(seconds=decode_s)
    for tokens, seconds in points:
        budget.prefilled(seconds=seconds, tokens=tokens, calls=1)
    return budget


LINE = ((200, 0.22), (400, 0.42))
"""On the line of 20 ms and 1 ms a token: two points lie on one whatever their weights."""


@pytest.mark.parametrize(
    ("decoding", "waiting", "left", "expected"),
    [
        (4, 1, MUCH, 130),  # 200 - 50 - 20 ms
        (4, 2, MUCH, 130),
        (4, 3, MUCH, 230),  # half as much again may be waited: 300 - 50 - 20 ms
        (2, 4, MUCH, 730),  # at most four times: 800 - 50 - 20 ms
        (1, 7, MUCH, 730),
        (0, 8, MUCH, 980),  # alone, a second
        (0, 8, 10, 980),
        (4, 1, 300, 300),  # what anybody waits for fits into once and a half of the target
        (4, 1, 301, 130),
        (4, 1, 0, 300),
        (4, 3, 250, 300),
        (2, 4, 250, 730),
    ],
)
def test_a_chunk_is_what_the_gap_leaves_after_a_step_and_the_fixed_cost(
    decoding: int, waiting: int, left: int, expected: int
) -> None:
    budget = make_budget(*LINE)
    chunk = budget.chunk(decoding=decoding, waiting=waiting, left=left)
    assert chunk == pytest.approx(expected, abs=1)


def test_what_takes_just_once_and_a_half_of_the_target_is_prefilled_at_once() -> None:
    """In binary fractions, so that it is just that."""
    budget = make_budget((100, 100 / 1024), target_s=0.25)
    chunks = [budget.chunk(decoding=4, waiting=1, left=left) for left in (383, 384, 385)]
    assert chunks == [384, 384, 204]


def test_a_chunk_is_never_less_than_eight_nor_more_than_four_times_the_largest_measured() -> None:
    slow = make_budget((10, 5.0))
    assert slow.chunk(decoding=4, waiting=1, left=MUCH) == 8
    quick = make_budget((10, 0.0001), (20, 0.0002), (12, 0.00012))
    assert quick.chunk(decoding=4, waiting=1, left=MUCH) == 80
    assert make_budget((10, 0.0001), chunk_max=20).chunk(decoding=0, waiting=1, left=9) == 20
    assert make_budget((10, 0.0001), chunk_max=2).chunk(decoding=0, waiting=1, left=9) == 8
    free = make_budget((100, 0.0))
    assert free.chunk(decoding=0, waiting=1, left=MUCH) == 400, "a clock that saw nothing"


@pytest.mark.parametrize(("chunk_max", "expected"), [(512, 32), (16, 16), (2, 8)])
def test_before_anything_was_measured_and_again_after_a_restart(
    chunk_max: int, expected: int
) -> None:
    for budget in (
        PrefillBudget(chunk_max=chunk_max, gap_target_s=0.2),
        make_budget(*LINE, chunk_max=chunk_max),
    ):
        budget.restarted()
        for decoding in (0, 3):
            assert budget.chunk(decoding=decoding, waiting=1, left=MUCH) == expected
    # Nothing of what was measured before is left in what is measured now.
    budget.decoded(seconds=0.05)
    budget.chunk_max = 5000
    for tokens, seconds in LINE:
        budget.prefilled(seconds=seconds, tokens=tokens, calls=1)
    assert budget.chunk(decoding=4, waiting=1, left=MUCH) == pytest.approx(130, abs=1)


def test_a_new_decode_step_counts_for_a_quarter() -> None:
    budget = make_budget(*LINE, decode_s=0.04)
    budget.decoded(seconds=0.08)
    assert budget.chunk(decoding=4, waiting=1, left=MUCH) == pytest.approx(130, abs=1), "50 ms"


def test_a_new_turn_with_prefill_counts_for_a_quarter() -> None:
    points = ((200, 0.22), (400, 0.42), (300, 0.42))
    weights = (0.75 * 0.75, 0.25 * 0.75, 0.25)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True))
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True))
    covariance = sum(
        w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)
    )
    variance = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = covariance / variance
    fixed = mean_y - slope * mean_x
    budget = make_budget(*points, decode_s=0.06)
    assert 0 < fixed < 0.06
    assert budget._line() == pytest.approx((fixed, slope))


def test_a_turn_with_several_calls_is_measured_by_the_call() -> None:
    budget = PrefillBudget(chunk_max=5000, gap_target_s=0.2)
    budget.decoded(seconds=0.05)
    for tokens, seconds in LINE:
        budget.prefilled(seconds=3 * seconds, tokens=3 * tokens, calls=3)
    assert budget._line() == pytest.approx((0.02, 0.001))
    assert budget._largest == 400


@pytest.mark.parametrize(
    ("points", "decode_s", "fixed_s", "token_s"),
    [
        # Without another size to compare with, all of it is taken for the cost of tokens.
        (((100, 0.1),), 0.05, 0.0, 0.001),
        (((100, 0.1), (101, 0.2)), 0.05, 0.0, 0.125 / 100.25),
        (((0, 0.1),), 0.05, 0.0, 0.1),
        (((10, 0.0),), 0.05, 0.0, 1e-9),
        # Steeper than the mean: nothing is left for the fixed cost.
        (((100, 0.1), (200, 0.4)), 0.05, 0.0, 0.175 / 125),
        # The more the quicker: tokens cost a quarter of it all at least.
        (((100, 0.2), (200, 0.1)), 0.5, 0.175 * 0.75, 0.175 / 125 / 4),
        # More than a decode step cannot be fixed, so the rest is taken for the cost of tokens.
        (((100, 0.2), (200, 0.3)), 0.05, 0.05, (0.225 - 0.05) / 125),
        (((100, 0.2), (200, 0.3)), 0.1, 0.1, 0.001),
        (((100, 0.2), (200, 0.3)), 0.0, 0.1, 0.001),
    ],
)
def test_a_line_is_held_within_reason(
    points: tuple[tuple[int, float], ...], decode_s: float, fixed_s: float, token_s: float
) -> None:
    line = make_budget(*points, decode_s=decode_s)._line()
    assert line == pytest.approx((fixed_s, token_s))


def test_sizes_that_hardly_differ_say_nothing_about_a_line() -> None:
    """The variance of two sizes in the weights 3 : 1 is 3/16 of their difference squared."""
    fixed_s, _ = make_budget((100, 0.1), (102, 0.101))._line()
    assert fixed_s == 0.0, "a variance of 0.75"
    fixed_s, _ = make_budget((100, 0.1), (103, 0.101))._line()
    assert fixed_s > 0.0, "of 1.69"
    # Half of the target and more is fixed: as much again goes into tokens, if not over the target.
    heavy = make_budget((200, 0.35), (400, 0.55), decode_s=0.19)
    assert heavy.chunk(decoding=4, waiting=1, left=MUCH) == pytest.approx(150, abs=1)
    heavier = make_budget((200, 0.75), (400, 0.95), decode_s=0.6)
    assert heavier.chunk(decoding=4, waiting=1, left=MUCH) == pytest.approx(200, abs=1)


def beside_seven(budget: PrefillBudget, *, left: int = MUCH) -> int:
    """What one may prefill in a turn while seven decode."""
    return budget.chunk(decoding=7, waiting=1, left=left)


def measured_budget(*, fixed_s: float, token_s: float, decode_s: float = 0.1) -> PrefillBudget:
    """After enough turns of an engine with these costs, seven requests decoding beside one."""
    budget = PrefillBudget(chunk_max=512, gap_target_s=0.2)
    budget.decoded(seconds=decode_s)
    for number in range(30):
        chunk = beside_seven(budget) + number % 3
        budget.prefilled(seconds=fixed_s + token_s * chunk, tokens=chunk, calls=1)
    return budget


def test_the_chunk_is_what_fits_between_a_decode_step_and_the_gap_target() -> None:
    assert (
        PrefillBudget(chunk_max=512, gap_target_s=0.2).chunk(decoding=0, waiting=8, left=MUCH) == 32
    )
    budget = measured_budget(fixed_s=0.0, token_s=0.0005)
    assert 180 <= beside_seven(budget) <= 200, "(0.2 - 0.1) s at 0.5 ms a token"
    budget = measured_budget(fixed_s=0.04, token_s=0.001)
    assert 50 <= beside_seven(budget) <= 70, "(0.2 - 0.1 - 0.04) s at 1 ms"


def test_a_fixed_cost_that_cannot_be_avoided_is_made_worth_while() -> None:
    budget = measured_budget(fixed_s=0.1, token_s=0.001)
    assert 80 <= beside_seven(budget) <= 110, "as much for tokens as is fixed"


@pytest.mark.parametrize("seed", range(6))
def test_a_growing_context_is_not_mistaken_for_a_fixed_cost(seed: int) -> None:
    """Its tokens cost more and more, and noise tilts the fitted line any way it likes."""
    budget, random = PrefillBudget(chunk_max=512, gap_target_s=0.2), Random(seed)
    budget.decoded(seconds=0.08)
    gaps, done = [], 0
    while done < 4_000:
        chunk = beside_seven(budget)
        took_s = (0.04 + chunk * (0.001 + 2e-6 * done)) * random.uniform(0.8, 1.2)
        budget.prefilled(seconds=took_s, tokens=chunk, calls=1)
        gaps.append(0.08 + took_s)
        done += chunk
    assert max(gaps) < 0.5


def test_a_slow_engine_gets_the_least_chunk_and_a_restarted_one_the_first() -> None:
    budget = measured_budget(fixed_s=0.0, token_s=0.1)
    assert beside_seven(budget) == CHUNK_MIN
    budget.restarted()
    assert beside_seven(budget) == CHUNK_FIRST


def test_while_more_wait_than_decode_prefill_gets_more_time_and_alone_a_second() -> None:
    budget = measured_budget(fixed_s=0.0, token_s=0.002)
    few, many = (budget.chunk(decoding=each, waiting=8 - each, left=MUCH) for each in (7, 1))
    assert 45 <= few <= 52
    assert many == min(4 * budget._largest, 350), "four times the gap, less the decode step"
    assert budget.chunk(decoding=0, waiting=8, left=MUCH) == min(4 * budget._largest, 500)


def test_the_last_of_what_anybody_waits_for_is_prefilled_at_once() -> None:
    budget = measured_budget(fixed_s=0.04, token_s=0.004)
    assert beside_seven(budget) < 20
    assert 45 <= beside_seven(budget, left=45) <= 80


def test_calls_of_the_model_are_not_taken_for_slow_tokens() -> None:
    one, two = (PrefillBudget(chunk_max=512, gap_target_s=0.2) for _ in range(2))
    for budget, calls in ((one, 1), (two, 2)):
        budget.decoded(seconds=0.08)
        for tokens in (32, 8, 16):
            seconds = calls * (0.04 + 0.004 * tokens)
            budget.prefilled(seconds=seconds, tokens=calls * tokens, calls=calls)
    assert beside_seven(one) == beside_seven(two) > 10
