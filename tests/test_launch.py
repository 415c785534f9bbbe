"""From the configuration to the adapters: what is handed on."""

from __future__ import annotations

import pytest
import trio
from support.worker_rig import make_config
from trio.testing import MockClock

from trio_worker import launch
from trio_worker.errors import EngineLost
from trio_worker.protocol.turn import Work
from trio_worker.simulated.engine import SimulatedEngine


async def test_the_simulated_engine_has_the_configured_turn_timeout(
    autojump_clock: MockClock,
) -> None:
    config = make_config("worker.continuous_batching.turn_timeout_ms=2500")
    async with launch._open_engine(config, "simulated", None) as engine:
        assert isinstance(engine, SimulatedEngine)
        await engine.wait_ready()
        engine.hang()
        began_at = trio.current_time()
        with pytest.raises(EngineLost) as lost:
            await engine.begin(Work()).report()
        assert lost.value.reason == "hang"
        assert trio.current_time() - began_at == pytest.approx(2.5)
