"""The three sources, which of them wins, and a file that is not what it should be."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from support.configurations import (
    DEFAULTS,
    Load,
    load_fixture,  # noqa: F401 - a fixture
    problems_of,
)

from trio_worker.config import all_keys, load_config, variable_of
from trio_worker.config.keys import Key


def test_set_wins_over_variables_and_variables_over_the_file(load: Load) -> None:
    text = "cluster: {worker: {drain_timeout_ms: 1, request_queue: {max_depth: 1}, model: a}}"
    loaded = load(
        text,
        "worker.model=c",
        "worker.model=d",
        TRIO_WORKER__WORKER__MODEL="b",
        TRIO_WORKER__WORKER__REQUEST_QUEUE__MAX_DEPTH="2",
    )
    assert loaded.worker.drain_timeout_ms == 1
    assert loaded.worker.request_queue.max_depth == 2
    assert loaded.worker.model == "d"


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.path)
def test_every_key_can_be_set_by_variable_and_by_set(key: Key) -> None:
    """Set to its own default, which must be accepted and change nothing."""
    text = key.default if isinstance(key.default, str) else json.dumps(key.default)
    beside = []
    if key.path.startswith("nats.tls."):
        text = "file.pem"
        beside = [f"nats.tls.{name}=file.pem" for name in ("cert_file", "key_file")]
    for environ, overrides in (({variable_of(key.path): text}, []), ({}, [f"{key.path}={text}"])):
        loaded = load_config(
            None, environ=environ, overrides=[*beside, *overrides], hostname="host"
        )
        if not beside:
            assert loaded == DEFAULTS


@pytest.mark.parametrize(
    ("text", "value"), [("12345", "12345"), ("a: b #c", "a: b #c"), ("", None)]
)
def test_text_from_the_environment_needs_no_quotes(text: str, value: str | None) -> None:
    environ = {"TRIO_WORKER__NATS__PASSWORD": text, "TRIO_WORKER__NATS__USER": text}
    assert load_config(None, environ=environ, hostname="host").nats.password == value


def test_other_values_from_the_environment_are_yaml() -> None:
    environ = {
        "TRIO_WORKER__NATS__REPLY_PREFIXES": "[_INBOX., _APP.]",
        "TRIO_WORKER__WORKER__MONITORING__PORT": "null",
        "TRIO_WORKER__WORKER__PREWARM__ENABLED": "false",
    }
    loaded = load_config(None, environ=environ, hostname="host")
    assert loaded.nats.reply_prefixes == ("_INBOX.", "_APP.")
    assert loaded.worker.monitoring.port is None
    assert loaded.worker.prewarm.enabled is False


def test_a_problem_says_which_source_it_came_from(load: Load) -> None:
    text = "cluster:\n  worker:\n    drain_timeout_ms: x\n"
    assert problems_of(lambda: load(text))[0].endswith("(cluster.yaml:3)")
    by_variable = problems_of(lambda: load(text, TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS="-1"))
    assert by_variable[0].endswith("(TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS)")
    by_set = problems_of(lambda: load(text, "worker.drain_timeout_ms=y"))
    assert by_set[0].endswith("(--set worker.drain_timeout_ms)")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TRIO_WORKER__WORKER__MODLE", "TRIO_WORKER__WORKER__MODEL"),
        ("TRIO_WORKER__WORKER__model", "TRIO_WORKER__WORKER__MODEL"),
        ("TRIO_WORKER__MAX_DEPTH", "TRIO_WORKER__WORKER__REQUEST_QUEUE__MAX_DEPTH"),
        ("TRIO_WORKER__WORKER", ""),
        ("TRIO_WORKER__", ""),
    ],
)
def test_a_variable_that_names_no_key_is_an_error(name: str, meant: str) -> None:
    (problem,) = problems_of(lambda: load_config(None, environ={name: "x"}, hostname="host"))
    assert problem.startswith(f"{name}: names no key")
    assert meant in problem


def test_other_variables_do_not_matter() -> None:
    environ = {"TRIO_WORKER": "x", "TRIO_WORKER_LOG": "x", "PATH": "/bin"}
    assert load_config(None, environ=environ, hostname="host") == DEFAULTS


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("worker.model", "expected PATH=VALUE"),
        ("worker=x", "names a section"),
        ("cluster.worker.model=x", "did you mean worker.model?"),
        ("worker.max_depth=3", "did you mean worker.request_queue.max_depth?"),
        ("=x", "names no key"),
        ("", "expected PATH=VALUE"),
    ],
)
def test_a_set_that_names_no_key_is_an_error(override: str, expected: str) -> None:
    (problem,) = problems_of(
        lambda: load_config(None, environ={}, overrides=[override], hostname="host")
    )
    assert problem.startswith("--set ")
    assert expected in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected a mapping with `cluster:`"),
        ("# only a comment\n", "is empty"),
        ("{}", "is empty"),
        ("[]", "is empty"),
        ("- a", "holds a list"),
        ("cluster", "holds text"),
        ("cluster: {a: [}", "line 1, column 15"),
        ("cluster:\n  worker:\n\tmodel: x", "line 3, column 1"),
        ("cluster: {}\n---\ncluster: {}", "a second YAML document"),
        ("cluster: !!python/object/apply:os.system [true]", "a tag"),
        ("cluster: &a {b: *a}", "an anchor"),
        ("cluster: *a", "an alias"),
        ("cluster: {<<: *a}", "an alias"),
        ("cluster: {[a]: b}", "a key that is not text"),
        ("cluster: {? {a: b} : c}", "a key that is not text"),
        ("cluster: " + "[" * 100_000, "nested deeper than 16 levels"),
        ("cluster: " + "{a: " * 30_000, "nested deeper than 16 levels"),
        ("a" * 300_000, "is larger than"),
        # 4 s, 8 s with 1.5 GB, and 2 s, if they were read.
        ("cluster: 1" + ":1" * 130_000, "a number of too many digits"),
        (
            f"? {'k' * 130_000}\n: {{{', '.join(f'a{i}: 1' for i in range(9_000))}}}",
            "a key of more",
        ),
        ("cluster: [" + "1," * 130_000 + "]", "more than 10000 values"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"cluster: \x80", "not YAML"),
        ("cluster: \0", "not YAML"),
        ('cluster: "\\UFFFFFFFF"', "cannot be read"),
        ("cluster: 0b_", "cannot be read"),
        ("cluster: =", "not YAML"),
    ],
)
def test_a_file_that_is_not_a_configuration(load: Load, text: str | bytes, expected: str) -> None:
    (problem,) = problems_of(lambda: load(text))
    assert problem.startswith("cluster.yaml: ")
    assert expected in problem


def test_a_billion_laughs_are_not_laughed(load: Load) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (problem,) = problems_of(lambda: load("\n".join(lines)))
    assert "an anchor" in problem


def test_a_key_written_twice_is_named_with_both_lines(load: Load) -> None:
    text = "cluster:\n  worker:\n    model: a\n    drain_timeout_ms: 1\n    model: b\n"
    assert problems_of(lambda: load(text)) == [
        "cluster.worker.model: written twice, in the lines 3 and 5 (cluster.yaml:5)"
    ]


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    paths = (tmp_path / "missing.yaml", tmp_path, tmp_path / ("x" * 300), Path("a\0b"))
    for path in paths:
        (problem,) = problems_of(partial(load_config, path, environ={}, hostname="host"))
        assert re.search("cannot be read: |is not a file name", problem)
