"""A configuration shown whole, and the JSON Schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.configurations import (
    SECRET,
    Load,
    load_fixture,  # noqa: F401 - a fixture
    problems_if_any,
    secret_file,
    tree_with,
    value_at,
)
from support.paths import REPOSITORY

from trio_worker import config
from trio_worker.config import all_keys, load_config, load_with_sources, strict_yaml, variable_of


def shown_whole(path: Path | None, *overrides: str, **environ: str) -> str:
    return config.effective_yaml(
        load_with_sources(path, environ=environ, overrides=overrides, hostname="host")
    )


def remarks_of(text: str) -> dict[str, str]:
    """What stands behind each value, by its path."""
    lines = text.splitlines()
    return {
        path.removeprefix("cluster."): lines[number - 1].rpartition("  # ")[2]
        for path, number in strict_yaml.parse(text.encode()).lines.items()
        if "  # " in lines[number - 1]
    }


def test_the_whole_configuration_names_every_key_and_where_its_value_comes_from(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "cluster:\n  worker:\n    model: a/b\n    requests:\n    request_queue:\n"
        "      max_depth: 7\n      aging_ms: 1\n    drain_timeout_ms: 1\n  nats: {tls: null}\n"
    )
    text = shown_whole(
        path,
        "worker.request_queue.aging_ms=null",
        TRIO_WORKER__WORKER__REQUEST_QUEUE__AGING_MS="2",
        TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS="3",
    )
    expected = {key.path: "default" for key in all_keys() if not key.path.startswith("nats.tls.")}
    assert remarks_of(text) == expected | {
        "nats.tls": f"{path}:9",
        "worker.id": "default, from the host name",
        "worker.model": f"{path}:3",
        "worker.model_name": "default, the last component of `model`",
        "worker.request_queue.max_depth": f"{path}:6",
        "worker.request_queue.aging_ms": "--set worker.request_queue.aging_ms",
        "worker.drain_timeout_ms": "TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS",
    }


def test_a_name_that_is_given_is_not_said_to_be_derived() -> None:
    given, derived = (shown_whole(None, f"worker.id={text}") for text in ("mine", "null"))
    assert remarks_of(given)["worker.id"] == "--set worker.id"
    assert remarks_of(derived)["worker.id"] == "default, from the host name"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["nats.tls.ca_file=a, b: [c]", "nats.user=1e3", "nats.password_file=x"],
        ["worker.id=null", "worker.id=no", "worker.model=~/m.gguf", "worker.monitoring.port=null"],
        ["nats.reply_prefixes=[_INBOX., '{a,b}', '1', 'null']", "worker.drain_timeout_ms=0"],
        ["worker.simulated.turn_ms=0.00001", "worker.simulated.prefill_ms_per_token=0"],
        ["worker.continuous_batching.enabled=false", "worker.requests.max_prompt_bytes=1"],
    ],
)
def test_the_whole_configuration_loads_to_the_same_one(load: Load, overrides: list[str]) -> None:
    before = load_with_sources(
        None, environ={}, overrides=overrides, hostname="other", read_secrets=False
    )
    assert load(config.effective_yaml(before), read_secrets=False) == before.config


@given(st.text(min_size=1, max_size=200))
@example("null")
@example("a: b # c\nd 😀")
@example("\x85\u2028 \ufeff\x7f")
@example("2001-01-01")
@example("many words " * 17 + "end")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_shown_so_that_it_loads_again(tmp_path: Path, prompt: str) -> None:
    variables = {variable_of("worker.prewarm.prompt"): prompt}
    if problems_if_any(lambda: load_config(None, environ=variables, hostname="host")):
        return
    text = shown_whole(None, **variables)
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path, environ={}, hostname="host").worker.prewarm.prompt == prompt
    assert len(text.splitlines()) == len(shown_whole(None).splitlines())


@pytest.mark.parametrize(
    ("variables", "overrides", "remarks"),
    [
        ({"USER": "u", "PASSWORD": "hush!"}, [], {"password": "TRIO_WORKER__NATS__PASSWORD"}),
        ({}, ["user=u", "password=hush!"], {"password": "--set nats.password"}),
        ({}, ["token=hush!"], {"token": "--set nats.token"}),
        ({"URL": "nats://u:hush!@h:4222"}, [], {"url": "TRIO_WORKER__NATS__URL"}),
        ({}, ["url=nats://hush!@h:4222"], {"url": "--set nats.url"}),
    ],
)
def test_no_secret_is_shown(
    variables: dict[str, str], overrides: list[str], remarks: dict[str, str]
) -> None:
    text = shown_whole(
        None,
        *(f"nats.{each}" for each in overrides),
        **{f"TRIO_WORKER__NATS__{name}": value for name, value in variables.items()},
    )
    assert "hush" not in text
    for name, source in remarks.items():
        assert remarks_of(text)[f"nats.{name}"] == f"{source}, hidden"
        assert "***" in yaml.safe_load(text)["cluster"]["nats"][name]


def test_a_secret_in_the_file_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"cluster: {{nats: {{user: u, password: {SECRET}}}}}")
    text = shown_whole(path)
    assert SECRET not in text
    assert remarks_of(text)["nats.password"] == f"{path}:1, hidden"


@pytest.mark.parametrize("name", ["password", "token"])
def test_a_secret_of_a_file_of_its_own_stays_there(tmp_path: Path, load: Load, name: str) -> None:
    file = secret_file(tmp_path)
    overrides = [f"nats.{name}_file={file}", *(["nats.user=u"] if name == "password" else [])]
    text = shown_whole(None, *overrides)
    assert SECRET not in text
    assert remarks_of(text)[f"nats.{name}"] == f"hidden, from nats.{name}_file"
    assert value_at(load(text), f"nats.{name}") == SECRET


def test_a_file_name_cannot_end_its_remark(tmp_path: Path) -> None:
    path = tmp_path / "a\nworker: b"
    path.write_text("cluster: {worker: {model: m}}")
    assert remarks_of(shown_whole(path)).keys() == remarks_of(shown_whole(None)).keys()


def faults(schema: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """A validator of the part of JSON Schema that is used here; refuses any other part."""
    known = {
        *("$schema", "title", "description", "default", "examples", "type", "enum", "pattern"),
        *("properties", "required", "additionalProperties", "minimum", "maximum", "minLength"),
        *("maxLength", "items", "minItems", "maxItems", "uniqueItems"),
    }
    assert set(schema) <= known
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kinds: dict[type, set[str]] = {
        dict: {"object"},
        list: {"array"},
        str: {"string"},
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        type(None): {"null"},
    }
    matching = kinds[type(value)].intersection(types)
    if not matching:
        return [path]
    if value is None:
        return []
    if isinstance(value, dict):
        missing = [f"{path}.{name}" for name in schema.get("required", []) if name not in value]
        unknown = [f"{path}.{name}" for name in value if name not in schema["properties"]]
        inner = [
            fault
            for name, each in value.items()
            if name in schema["properties"]
            for fault in faults(schema["properties"][name], each, f"{path}.{name}")
        ]
        return missing + unknown + inner
    if isinstance(value, list):
        inner = [fault for each in value for fault in faults(schema["items"], each, path)]
        fits = schema["minItems"] <= len(value) <= schema["maxItems"]
        return inner + ([] if fits else [path])
    wrong = (
        ("enum" in schema and value not in schema["enum"])
        or ("minimum" in schema and not schema["minimum"] <= value <= schema["maximum"])
        or ("pattern" in schema and not re.search(schema["pattern"], value))
        or len(str(value)) < schema.get("minLength", 0)
    )
    return [path] if wrong else []


def test_the_shipped_file_is_valid_by_the_schema() -> None:
    shipped = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))
    schema = config.json_schema()
    assert faults(schema, shipped) == []
    assert json.loads(json.dumps(schema)) == schema


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    schema = config.json_schema()
    for path, value in (
        ("worker.continuous_batching.max_batch_size", 0),
        ("worker.continuous_batching.max_batch_size", "8"),
        ("worker.continuous_batching.maxBatchSize", 8),
        ("worker.id", "a.b"),
        ("nats.embedded", "yes"),
        ("nats.reply_prefixes", []),
    ):
        assert faults(schema, tree_with(path, value)) == [f".cluster.{path}"]
    assert faults(schema, {}) == [".cluster"]


def test_the_schema_says_every_default_and_description() -> None:
    for key in all_keys():
        leaf = config.json_schema()["properties"]["cluster"]
        for name in key.path.split("."):
            leaf = leaf["properties"][name]
        assert leaf["description"]
        assert "default" in leaf
        assert faults(leaf, leaf["default"]) == []


def test_the_schema_is_valid_by_its_own_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(config.json_schema())
