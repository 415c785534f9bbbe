"""A budget of restarts, against a plain list of times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_worker.supervisor.restart_budget import RestartBudget

WINDOW_S = 60.0


@given(
    gaps=st.lists(st.sampled_from([0.0, 1.0, 20.0, 30.0, 60.0, 60.5]), max_size=30),
    max_restarts=st.integers(0, 4),
)
def test_a_failure_is_one_too_many_if_the_window_before_it_holds_more_than_may_be(
    gaps: list[float], max_restarts: int
) -> None:
    budget = RestartBudget(max_restarts=max_restarts, window_s=WINDOW_S)
    times: list[float] = []
    now = 100.0
    for gap in gaps:
        now += gap
        times.append(now)
        recent = [at for at in times if at >= now - WINDOW_S]
        assert budget.spend(now) is (len(recent) <= max_restarts)
        assert budget.spent == len(recent)


def test_what_is_given_back_is_the_latest_and_never_more_than_there_was() -> None:
    budget = RestartBudget(max_restarts=2, window_s=WINDOW_S)
    budget.spend(0.0)
    budget.spend(50.0)
    budget.give_back(1)
    assert budget.spend(59.0)
    assert budget.spent == 2
    assert budget.spend(61.0)  # the one at 0.0 has left the window
    budget.give_back(9)
    assert budget.spent == 0
    assert budget.spend(62.0)
