"""The simulated engine keeps the same contract as the real one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
from support.engine_conformance import CHECKS, ENDS, Harm, Open
from support.engine_form_conformance import FORM_CHECKS
from trio.testing import MockClock

from trio_worker.config import SimulatedConfig
from trio_worker.errors import EngineLost
from trio_worker.ports import Engine
from trio_worker.protocol.turn import Work
from trio_worker.simulated.engine import SimulatedEngine, open_simulated_engine


@pytest.mark.parametrize("check", [*CHECKS, *FORM_CHECKS], ids=lambda check: check.__name__)
async def test_it_conforms(
    check: Callable[[Engine], Awaitable[None]], autojump_clock: MockClock
) -> None:
    async with open_simulated_engine(SimulatedConfig()) as engine:
        await engine.wait_ready()
        await check(engine)


def harm_of(name: str) -> Callable[[Engine], None]:
    def harm(engine: Engine) -> None:
        assert isinstance(engine, SimulatedEngine)
        getattr(engine, name)()

    return harm


@pytest.mark.parametrize("check", ENDS, ids=lambda check: check.__name__)
async def test_its_ends_conform(
    check: Callable[[Open, Harm], Awaitable[None]], autojump_clock: MockClock
) -> None:
    def open_engine(max_restarts: int) -> AbstractAsyncContextManager[Engine]:
        return open_simulated_engine(
            SimulatedConfig(), max_restarts=max_restarts, turn_timeout_s=1.0
        )

    await check(open_engine, Harm(crash=harm_of("crash"), hang=harm_of("hang")))


async def test_a_crash_in_a_turn_is_told_at_once_and_repaired(autojump_clock: MockClock) -> None:
    async with open_simulated_engine(SimulatedConfig(turn_ms=1000), restart_s=2.0) as engine:
        await engine.wait_ready()

        async def crash() -> None:
            await trio.sleep(0.3)
            engine.crash()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash)
            with pytest.raises(EngineLost):
                await engine.begin(Work()).report()
            assert trio.current_time() == pytest.approx(0.3)
        with pytest.raises(EngineLost):
            await engine.begin(Work()).report()
        await engine.wait_ready()
        assert trio.current_time() == pytest.approx(2.3)
        assert engine.statistics().restarts == 1


async def test_a_turn_takes_its_time(autojump_clock: MockClock) -> None:
    async with open_simulated_engine(SimulatedConfig(), load_s=3.0) as engine:
        assert engine.statistics().state == "loading"
        info = await engine.wait_ready()
        assert trio.current_time() == pytest.approx(3.0)
        assert info.model == "simulated"
        await engine.begin(Work()).report()
        assert trio.current_time() == pytest.approx(3.02)
