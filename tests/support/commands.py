"""Starting `trio-worker` as a person does, and watching what it says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from support.ports import free_port
from trio_worker.__main__ import main

START_S = 60
KILLED_S = 2.0
THIS_TREE = (sys.executable, "-m", "trio_worker")


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("TRIO_WORKER__")}


async def command(
    *args: str, env: Mapping[str, str] | None = None, timeout_s: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run `trio-worker` to its end."""
    with trio.fail_after(timeout_s):
        return await trio.run_process(
            [sys.executable, "-m", "trio_worker", *args],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**clean_environment(), **(env or {})},
        )


def command_here(*args: str) -> int:
    """`trio-worker` in this process, where another one would show nothing more; its exit status.

    Not for what runs a loop or sets up logging. The caller looks at `capsys`.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name in os.environ.keys() - clean_environment().keys():
            environment.delenv(name)
        return main(list(args))


@dataclass
class RunningCommand:
    process: trio.Process
    url: str
    monitoring: str
    log: Path

    async def get(self, path: str) -> tuple[int, str]:
        """A page of the monitoring address; (0, "") while nobody listens."""
        return await trio.to_thread.run_sync(_get, self.monitoring + path)

    async def stats(self) -> Any:
        return json.loads((await self.get("/stats"))[1])

    async def wait_ready(self, *, ready: bool = True) -> None:
        async def as_wanted() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return ((await self.get("/readyz"))[0] == 200) is ready

        await until(as_wanted, within_s=START_S)

    async def until_stats(self, condition: Callable[[Any], bool], *, within_s: float) -> None:
        async def holds() -> bool:
            return condition(await self.stats())

        await until(holds, within_s=within_s)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, part: str) -> psutil.Process:
        """The one child process that is the program `part`, or was started with that argument."""
        (found,) = [
            each
            for each in self.children()
            if part in each.cmdline() or each.cmdline()[0].endswith(part)
        ]
        return found

    async def wait_exit(self, timeout_s: float) -> int:
        with trio.fail_after(timeout_s):
            return await self.process.wait()


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float) -> None:
    """Wait for something in another process, which nothing tells us about."""
    with trio.fail_after(within_s):
        while not await condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that waits to be reaped by the system does not."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [each for each in processes if runs(each)]


async def until_gone(processes: list[psutil.Process]) -> None:
    """Return when all have ended. Those that were killed may take a busy system a moment."""

    async def are_gone() -> bool:
        return not alive(processes)

    with trio.move_on_after(KILLED_S) as patience:
        await until(are_gone, within_s=math.inf)
    assert not patience.cancelled_caught, [each.cmdline() for each in alive(processes)]


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


@asynccontextmanager
async def running_command(
    tmp_path: Path,
    *args: str,
    url: str | None = None,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = THIS_TREE,
) -> AsyncIterator[RunningCommand]:
    """`trio-worker run` with free ports; what it leaves behind at the end is an error."""
    port = free_port()
    url = url or f"nats://127.0.0.1:{free_port()}"
    log = tmp_path / f"worker-{port}.log"
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            [*program, *_run_arguments(url, port), *args],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**clean_environment(), **(env or {})},
        )
    worker = RunningCommand(
        process=process, url=url, monitoring=f"http://127.0.0.1:{port}", log=log
    )
    try:
        yield worker
        if process.poll() is None:
            family = worker.children()
            process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(40) == 0, log.read_text()
            await until_gone(family)
    finally:
        if process.poll() is None:
            for child in worker.children():
                child.kill()
            process.kill()
            with trio.move_on_after(5, shield=True):
                await process.wait()


@contextmanager
def background_command(folder: Path, *args: str) -> Iterator[RunningCommand]:
    """As `running_command`, without a loop: for a worker that several tests share."""
    port = free_port()
    url = f"nats://127.0.0.1:{free_port()}"
    log = folder / f"worker-{port}.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*THIS_TREE, *_run_arguments(url, port), *args],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=clean_environment(),
        ) as process,
    ):
        worker = RunningCommand(
            process=process,  # type: ignore[arg-type]  # of which tests that share it only `poll`
            url=url,
            monitoring=f"http://127.0.0.1:{port}",
            log=log,
        )
        try:
            yield worker
            family = worker.children()
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, log.read_text()
            assert not alive(family)
        finally:
            if process.poll() is None:
                for child in worker.children():
                    child.kill()
                process.kill()


def _run_arguments(url: str, port: int) -> list[str]:
    return [
        "run",
        *("--log-level", "debug", "--log-format", "human"),
        *("--set", f"nats.url={url}"),
        *("--set", f"worker.monitoring.port={port}"),
        *("--set", "worker.id=w1"),
    ]


BAD_OVERRIDE = ("--set", "worker.drain_timeout_ms=soon")


def bad_configuration(folder: Path) -> Path:
    """A file with two problems; `BAD_OVERRIDE` is a third."""
    path = folder / "cluster.yaml"
    path.write_text(
        "cluster:\n  worker:\n    continuous_batching: {max_batch_size: 0, min_batch_sise: 1}\n"
    )
    return path


def assert_every_problem_is_said(text: str) -> None:
    assert "cluster.worker.continuous_batching.max_batch_size" in text
    assert "min_batch_size" in text
    assert "cluster.worker.drain_timeout_ms" in text
