"""The engine port over a process: its ends, its budget, and what is left of it. No model is needed.

The process is `support/scripted_engine.py`; `test_engine_process_mlx.py` has the real one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from support.engine_conformance import CHECKS, ENDS, PATIENCE_S, Harm, request
from support.engine_form_conformance import FORM_CHECKS
from support.engine_rig import (
    ENDED_S,
    LOADED_S,
    assert_nothing_is_left,
    children,
    kill,
    opened,
    stop,
    until,
)
from support.paths import PACKAGE
from support.scripted_engine import SCRIPTED

from trio_worker.errors import ConfigError, EngineLost, WorkerFault
from trio_worker.protocol.turn import Work
from trio_worker.supervisor import load_patience

pytestmark = pytest.mark.process


def scripted(model: Path, **settings: Any) -> AbstractAsyncContextManager[Any]:
    return opened(str(model), program=SCRIPTED, **settings)


@pytest.fixture(name="model")
def model_fixture(tmp_path: Path) -> Path:
    """Whatever exists is a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


async def test_a_process_keeps_the_contract_of_the_port(model: Path) -> None:
    fds = psutil.Process().num_fds()
    async with scripted(model) as engine:
        assert engine.statistics().state == "loading"
        assert (await engine.wait_ready()).model == "model"
        for check in (*CHECKS, *FORM_CHECKS):
            await check(engine)
        assert engine.statistics().restarts == 0
    assert engine.statistics().state == "stopped"
    await assert_nothing_is_left(fds)


async def test_the_engine_is_told_whether_to_tell_of_tools_in_general_words(model: Path) -> None:
    async with scripted(model) as quiet, scripted(model, general_tool_prompt=True) as telling:
        told = [each._settings.hello.general_tool_prompt for each in (quiet, telling)]
    assert told == [False, True]


@pytest.mark.parametrize("check", ENDS, ids=lambda check: check.__name__)
async def test_the_ends_of_the_engine_process_conform(model: Path, check: Any) -> None:
    def open_engine(max_restarts: int) -> Any:
        return scripted(model, max_restarts=max_restarts, turn_timeout_s=1.0, prewarm=False)

    await check(open_engine, Harm(crash=kill, hang=stop))
    assert children() == []


# --- deaths ---------------------------------------------------------------------------------


async def test_a_stopped_engine_is_noticed_within_the_turn_timeout_and_replaced(
    model: Path,
) -> None:
    """Both lines notice, also when who asked has given up."""
    async with scripted(model, turn_timeout_s=0.5) as engine:
        await engine.wait_ready()
        stop(engine)
        late = "no answer within 0.5 s"
        with trio.fail_after(PATIENCE_S), pytest.raises(EngineLost, match=late) as lost:
            await engine.begin(Work()).report()
        assert lost.value.reason == "hang"
        await engine.wait_ready()
        stop(engine)
        with trio.move_on_after(0.1):
            await engine.tokenise(request("hello"))
        with trio.fail_after(PATIENCE_S):
            await until(lambda: engine.statistics().state != "ready")
        await engine.wait_ready()
        assert engine.statistics().restarts == 2
        assert engine.statistics().restarts_by_reason == {"hang": 2}


async def test_deaths_beyond_the_budget_end_the_worker(model: Path) -> None:
    with pytest.raises(WorkerFault) as raised:
        async with scripted(model, max_restarts=0) as engine:
            await engine.wait_ready()
            kill(engine)
            await trio.sleep_forever()
    fault = raised.value
    assert "SIGKILL" in str(fault)
    assert children() == []


async def test_an_engine_that_hangs_while_it_loads_again_is_noticed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by `python -m chaos seed=200`: the worker waited for it until it was stopped."""
    monkeypatch.setattr(load_patience, "RELOAD_LEAST_S", 1.0)
    async with scripted(model) as engine:
        await engine.wait_ready()
        first = engine.statistics().pid
        kill(engine)
        await until(lambda: engine.statistics().pid not in {first, None})
        stop(engine)
        await engine.wait_ready()
        assert engine.statistics().restarts_by_reason == {"crash": 1, "load": 1}


async def test_an_engine_that_hangs_in_its_first_load_is_noticed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its silence, however long a load may take: each step and each megabyte breaks it."""
    monkeypatch.setattr(load_patience, "FIRST_SILENCE_S", 0.0)
    async with scripted(model) as engine:
        await until(lambda: engine.statistics().restarts_by_reason == {"load": 1})
        monkeypatch.setattr(load_patience, "FIRST_SILENCE_S", LOADED_S)
        await engine.wait_ready()


async def test_a_model_that_never_loads_ends_the_worker_however_long_each_try_takes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries that last longer than the window of the budget would never spend it."""
    monkeypatch.setattr(load_patience, "FIRST_SILENCE_S", 0.0)
    with pytest.raises(WorkerFault) as raised:
        async with scripted(model, max_restarts=2, restart_window_s=0.0):
            await trio.sleep_forever()
    fault = raised.value
    assert "the engine failed to load 3 times in a row" in str(fault)
    assert "it did not load within 0 s" in str(fault)


async def test_a_model_that_was_good_before_may_come_back(tmp_path: Path, model: Path) -> None:
    """Wherever it had gone: the worker ends with 78 for what never was a model only."""
    async with scripted(model, max_restarts=1000) as engine:
        await engine.wait_ready()
        model.rename(tmp_path / "away")
        kill(engine)
        await until(lambda: engine.statistics().restarts_by_reason.get("load", 0) == 1)
        (tmp_path / "away").rename(model)
        await engine.wait_ready()
        assert engine.statistics().restarts_by_reason["crash"] == 1


async def test_a_model_that_was_good_before_and_does_not_come_back_is_no_configuration_error(
    tmp_path: Path, model: Path
) -> None:
    with pytest.raises(WorkerFault) as raised:
        async with scripted(model, max_restarts=1) as engine:
            await engine.wait_ready()
            model.rename(tmp_path / "away")
            kill(engine)
            await trio.sleep_forever()
    fault = raised.value
    assert "the engine ended 2 times within 60 s" in str(fault)
    assert f"the model cannot be loaded again: there is no folder '{model}'" in str(fault)


async def test_a_crash_while_loading_counts(model: Path) -> None:
    with pytest.raises(WorkerFault):
        async with scripted(model, max_restarts=1) as engine:
            for _ in range(2):
                await until(lambda: engine.statistics().pid is not None)
                pid = engine.statistics().pid
                kill(engine)
                await until(lambda pid=pid: engine.statistics().pid != pid)  # type: ignore[misc]
            await trio.sleep_forever()


async def test_an_engine_that_does_not_come_out_of_prewarming_is_noticed(model: Path) -> None:
    with pytest.raises(WorkerFault) as raised:
        async with scripted(
            model,
            max_restarts=0,
            turn_timeout_s=0.005,
            prewarm_max_tokens=10**6,
        ) as engine:
            await engine.wait_ready()
    fault = raised.value
    assert "did not prewarm within 0.05 s" in str(fault)


async def test_a_model_that_cannot_be_loaded_is_a_mistake_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        async with scripted(tmp_path / "nowhere") as engine:
            await engine.wait_ready()
    assert children() == []


async def test_what_the_engine_said_before_it_ended_is_heard(tmp_path: Path) -> None:
    """Also where a busy event loop notices both at once, in whatever order."""

    heard: list[object] = []
    for tries in range(1, 5):
        with pytest.raises(ConfigError, match="there is no folder"):
            async with scripted(
                tmp_path / "nowhere", max_restarts=0, on_progress=lambda *step: heard.append(step)
            ):
                await until(lambda tries=tries: len(heard) == tries)  # type: ignore[misc]
                time.sleep(0.2)  # noqa: ASYNC251 - nobody hears anything meanwhile
                await trio.sleep_forever()


# --- leaving --------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
async def test_leaving_while_loading_leaves_no_process(model: Path, stopped: Any) -> None:
    fds = psutil.Process().num_fds()
    async with scripted(model) as engine:
        await until(lambda: engine.statistics().pid is not None)
        if stopped:
            stop(engine)
        start = trio.current_time()
    assert trio.current_time() - start < ENDED_S
    await assert_nothing_is_left(fds)


# --- what is imported -----------------------------------------------------------------------


def test_the_worker_side_imports_neither_mlx_nor_transformers() -> None:
    program = (
        "import sys, trio_worker.supervisor.engine_process\n"
        "print([m for m in ('mlx', 'mlx_lm', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


def test_the_engine_side_imports_nothing_of_ours_that_knows_the_worker() -> None:
    package = PACKAGE / "engine"
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] not in {"trio", "loguru"}
                if name.startswith("trio_worker"):
                    assert name.split(".")[1] in {
                        *("engine", "errors", "grammar", "markup", "protocol")
                    }


def test_the_engine_folder_is_the_only_one_that_names_mlx() -> None:
    package = PACKAGE
    for file in package.rglob("*.py"):
        if "engine" not in file.relative_to(package).parts:
            lines = file.read_text().splitlines()
            assert not any(line.lstrip().startswith(("import mlx", "from mlx")) for line in lines)
