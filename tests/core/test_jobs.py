"""Which jobs are asked for, and what becomes of one that was not answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.core import jobs
from trio_worker.core.priority import NAMES
from trio_worker.core.request import SEED_END
from trio_worker.errors import BY_CODE, ResourceLimitExceeded


def test_of_eight_rounds_one_begins_with_each_of_the_lower_levels() -> None:
    rounds = jobs.Rounds()
    orders = [rounds.next() for _ in range(800)]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    for start in range(800 - jobs.ROUND):
        first = [order[0] for order in orders[start : start + jobs.ROUND]]
        assert (first.count("high"), first.count("medium"), first.count("low")) == (6, 1, 1)


@given(slots=st.integers(1, 64), in_flight=st.integers(0, 200), beside=st.integers(0, 64))
def test_no_more_is_asked_for_than_would_begin(slots: int, in_flight: int, beside: int) -> None:
    free = jobs.free_slots(slots=slots, in_flight=in_flight, beside=beside)
    assert free >= 0
    assert free == 0 or free + in_flight + beside == slots


def test_the_freest_worker_is_served_first() -> None:
    found = [jobs.pull_priority(has) for has in range(20)]
    assert found == sorted(found)
    assert found[:10] == list(range(10))
    assert set(found[10:]) == {9}


@given(st.text())
def test_a_seed_hangs_on_the_id_alone(request_id: str) -> None:
    seed = jobs.seed_of(request_id)
    assert 0 <= seed < SEED_END
    assert seed == jobs.seed_of(request_id)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_is_an_answer_or_is_not(code: str) -> None:
    error = BY_CODE[code]("what happened")
    expected = {
        "QUEUE_FULL": (True, False),
        "RESOURCE_LIMIT_EXCEEDED": (True, False),
        "DUPLICATE_REQUEST": (True, False),
        "WORKER_DRAINING": (False, True),
        "INTERNAL": (False, True),
    }.get(code, (False, False))
    assert (jobs.is_for_later(error), jobs.is_no_answer(error)) == expected


def test_a_job_that_can_never_fit_is_answered() -> None:
    error = ResourceLimitExceeded("too large", retryable=False)
    assert not jobs.is_for_later(error)
    assert not jobs.is_no_answer(error)
