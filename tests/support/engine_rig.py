"""A real engine process, opened and asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from support.engine_conformance import (
    request,
)
from trio_worker.core.request import ChatMessage
from trio_worker.supervisor.engine_process import open_engine

LOADED_S = 60.0


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


async def let_others_run() -> None:
    await trio.lowlevel.checkpoint()


async def until(condition: Callable[[], bool]) -> None:
    """The engine tells nobody of these, and no worker needs to know."""
    with trio.fail_after(LOADED_S):
        while not condition():
            await let_others_run()


def chat(*messages: Any) -> Any:
    return replace(
        request(""),
        prompt=None,
        messages=tuple(ChatMessage(role=role, content=content) for role, content in messages),
    )
