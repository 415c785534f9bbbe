"""What is measured with in processes of their own: programs that talk in lines of JSON."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from trio_worker.errors import WorkerFault
from trio_worker.exception_groups import sole_exceptions


class Program:
    """One that runs. Its state: the bytes that have come and are no line yet."""

    def __init__(self, name: str, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._name = name
        self._questions = process.stdin
        self._answers = process.stdout
        self._received = b""

    async def write(self, value: object) -> None:
        await self._questions.send_all(json.dumps(value).encode() + b"\n")

    async def read(self) -> Any:
        """What it says next. Raises `WorkerFault` if it has ended."""
        while b"\n" not in self._received:
            data = await self._answers.receive_some()
            if not data:
                raise WorkerFault(f"{self._name} ended before it had answered")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


@asynccontextmanager
async def open_program(module: str, *args: str, says_errors: bool = True) -> AsyncIterator[Program]:
    """Start a module of ours; when the block is left, its input ends, and it is waited for.

    Cancelled, it is killed. What it says on standard error is shown or dropped.
    """
    command: Sequence[str] = (sys.executable, "-P", "-m", module, *args)
    with sole_exceptions():
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(
                    trio.run_process,
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=None if says_errors else subprocess.DEVNULL,
                    check=False,
                )
            )
            yield Program(module, process)
            await process.stdin.aclose()


def free_port() -> int:
    """On the loopback address, where nobody listens yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
