"""Where the event loop's thread was while it was blocked."""

from __future__ import annotations

import time

from trio_worker.monitoring.stack_sampler import open_stack_sampler


def test_a_sampler_that_is_disarmed_in_time_has_nothing_to_say() -> None:
    with open_stack_sampler() as sampler:
        assert sampler is not None
        sampler.arm(60)
        assert sampler.disarm() is None
        sampler.arm(0.05)
        time.sleep(0.5)
        stack = sampler.disarm()
        assert stack is not None
        assert "test_a_sampler_that_is_disarmed" in stack.splitlines()[0]
        assert sampler.disarm() is None
