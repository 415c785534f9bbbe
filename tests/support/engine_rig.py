"""An engine in a process of its own: opened, asked, killed, and looked for afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psutil
import trio

from support.engine_conformance import request
from trio_worker.protocol.prompt import Message
from trio_worker.supervisor.engine_process import open_engine

LOADED_S = 60.0
ENDED_S = 1.0
"""Leaving must take no longer, whatever the child does."""


@asynccontextmanager
async def opened(model: Any, **settings: Any) -> Any:
    arguments = {
        "model_name": None,
        "max_batch_size": 8,
        "turn_timeout_s": 30.0,
        "max_restarts": 3,
        "restart_window_s": 60.0,
        "prewarm": True,
        "prewarm_prompt": "Hello",
        "prewarm_max_tokens": 1,
        "prefix_cache_bytes": 0,
    }
    with trio.fail_after(LOADED_S):
        async with open_engine(model=model, **(arguments | settings)) as engine:
            yield engine


async def until(condition: Callable[[], bool]) -> None:
    """The engine tells nobody of these, and no worker needs to know."""
    with trio.fail_after(LOADED_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.002)


def is_engine(command: list[str]) -> bool:
    return any("trio_worker.engine" in each or "scripted_engine" in each for each in command)


def children() -> Any:
    """Engines of this process that run, and processes that nobody has reaped."""
    return [
        each
        for each in psutil.Process().children(recursive=True)
        if each.status() == psutil.STATUS_ZOMBIE or is_engine(each.cmdline())
    ]


async def assert_nothing_is_left(fds: Any) -> None:
    assert children() == []
    # Trio's own cached threads are no business of this test.
    await until(lambda: psutil.Process().num_fds() <= fds)


def kill(engine: Any) -> None:
    os.kill(engine.statistics().pid, signal.SIGKILL)


def stop(engine: Any) -> None:
    """Let it do nothing more. The signal alone returns while threads of it still run."""
    pid = engine.statistics().pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def chat(*messages: Any) -> Any:
    return replace(
        request(""),
        prompt=None,
        messages=tuple(Message(role=role, content=content) for role, content in messages),
    )
