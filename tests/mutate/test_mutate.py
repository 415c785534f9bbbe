"""Planting one-line bugs: the right ones, found by the right tests, and none passed over."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import TESTS

from mutate.mutants import mutants_of

SMALL = '''
"""A docstring is no bug."""
from functools import partial

LIMIT = 3


def allowed(count: int, *, strict_too: bool = True) -> bool:
    assert count >= 0, "never"
    if strict_too and count > LIMIT:
        return False
    while count > LIMIT + 100:
        count = 0
    return True


def unused() -> str:
    return f"{1 + 1}"
'''
TEST = """
import time
from hypothesis import given, strategies as st
from small.rules import LIMIT, allowed

@given(st.integers(4, 50))
def test_much(count):
    assert not allowed(count)

async def test_the_bound():
    assert allowed(3)
    assert LIMIT == 3

def test_a_loop_that_ends():
    assert allowed(200, strict_too=False)
"""
PROJECT = """
[tool.pytest.ini_options]
trio_mode = true
addopts = ["--import-mode=importlib", "--strict-markers"]
markers = ["mlx", "nats", "browser", "systemd"]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in {
        "small/__init__.py": "",
        "small/rules.py": SMALL,
        "tests/test_rules.py": TEST,
        "pyproject.toml": PROJECT,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def mutate(root: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mutate", f"root={root}", "small/rules.py", *options],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_the_mutants_of_a_file(project: Path) -> None:
    found = [(each.line, each.operator) for each in mutants_of(project / "small/rules.py")]
    assert sorted(found) == sorted(
        [
            (5, "3 to one more"),
            (8, "True to False"),
            *((10, each) for each in ("always true", "always false", "and to or")),
            *((10, each) for each in ("> to >=", "> to <")),
            (11, "return None"),
            (11, "False to True"),
            *((12, each) for each in ("always true", "always false", "> to >=", "> to <")),
            *((12, each) for each in ("+ to -", "100 to one more")),
            *((13, each) for each in ("removed", "0 to one more")),
            (14, "return None"),
            (14, "True to False"),
            (18, "return None"),
        ]
    )


def test_each_changes_its_own_piece_of_the_text_and_can_be_compiled(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "é = call(first=1,  # and\n    second='a.b')\nwhile not (é) and (  # or\n é):\n  x()\n"
    )
    mutants = mutants_of(path)
    for each in mutants:
        each.compiled()
    new = {each.operator: each.new for each in mutants}
    assert new["without first="] == "é = call(second='a.b')"
    assert new["another word"] == "second='a.b_')"
    assert new["and to or"] == "while not (é) or (  # or"
    assert new["not dropped"] == "while (é) and (  # or"
    assert new["removed"] == "pass"


def test_a_match_is_planted_into_case_by_case(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f(x):\n match x:\n  case 1:\n   return 2\n  case _:\n   x = 3\n return x\n"
    )
    mutants = mutants_of(path)
    for each in mutants:
        each.compiled()
    assert {(4, "return None"), (4, "2 to one more"), (6, "3 to one more")} <= {
        (each.line, each.operator) for each in mutants
    }


@pytest.mark.process
@pytest.mark.thorough
def test_what_no_test_notices_is_told_and_an_explanation_has_to_be_true(project: Path) -> None:
    (project / "tests/mutate_equivalent.toml").write_text(
        """["small/rules.py"]
'LIMIT = 3' = { "3 to one more" = "wrong: a test finds it" }
'while count > LIMIT + 100:' = { "100 to one more" = "the loop changes nothing" }
'return 1' = { "return None" = "wrong: there is no such line" }
"""
    )
    code, said = mutate(project)
    assert code == 1
    assert 'small/rules.py:18  return None  (no test runs it)\n    - return f"{1 + 1}"\n' in said
    survivors = re.findall(r"^small/rules\.py:\d+  (.*?)(?:  .*)?$", said, re.MULTILINE)
    # What is false need not be False; where the loop ends and what is never called nobody asks.
    assert survivors == [
        *("return None", "always false", "> to >=", "0 to one more", "return None")
    ]
    assert "LIMIT = 3  (3 to one more): explained, but is found" in said
    assert "return 1  (return None): explained, but is no mutant" in said
    assert "| `small/rules.py` | 14 | 20 | 1 |" in said
