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
from support.jobs_rig import JOBS_ON
from support.paths import REPOSITORY
from support.written_answers import obliging, open_written

from trio_worker.gateway.keys import parse_keys

COMPLY = "llm-comply>=0.5,<0.6"
NOT_YET = {"chat-image-input"}
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
    assert len(found) == PAGE.count('```text title="output"\n') == 10
    assert sum(PAGE.count(f"```{each}\n") for each in ("python", "js")) == 8
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


async def run(environment: Environment, program: Program) -> None:
    """Before a worker that has a model of its own mind, or before one that does as it is told."""
    if program.is_an_agent:
        async with open_written(obliging) as (root, _):
            await environment.run(root, program)
    else:
        async with open_front(*([JOBS_ON] if program.has_batches else [])) as front:
            await environment.run(front.root, program)


# --- in this environment ------------------------------------------------------------------------


@pytest.mark.nats
@pytest.mark.process
@pytest.mark.parametrize("program", of("here"))
async def test_a_program_with_openais_client(program: Program, tmp_path: Path) -> None:
    await run(Environment(tmp_path), program)


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
    await run(venv, program)


@pytest.mark.clients
@pytest.mark.parametrize("program", of("npm"))
async def test_a_program_for_node(program: Program, node: Environment) -> None:
    await run(node, program)


@pytest.mark.clients
@pytest.mark.parametrize("program", of("shell"))
async def test_a_program_for_the_shell(program: Program, tmp_path: Path) -> None:
    await run(Environment(tmp_path), program)


@pytest.mark.clients
async def test_what_a_checker_of_others_finds_is_what_is_documented(venv: Environment) -> None:
    """llm-comply holds answers against OpenAI's specification."""
    address = ("--model", MODEL, "--api-key", "any", "--format", "openai-chat", "--json")
    comply = str(venv.python.parent / "llm-comply")
    async with open_written(obliging) as (root, _):
        ended = await venv.run_command([comply, "-u", f"{root}/v1", *address])
    results = json.loads(ended.stdout)["results"]
    outcomes: dict[str, set[str]] = {}
    for each in results:
        outcomes.setdefault(each["status"], set()).add(each["id"])
    assert outcomes["failed"] == NOT_YET | OTHERWISE, results
    assert len(outcomes["passed"]) >= 6
