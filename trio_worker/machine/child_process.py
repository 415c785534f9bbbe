"""Child processes: started in a group of their own, heard line by line, killed with all of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

READ_BYTES = 2**14


async def start_group(
    command: Sequence[str],
    *,
    stdin: int,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> trio.Process:
    """Start a process that leads a session, hence a group, of its own.

    A terminal's Ctrl-C does not reach it, and `kill_group` takes what it has started along. What
    it writes, to either output, comes out of its `stdout`. Cancelled: nothing has been started.
    """
    return await trio.lowlevel.open_process(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        start_new_session=True,
        env=env,
    )


async def read_lines(
    process: trio.Process, take: Callable[[str], None], *, longest_bytes: int
) -> None:
    """Hand each line that a child writes to `take`, and close its output at the end.

    Returns when everybody who could write there has closed it. What has grown beyond
    `longest_bytes` without an end of line is taken as a line. Cancelled: what is still on its way
    is lost.
    """
    assert process.stdout is not None
    held = b""
    async with process.stdout as stream:
        while data := await _receive(stream):
            *lines, held = (held + data).split(b"\n")
            if len(held) > longest_bytes:
                lines.append(held)
                held = b""
            for line in lines:
                take(line.decode("utf-8", "replace"))
        if held:
            take(held.decode("utf-8", "replace"))


async def _receive(stream: trio.abc.ReceiveStream) -> bytes:
    try:
        return bytes(await stream.receive_some(READ_BYTES))
    except trio.BrokenResourceError:
        return b""


def kill_group(process: trio.Process) -> None:
    """Kill a process of `start_group` and what it started; no matter if they are stopped or gone.

    Once the process has been reaped and nothing of its group is left, its number may be somebody
    else's: then this is not to be called.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def how_it_ended(returncode: int | None) -> str:
    """In words; None stands for a process that has not been reaped."""
    if returncode is None:
        return "it could not be reaped"
    if returncode < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"
