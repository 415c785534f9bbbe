"""What the simulated engine keeps of prompts: whole, bounded, and each beginning once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_worker.simulated.batch import SHORTEST_PREFIX, KeptCaches

HEAD = tuple(range(1, 41))


def test_what_goes_on_takes_the_place_of_its_beginning() -> None:
    kept = KeptCaches(limit_tokens=200)
    kept.keep(HEAD)
    kept.keep((*HEAD, 7, 8))
    assert kept.tokens == len(HEAD) + 2
    assert kept.find((*HEAD, 7, 8, 9)) == len(HEAD) + 2


def test_a_beginning_of_what_is_kept_is_not_kept_beside_it() -> None:
    kept = KeptCaches(limit_tokens=200)
    kept.keep((*HEAD, 7, 8))
    kept.keep(HEAD)
    assert kept.tokens == len(HEAD) + 2
    assert kept.find((*HEAD, 9)) == len(HEAD)


def test_what_goes_on_otherwise_is_kept_too_until_there_is_no_room() -> None:
    kept = KeptCaches(limit_tokens=90)
    kept.keep((*HEAD, 7))
    kept.keep((*HEAD, 8))
    assert kept.tokens == 2 * len(HEAD) + 2
    assert kept.find((*HEAD, 7, 1)) == len(HEAD) + 1
    kept.keep((*HEAD, 9))
    assert kept.find((*HEAD, 8, 1)) == len(HEAD), "the least recently used went first"
    assert kept.find((*HEAD, 7, 1)) == len(HEAD) + 1


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple)


@given(kept_tokens=tokens, wanted=tokens)
def test_what_is_found_is_what_both_begin_with(
    kept_tokens: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    kept = KeptCaches(limit_tokens=100)
    kept.keep(kept_tokens)
    alike = 0
    for one, other in zip(kept_tokens, wanted[:-1], strict=False):
        if one != other:
            break
        alike += 1
    is_kept = len(kept_tokens) >= SHORTEST_PREFIX
    assert kept.find(wanted) == (alike if is_kept and alike >= SHORTEST_PREFIX else 0)
