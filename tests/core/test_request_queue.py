"""Who is served next: the order of the queue, and what it passes over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.factories import make_sequence

from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import queue_key

_arrivals = st.lists(
    st.tuples(st.floats(0, 20, allow_nan=False), st.integers(0, 3)), min_size=1, max_size=40
)


@given(_arrivals)
def test_the_queue_serves_as_a_sorted_list_would(arrivals: list[tuple[float, int]]) -> None:
    queue = RequestQueue(max_size=len(arrivals))
    sequences = [
        make_sequence(str(index), level=level, at=at) for index, (at, level) in enumerate(arrivals)
    ]
    for sequence in sequences:
        queue.add(sequence)
    removed = sequences[::3]
    for sequence in removed:
        assert queue.remove(sequence)
        assert not queue.remove(sequence)
    expected = sorted((each for each in sequences if each not in removed), key=lambda s: s.key)
    assert sum(queue.by_level().values()) == len(queue) == len(expected)
    assert [queue.take() for _ in range(len(queue))] == expected


@given(_arrivals, st.floats(0.1, 10))
def test_the_least_urgent_is_overtaken_only_by_arrivals_within_the_bound(
    arrivals: list[tuple[float, int]], aging_s: float
) -> None:
    """The bound is (levels - 1) × aging: the reason why nobody starves."""
    levels = 4
    keys = sorted(
        (queue_key(enqueued_at=at, level=level, aging_s=aging_s, arrival=index), at, level)
        for index, (at, level) in enumerate(arrivals)
    )
    for position, (_, at, level) in enumerate(keys):
        if level == levels - 1:
            for _, earlier_at, _ in keys[:position]:
                assert earlier_at <= at + (levels - 1) * aging_s + 1e-9


def test_without_aging_levels_are_strict() -> None:
    early_low = queue_key(enqueued_at=0, level=2, aging_s=None, arrival=0)
    late_high = queue_key(enqueued_at=1000, level=0, aging_s=None, arrival=1)
    assert late_high < early_low


def test_taking_past_a_more_urgent_one_counts_as_a_promotion() -> None:
    queue = RequestQueue(max_size=4)
    queue.add(make_sequence("old low", level=2, at=0, aging_s=1))
    queue.add(make_sequence("new high", level=0, at=10, aging_s=1))
    assert queue.take().request_id == "old low"
    assert queue.promotions == 1
    queue.take()
    assert queue.promotions == 1


def test_the_queue_passes_over_a_level_only_where_it_is_told_to() -> None:
    queue = RequestQueue(max_size=3)
    assert (queue.first(), queue.first(hold_level=1), queue.by_level()) == (None, None, {})
    with pytest.raises(KeyError, match="nothing to take"):
        queue.take()
    low, medium = make_sequence("low", level=2), make_sequence("medium", level=1)
    with pytest.raises(KeyError, match="nothing to take"):
        queue.take(low)
    queue.add(low)
    assert (queue.first(hold_level=2), queue.first(hold_level=1)) == (None, low)
    queue.add(medium)
    assert (queue.first(), queue.first(hold_level=1), queue.first(hold_level=2)) == (
        *(medium, low, medium),
    )
    assert queue.by_level() == {2: 1, 1: 1}
    assert (queue.ahead_of(low), queue.ahead_of(medium)) == (1, 0)
    assert queue.take(low) is low
    assert (queue.promotions, queue.by_level()) == (1, {1: 1})
    assert queue.take() is medium
    assert (queue.promotions, queue.by_level()) == (1, {})


def test_two_with_one_key_are_a_fault_and_so_is_one_too_many() -> None:
    queue = RequestQueue(max_size=1)
    first = make_sequence("a")
    queue.add(first)
    with pytest.raises(AssertionError, match="more than 1 requests"):
        queue.add(make_sequence("b"))
    twin = make_sequence("twin")
    twin.key = first.key
    assert twin not in queue
    assert queue.remove(twin) is False
    assert queue.remove(first) is True
    queue.add(first)
    queue.max_size = 2
    with pytest.raises(AssertionError, match="two sequences with one key"):
        queue.add(twin)
