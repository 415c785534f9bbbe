"""Whether a request stays, or where it goes: the choice, and that no request goes on for ever."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.core.hand_on import HOPS_MAX, Asking, Place, next_hop


def place(name: str, in_flight: int = 0, slots: int = 2, *, accepting: bool = True) -> Place:
    return Place(id=name, slots=slots, in_flight=in_flight, accepting=accepting)


def ranks(order: Iterable[str]) -> dict[str, int]:
    return {name: rank for rank, name in enumerate(order)}


def hop(
    own: Place,
    *others: Place,
    order: str = "abcdef",
    home: bool = True,
    route: str = "",
    rows: int = 1,
    may_keep: bool = True,
) -> str | None:
    asking = Asking(rows=rows, rank=ranks(order), has_home=home, route=list(route))
    return next_hop(asking, own, others, may_keep=may_keep)


# --- while somebody has a slot ----------------------------------------------------------------


def test_it_goes_to_the_first_in_the_order_that_has_a_slot() -> None:
    assert hop(place("b"), place("a")) == "a"
    assert hop(place("b"), place("a", 1)) == "a"
    assert hop(place("b"), place("a", 2)) is None
    assert hop(place("b", 2), place("a", 2), place("c", 1), place("d")) == "c"
    assert hop(place("a"), place("b")) is None


def test_a_short_prompt_stays_where_there_is_a_slot_and_goes_where_most_is_free() -> None:
    assert hop(place("b"), place("a"), home=False) is None
    assert hop(place("b", 2), place("a", 1), place("c"), home=False) == "c"
    assert hop(place("b", 2), place("c"), place("a"), home=False) == "a"
    assert hop(place("b", 2), place("a", 1), place("c", 1, slots=4), home=False) == "c"


def test_one_that_does_not_accept_has_no_slot() -> None:
    """Its memory is critical, or its engine is starting again."""
    assert hop(place("b"), place("a", accepting=False)) is None
    assert hop(place("b", accepting=False), place("c"), home=False) == "c"


def test_several_choices_need_as_many_slots_or_all_there_are() -> None:
    assert hop(place("b"), place("a", 1), rows=2) is None
    assert hop(place("b", 1), place("a"), rows=2) == "a"
    assert hop(place("b", 1), place("a"), rows=3) == "a"


# --- while nobody has a slot ------------------------------------------------------------------


def test_it_waits_where_the_least_waits() -> None:
    assert hop(place("b", 3), place("a", 3)) is None
    assert hop(place("b", 4), place("a", 3), place("c", 2)) == "c"
    assert hop(place("b", 4), place("c", 5, slots=4), place("a", 3)) == "c"
    assert hop(place("b", 3), place("a", 2, slots=2), home=False) == "a"


def test_one_that_is_overfull_sends_to_one_that_is_not_and_none_to_it() -> None:
    assert hop(place("b", 3, accepting=False), place("a", 9)) == "a"
    assert hop(place("b", 9), place("a", 3, accepting=False)) is None


# --- who cannot keep it ------------------------------------------------------------------------


def test_who_cannot_keep_it_asks_whoever_may_have_room() -> None:
    assert hop(place("a"), place("b"), may_keep=False) == "b"
    assert hop(place("a", 3), place("b", 9), place("c", 3, accepting=False), may_keep=False) == "b"
    # Also one that says that it is full: that is old news.
    assert hop(place("a", 3), place("b", 3, accepting=False), may_keep=False) == "b"
    assert hop(place("a", 3), may_keep=False) is None


# --- the route -----------------------------------------------------------------------------------


def test_it_does_not_go_back_while_there_are_others() -> None:
    assert hop(place("b", 2), place("a", 1), place("c", 1), route="a") == "c"


def test_after_a_round_it_goes_back_to_a_slot_and_stays() -> None:
    assert hop(place("b", 2), place("a", 1), route="a") == "a"
    assert hop(place("a", 1), place("b", 2), route="ab") is None
    assert hop(place("a", 9), place("b"), route="ab") is None
    # To wait, it does not go back.
    assert hop(place("b", 9), place("a", 3), route="a") is None


def test_who_cannot_keep_it_asks_again_only_one_that_accepts_and_once() -> None:
    assert hop(place("b", 3), place("a", 3), route="a", may_keep=False) == "a"
    assert hop(place("b", 3), place("a", 3, accepting=False), route="a", may_keep=False) is None
    assert hop(place("b", 3), place("a", 3), route="aba", may_keep=False) is None


def test_a_route_has_an_end() -> None:
    many = [place(f"x{number}") for number in range(HOPS_MAX + 5)]
    order = [each.id for each in many]
    for length in (HOPS_MAX - 1, HOPS_MAX):
        asking = Asking(rows=1, rank=ranks(["me", *order]), has_home=True, route=order[:length])
        found = next_hop(asking, place("me"), many, may_keep=False)
        assert (found is None) is (length == HOPS_MAX)


PLACES = st.builds(
    Place,
    id=st.just(""),
    slots=st.integers(1, 4),
    in_flight=st.integers(0, 8),
    accepting=st.booleans(),
)


@given(
    st.lists(PLACES, min_size=1, max_size=5),
    st.booleans(),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_whatever_they_believe_it_comes_to_an_end(
    places: list[Place],
    home: bool,  # noqa: FBT001
    rows: int,
    rng: Random,
) -> None:
    """Beliefs change at each hop, also into nonsense; each passes a request on at most twice."""
    names = [f"w{number}" for number in range(len(places))]
    at, route = names[0], list[str]()
    while True:
        asking = Asking(rows=rows, rank=ranks(names), has_home=home, route=route)
        believed = {
            name: Place(
                id=name,
                slots=each.slots,
                in_flight=rng.randint(0, 8),
                accepting=rng.random() < 0.7,
            )
            for name, each in zip(names, places, strict=True)
        }
        others = [each for name, each in believed.items() if name != at]
        target = next_hop(
            asking,
            believed[at],
            others,
            may_keep=rng.random() < 0.5,
        )
        if target is None:
            break
        assert target != at
        route.append(at)
        at = target
    assert all(route.count(name) <= 2 for name in names)


@pytest.mark.parametrize("count", range(1, 6))
def test_who_is_refused_has_been_to_all_that_accept(count: int) -> None:
    """Nobody can keep it, though all say that they can."""
    names = [f"w{number}" for number in range(count)]
    at, route = names[-1], list[str]()
    while True:
        asking = Asking(rows=1, rank=ranks(names), has_home=True, route=route)
        others = [place(name, 9) for name in names if name != at]
        target = next_hop(asking, place(at, 9), others, may_keep=False)
        if target is None:
            break
        route.append(at)
        at = target
    assert {*route, at} == set(names)
