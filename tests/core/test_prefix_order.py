"""The order in which workers are asked for a prompt: alike for all, and stable."""

from __future__ import annotations

import random
from collections import Counter

from trio_worker.core.prefix_order import PrefixKeys, digest, in_order

WORKERS = [f"w{number}" for number in range(8)]


def keys(system: int, conversation: int) -> PrefixKeys:
    return PrefixKeys(
        system=digest(b"system", b"%d" % system),
        conversation=digest(b"conversation", b"%d" % conversation),
    )


def test_all_compute_the_same_order_from_whatever_they_know_it_in() -> None:
    for number in range(50):
        shuffled = random.Random(number).sample(WORKERS, len(WORKERS))
        assert in_order(keys(1, number), shuffled) == in_order(keys(1, number), WORKERS)
        assert sorted(in_order(keys(1, number), WORKERS)) == WORKERS


def test_conversations_of_one_system_prompt_share_two_workers_evenly() -> None:
    orders = [in_order(keys(1, number), WORKERS) for number in range(200)]
    firsts = Counter(order[0] for order in orders)
    assert len(firsts) == 2
    assert all(70 <= count <= 130 for count in firsts.values())
    assert {frozenset(order[:2]) for order in orders} == {frozenset(firsts)}
    assert len({tuple(order[2:]) for order in orders}) == 1


def test_system_prompts_are_spread_over_all() -> None:
    firsts = Counter(in_order(keys(number, number), WORKERS)[0] for number in range(800))
    assert set(firsts) == set(WORKERS)
    assert all(60 <= count <= 140 for count in firsts.values())


def test_one_that_goes_moves_only_what_was_its_own() -> None:
    left = [worker for worker in WORKERS if worker != "w3"]
    for number in range(200):
        before = in_order(keys(number, number), WORKERS)
        after = in_order(keys(number, number), left)
        if "w3" not in before[:2]:
            assert after[:2] == before[:2]
        else:
            (stayed,) = set(before[:2]) - {"w3"}
            assert stayed in after[:2]


def test_a_digest_tells_parts_apart() -> None:
    found = {digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"abc", b"")}
    assert len(found) == 4


def test_without_workers_there_is_no_order() -> None:
    assert in_order(keys(1, 1), []) == []
