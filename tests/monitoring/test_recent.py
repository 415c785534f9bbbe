"""What is computed again, and when."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from trio_worker.monitoring.recent import FRESH_S, Recent


async def test_each_question_has_its_answer_kept_for_as_long_as_it_is_fresh(
    autojump_clock: MockClock,
) -> None:
    recent, computed = Recent[int](), list[str]()

    def compute() -> int:
        computed.append("again")
        return len(computed)

    def ask(of: str) -> int:
        return recent.get(compute, of=of)

    assert [ask("a"), ask("b"), ask("a")] == [1, 2, 1]
    await trio.sleep(FRESH_S)
    assert ask("a") == 1
    await trio.sleep(0.001)
    assert [ask("b"), ask("a"), ask("b")] == [3, 4, 3]


async def test_what_failed_is_computed_again(autojump_clock: MockClock) -> None:
    recent = Recent[float]()
    with pytest.raises(ZeroDivisionError):
        recent.get(lambda: 1 / 0)
    assert recent.get(lambda: 1.0) == 1.0
