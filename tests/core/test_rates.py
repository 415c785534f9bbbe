"""What is estimated from what has been measured."""

from __future__ import annotations

from trio_worker.core.rates import ServiceRate


def test_nothing_is_estimated_before_eight_completions_and_within_bounds_after() -> None:
    rate = ServiceRate()
    for _ in range(7):
        rate.record(4.0)
        assert rate.retry_after_ms(waiting=100, slots=1) == 1000
    rate.record(4.0)
    assert rate.retry_after_ms(waiting=0, slots=8) == 500
    assert rate.retry_after_ms(waiting=100_000, slots=1) == 60_000
    for _ in range(64):
        rate.record(0.0001)
    assert rate.retry_after_ms(waiting=0, slots=8) == 50
