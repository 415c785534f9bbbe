"""Starting `trio-worker gateway` as a person does, and asking it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from support.commands import THIS_TREE, clean_environment, until

GATEWAY_ADDRESS = re.compile(r"OpenAI's API on (http://\S+)/v1")
QUESTION = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3}


async def address_in(log: Path, *, count: int = 1) -> str:
    """Where the gateway is, once the log has said so for the `count`th time."""

    async def is_said() -> bool:
        return len(GATEWAY_ADDRESS.findall(log.read_text())) >= count

    await until(is_said, within_s=30)
    return str(GATEWAY_ADDRESS.findall(log.read_text())[-1])


@asynccontextmanager
async def running_gateway(
    tmp_path: Path, url: str, *args: str
) -> AsyncIterator[tuple[trio.Process, Path]]:
    """`trio-worker gateway` on a free port; it ends with the block, and its status must be 0."""
    log = tmp_path / "gateway.log"
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            [*THIS_TREE, "gateway", "--url", url, "--port", "0", "--log-format", "human", *args],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=clean_environment(),
        )
    try:
        yield process, log
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with trio.fail_after(20):
            assert await process.wait() == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            with trio.move_on_after(5, shield=True):
                await process.wait()


async def ask(address: str, **fields: object) -> tuple[int, Any]:
    """The status and the body of a chat completion."""
    return await trio.to_thread.run_sync(_ask, address, {**QUESTION, **fields})


def _ask(address: str, fields: dict[str, object]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(fields).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
