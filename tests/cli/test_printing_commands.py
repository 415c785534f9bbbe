"""The commands that print and end: nothing of them needs a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.commands import (
    BAD_OVERRIDE,
    assert_every_problem_is_said,
    bad_configuration,
    command_here,
)
from support.paths import REPOSITORY


def test_check_config_says_every_problem_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_configuration(tmp_path)
    assert command_here("check-config", "--config", str(path), *BAD_OVERRIDE) == 78
    assert_every_problem_is_said(capsys.readouterr().err)


def test_check_config_accepts_the_shipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_here("check-config", "--config", str(REPOSITORY / "cluster.yaml")) == 0


def test_schema_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_here("schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["cluster"]


def test_what_check_config_prints_is_a_file_that_it_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    asked = ["check-config", "--set", "worker.model=a\nb", "--set", "nats.jetstream.stream=S"]
    assert command_here(*asked) == 0
    first = capsys.readouterr()
    path.write_text(first.out)
    assert command_here("check-config", "--config", str(path)) == 0
    second = capsys.readouterr()
    assert first.out.startswith("# the defaults: valid.")
    assert second.out.startswith(f"# {path}: valid.")
    assert yaml.safe_load(first.out) == yaml.safe_load(second.out)
    assert "nats.jetstream.stream" in second.err
