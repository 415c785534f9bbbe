"""Children are heard whole, and go with everything they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
import trio
from support.commands import alive

from trio_worker.machine.child_process import how_it_ended, kill_group, read_lines, start_group

pytestmark = pytest.mark.process


PATIENCE_S = 10.0


async def lines_of(program: str, *, longest_bytes: int = 100) -> list[str]:
    lines: list[str] = []
    process = await start_group([sys.executable, "-c", program], stdin=subprocess.DEVNULL)
    with trio.fail_after(PATIENCE_S):
        await read_lines(process, lines.append, longest_bytes=longest_bytes)
        await process.wait()
    return lines


async def test_both_outputs_come_line_by_line_and_the_last_one_needs_no_end() -> None:
    program = """
import os
os.write(1, b"one\\n\\ntw")
os.write(2, b"o\\nno UTF-8: \\xff\\n")
os.write(1, b"the last")
"""
    assert await lines_of(program) == ["one", "", "two", "no UTF-8: \ufffd", "the last"]


async def test_a_line_without_an_end_is_not_held_for_ever() -> None:
    program = "import os\nfor _ in range(1000): os.write(1, b'x' * 50)"
    pieces = await lines_of(program)
    assert "".join(pieces) == "x" * 50_000
    assert len(pieces) > 1


async def test_a_stopped_child_is_killed_and_so_is_what_it_started() -> None:
    program = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    started: list[str] = []
    process = await start_group([sys.executable, "-c", program], stdin=subprocess.DEVNULL)
    try:
        assert os.getsid(process.pid) == process.pid
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: read_lines(process, started.append, longest_bytes=100))
                while not started:  # noqa: ASYNC110 - nothing else tells
                    await trio.sleep(0.005)
                grandchild = psutil.Process(int(started[0]))
                process.send_signal(signal.SIGSTOP)
                kill_group(process)
                # The output ends only once both have gone.
            await process.wait()
            # A process closes what it wrote to before the system is done with it.
            while alive([grandchild]):  # noqa: ASYNC110 - nothing else tells
                await trio.sleep(0.005)
    finally:
        kill_group(process)
    assert how_it_ended(process.returncode) == "killed by SIGKILL"


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (None, "it could not be reaped"),
        (0, "exit status 0"),
        (70, "exit status 70"),
        (-9, "killed by SIGKILL"),
        (-99, "exit status -99"),
    ],
)
def test_an_end_is_put_into_words(returncode: int | None, words: str) -> None:
    assert how_it_ended(returncode) == words
