"""The Python programs of docs/integration.md, run as a reader runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from support.commands import clean_environment, running_command
from support.paths import DOCS

PAGE = (DOCS / "integration.md").read_text(encoding="utf-8")
URL = "nats://127.0.0.1:4222"


@dataclass(frozen=True)
class Program:
    line: int
    code: str
    output: str
    """A line that is `…` stands for any one line; within a line it is anything."""


def programs() -> list[Program]:
    return [
        Program(PAGE.count("\n", 0, block.start()) + 1, block[1], block[2])
        for block in re.finditer(
            r'(?ms)^```python\n(.*?)^```\n\n```text title="output"\n(.*?)^```$', PAGE
        )
    ]


def test_every_program_has_its_output_and_the_address_that_is_replaced() -> None:
    assert len(programs()) == PAGE.count("```python\n") == 3
    assert all(program.code.count(URL) == 1 for program in programs())


async def run(code: str) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(60):
        return await trio.run_process(
            [sys.executable, "-W", "error", "-c", code],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=clean_environment(),
        )


@pytest.mark.nats
async def test_the_programs_print_what_the_page_says(tmp_path: Path) -> None:
    async with running_command(tmp_path, "--engine", "simulated") as worker:
        await worker.wait_ready()
        for program in programs():
            ended = await run(program.code.replace(URL, worker.url))
            assert ended.returncode == 0, f"line {program.line}: {ended.stderr.decode()}"
            pattern = ".+".join(map(re.escape, program.output.split("…")))
            assert re.fullmatch(pattern, ended.stdout.decode()), ended.stdout.decode()
        outcomes = (await worker.stats())["requests"]["by_outcome"]
    assert outcomes == {"ok": 7, "INVALID_REQUEST": 1, "CANCELLED": 1}
