"""When an engine has computed enough, and on what."""

from __future__ import annotations

from trio_worker.core.engine_age import EngineAge


def test_an_engine_on_metal_is_old_at_the_token_that_is_the_last() -> None:
    age = EngineAge(most_tokens=10)
    age.decoded(9)
    assert not age.is_over("metal")
    age.decoded(1)
    assert age.is_over("metal")
    assert age.tokens == 10
    assert not age.is_over("cpu")
    assert not age.is_over(None)
    age.restarted()
    assert not age.is_over("metal")
