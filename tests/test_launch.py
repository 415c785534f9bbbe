"""From the configuration to the adapters: what is handed on."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from unittest import mock

import pytest
import trio
from support.worker_rig import make_config
from trio.testing import MockClock

from trio_worker import launch
from trio_worker.errors import EngineLost
from trio_worker.nats.embedded_server import default_store
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


@pytest.mark.parametrize(("tools", "is_told"), [("auto", False), ("prompt", True), ("off", False)])
def test_whether_the_engine_is_to_tell_of_tools_in_general_words_is_handed_on(
    tools: str, *, is_told: bool
) -> None:
    with mock.patch.object(launch, "open_engine") as opened:
        launch._open_engine(make_config(f"worker.tools={tools}"), "mlx", None)
    assert opened.call_args.kwargs["general_tool_prompt"] is is_told


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_when_the_worker_is_ready_is_not_looked_at_again() -> None:
    """And what was garbage by then is gone, as is what becomes it later."""
    thresholds = gc.get_threshold()
    before = weakref.ref(_Cycle())
    try:
        launch.settle_garbage_collection()
        assert before() is None
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
        assert gc.get_threshold() == (launch.COLLECT_EVERY, *thresholds[1:])
        after = weakref.ref(_Cycle())
        gc.collect()
        assert after() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["nats.jetstream.store_dir=/x"], None),
        (["nats.jetstream.enabled=true", "nats.jetstream.store_dir=/x"], Path("/x")),
        (["nats.jetstream.enabled=true", "nats.jetstream.store_dir=~/x"], Path.home() / "x"),
        (["nats.jetstream.enabled=true"], default_store("nats://127.0.0.1:4222")),
    ],
)
def test_an_embedded_server_keeps_streams_where_they_are_wanted(
    overrides: list[str], expected: Path | None
) -> None:
    assert launch._store_of(make_config(*overrides).nats) == expected
