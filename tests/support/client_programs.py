"""The programs of docs/clients.md, and the places in which they run.

A section that installs something runs in an environment of its own, with what it installs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from support.commands import clean_environment
from support.paths import DOCS

PAGE = (DOCS / "clients.md").read_text(encoding="utf-8")
ROOT = "http://127.0.0.1:8000"
"""The gateway's address on the page."""
PROGRAM_S = 60
INSTALL_S = 120
_SECTION = re.compile(r"^## (.+)\n((?s:.*?))(?=^## |\Z)", re.MULTILINE)
_INSTALL = re.compile(r"^```sh\n(pip|npm) install (.*)\n```$", re.MULTILINE)
_BLOCK = r"((?:(?!```).*\n)*)```$"
_PROGRAM = re.compile(
    rf'^```(python|js|sh)\n{_BLOCK}\n\n```text title="output"\n{_BLOCK}', re.MULTILINE
)
_NODE_MAJOR = 20


@dataclass(frozen=True, slots=True)
class Program:
    title: str
    """Of the section."""
    installer: str | None
    installs: tuple[str, ...]
    language: str
    code: str
    output: str
    """`…` stands for anything but nothing, within a line."""

    @property
    def place(self) -> str:
        """Which of the environments it runs in."""
        if self.installer == "pip":
            here = all(each.startswith(("openai", "trio")) for each in self.installs)
            return "here" if here else "venv"
        return self.installer or "shell"

    @property
    def has_batches(self) -> bool:
        return "/v1/batches" in self.code or ".batches." in self.code

    @property
    def is_an_agent(self) -> bool:
        """Whether it has tools called, or wants an answer in a form of its own."""
        words = ("tools", "output_type", "structured_output", "toolChoice")
        return any(word in self.code for word in words)


def programs() -> list[Program]:
    return [
        Program(title, install[1] if install else None, _words(install), *program.groups())
        for title, text in _SECTION.findall(PAGE)
        for install in [_INSTALL.search(text)]
        for program in _PROGRAM.finditer(text)
    ]


def _words(install: re.Match[str] | None) -> tuple[str, ...]:
    return tuple(shlex.split(install[2])) if install else ()


@dataclass(frozen=True, slots=True)
class Environment:
    """Where programs are started."""

    folder: Path
    """What they write is put there, and Node looks there for what is installed."""
    variables: Mapping[str, str] = field(default_factory=clean_environment)
    python: Path = Path(sys.executable)

    async def run(self, root: str, program: Program) -> None:
        """Run it to its end, with a gateway there; it has to say what the page says."""
        code = program.code.replace(ROOT, root)
        ended = await self.run_command(self._command(program.language, code))
        assert ended.returncode == 0, f"{program.title}: {ended.stderr.decode()}"
        pattern = ".+".join(map(re.escape, program.output.split("…")))
        said = ended.stdout.decode()
        assert re.fullmatch(pattern, said), f"{program.title}: {said}{ended.stderr.decode()}"

    async def run_command(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        with trio.fail_after(PROGRAM_S):
            return await trio.run_process(
                command,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                cwd=self.folder,
                env=self.variables,
            )

    def _command(self, language: str, code: str) -> list[str]:
        match language:
            case "python":
                return [str(self.python), "-c", code]
            case "js":
                return [needed("node"), "--input-type=module", "--eval", code]
            case _:
                return [needed("bash"), "-e", "-u", "-o", "pipefail", "-c", code]


def python_environment(folder: Path, packages: Iterable[str]) -> Environment:
    """An environment of Python's with these packages, and nothing of this one's."""
    # `uv run` says where it is.
    uv = os.environ.get("UV") or needed("uv")
    venv, settings = folder / "venv", folder / "settings"
    settings.mkdir()
    _install([uv, "venv", "-q", "--python", sys.executable, str(venv)])
    _install([uv, "pip", "install", "-q", "--python", str(venv), *packages])
    variables = {
        **clean_environment(),
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        # Else `llm` would write into the reader's own.
        "LLM_USER_PATH": str(settings),
    }
    return Environment(folder, variables, venv / "bin/python")


def node_environment(folder: Path, packages: Iterable[str]) -> Environment:
    """A folder with these packages of npm's."""
    said = subprocess.run([needed("node"), "--version"], check=True, capture_output=True, text=True)
    if int(said.stdout.removeprefix("v").partition(".")[0]) < _NODE_MAJOR:
        pytest.fail(f"the clients of JavaScript need Node {_NODE_MAJOR}; this is {said.stdout}")
    quiet = ("--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")
    _install([needed("npm"), "install", *quiet, "--prefix", str(folder), *packages])
    return Environment(folder)


def needed(program: str) -> str:
    """Where it is; without it the test fails."""
    found = shutil.which(program)
    if found is None:
        pytest.fail(f"these tests need {program}, and it is not on PATH: see docs/testing.md")
    return found


def _install(command: list[str]) -> None:
    ended = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
        stdin=subprocess.DEVNULL,
    )
    if ended.returncode != 0:
        pytest.fail(f"{shlex.join(command)} failed: {ended.stdout}{ended.stderr}")
