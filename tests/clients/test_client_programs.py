"""The programs of docs/clients.md, run as a reader runs them, and an outside check of the API."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.client_programs import (
    PAGE,
    ROOT,
    Environment,
    Program,
    node_environment,
    programs,
    python_environment,
)
from support.clients_rig import MODEL, open_front
from support.paths import REPOSITORY

from trio_worker.gateway.keys import parse_keys

COMPLY = "llm-comply>=0.5,<0.6"
NOT_YET = {"chat-tool-calling", "chat-image-input"}
"""What comes later, as the page says."""
OTHERWISE = {"chat-error-handling"}
"""It wants a request without a model to be refused; here that stands for any model."""


def of(*places: str) -> list[Any]:
    return [pytest.param(each, id=each.title) for each in programs() if each.place in places]


def packages(place: str) -> list[str]:
    return [each for program in programs() if program.place == place for each in program.installs]


# --- what has to be on the page ----------------------------------------------------------------


def test_every_program_has_its_output_and_the_address_that_is_replaced() -> None:
    found = programs()
    assert len(found) == PAGE.count('```text title="output"\n') == 8
    assert sum(PAGE.count(f"```{each}\n") for each in ("python", "js")) == 6
    assert all(program.code.count(ROOT) == 1 for program in found)
    assert {each.place for each in found} == {"here", "venv", "npm", "shell"}


def test_the_page_installs_the_client_that_is_tested_here() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    (ours,) = [each for each in project["dependency-groups"]["dev"] if "openai" in each]
    assert {*packages("here")} == {ours, "trio"}


def test_the_file_of_keys_is_one() -> None:
    text = PAGE.partition("```text\n# caller")[2].partition("```")[0]
    keys = parse_keys(f"# caller{text}", name="the page").keys
    assert [(key.caller, key.most_urgent, key.concurrent) for key in keys] == [
        ("anna", "high", 8),
        ("batch", "low", 2),
    ]


# --- in this environment ------------------------------------------------------------------------


@pytest.mark.nats
@pytest.mark.process
@pytest.mark.parametrize("program", of("here"))
async def test_a_program_with_openais_client(program: Program, tmp_path: Path) -> None:
    async with open_front() as front:
        await Environment(tmp_path).run(front, program)


# --- in others ----------------------------------------------------------------------------------


@pytest.fixture(name="venv", scope="module")
def venv_fixture(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return python_environment(tmp_path_factory.mktemp("python"), [*packages("venv"), COMPLY])


@pytest.fixture(name="node", scope="module")
def node_fixture(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return node_environment(tmp_path_factory.mktemp("node"), packages("npm"))


@pytest.mark.clients
@pytest.mark.parametrize("program", of("venv"))
async def test_a_program_for_python(program: Program, venv: Environment) -> None:
    async with open_front() as front:
        await venv.run(front, program)


@pytest.mark.clients
@pytest.mark.parametrize("program", of("npm"))
async def test_a_program_for_node(program: Program, node: Environment) -> None:
    async with open_front() as front:
        await node.run(front, program)


@pytest.mark.clients
@pytest.mark.parametrize("program", of("shell"))
async def test_a_program_for_the_shell(program: Program, tmp_path: Path) -> None:
    async with open_front() as front:
        await Environment(tmp_path).run(front, program)


@pytest.mark.clients
async def test_what_a_checker_of_others_finds_is_what_is_documented(venv: Environment) -> None:
    """llm-comply holds answers against OpenAI's specification."""
    # The simulated engine talks until it may not any more, so it ends by `length`.
    ignored = ("--ignore", "finish_reason: expected 'stop'")
    address = ("--model", MODEL, "--api-key", "any", "--format", "openai-chat", "--json")
    comply = str(venv.python.parent / "llm-comply")
    few = ("worker.requests.max_tokens_limit=16", "worker.requests.default_max_tokens=16")
    async with open_front(*few) as front:
        ended = await venv.run_command([comply, "-u", front.base_url, *address, *ignored])
    results = json.loads(ended.stdout)["results"]
    outcomes: dict[str, set[str]] = {}
    for each in results:
        outcomes.setdefault(each["status"], set()).add(each["id"])
    assert outcomes["failed"] == NOT_YET | OTHERWISE, results
    assert len(outcomes["passed"]) >= 5
