"""Everything wrong is said at once, where it stands and what was expected."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.configurations import (
    Load,
    load_fixture,  # noqa: F401 - a fixture
    problems_if_any,
    problems_of,
    tree_with,
)

from trio_worker.config import all_keys, load_config, variable_of
from trio_worker.config.keys import Key


@pytest.mark.parametrize(
    ("hostname", "worker_id"),
    [
        ("mac-studio.local", "mac-studio-local"),
        ("a_b-C9", "a_b-C9"),
        ("räksmörgås host", "r-ksm-rg-s-host"),
        ("...", "worker"),
        ("", "worker"),
        ("model", "worker-model"),
        ("cancel", "worker-cancel"),
        ("x" * 100, "x" * 64),
    ],
)
def test_the_worker_id_comes_from_the_host_name(hostname: str, worker_id: str) -> None:
    assert load_config(None, environ={}, hostname=hostname).worker.id == worker_id


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("mlx-community/Qwen2.5-0.5B", "Qwen2-5-0-5B"),
        ("models/tiny.gguf", "tiny"),
        ("models/tiny.Q8_0.GGUF", "tiny-Q8_0"),
        ("./models/tiny/", "tiny"),
        ("/", "model"),
    ],
)
def test_the_name_on_the_wire_comes_from_the_model(model: str, name: str) -> None:
    loaded = load_config(None, environ={}, overrides=[f"worker.model={model}"], hostname="host")
    assert loaded.worker.model_name == name


@given(st.text())
def test_any_host_name_gives_a_subject_token(hostname: str) -> None:
    worker_id = load_config(None, environ={}, hostname=hostname).worker.id
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", worker_id)
    assert worker_id not in ("model", "cancel", "by")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("worker.continuous_batching.max_batch_size", 0, "0 is not in 1…64; expected how many"),
        ("worker.continuous_batching.max_batch_size", 65, "65 is not in 1…64"),
        ("worker.continuous_batching.max_batch_size", "8", '"8" is text, not a whole number'),
        ("worker.continuous_batching.max_batch_size", True, "true is a truth value, not a whole"),
        ("worker.continuous_batching.max_batch_size", 8.0, "8.0 is a number, not a whole number"),
        ("worker.continuous_batching.max_batch_size", None, "null is nothing, not a whole number"),
        ("worker.continuous_batching.max_batch_size", [8], "[8] is a list"),
        ("worker.continuous_batching.max_batch_size", {"a": 1}, "a mapping is a mapping"),
        ("worker.continuous_batching.enabled", 1, "1 is a whole number, not true or false"),
        ("worker.continuous_batching.prefill_chunk_tokens", 15, "15 is not in 16…65536"),
        ("worker.request_queue.priority_levels", 9, "9 is not in 1…8"),
        ("worker.request_queue.aging_ms", 0, "null, not 0, means strict priorities"),
        ("worker.request_queue.max_depth", 10**400, "a very large number is not in"),
        ("worker.monitoring.port", 65536, "65536 is not in 0…65535"),
        ("worker.monitoring.port", -1, "-1 is not in 0…65535"),
        ("worker.monitoring.host", "", "is empty"),
        ("worker.simulated.turn_ms", float("nan"), "nan is not in 0…60000"),
        ("worker.simulated.turn_ms", float("inf"), "inf is not in 0…60000"),
        ("worker.simulated.seed", 2**53, "is not in 0…9007199254740991"),
        ("worker.requests.default_priority.buffered", "urgent", "one of high, low, medium"),
        ("nats.embedded", True, "put it in quotes"),
        ("nats.embedded", "yes", "is not one of"),
        ("nats.connect_timeout_ms", 0, "0 is not in 1…"),
        ("nats.reply_prefixes", "_INBOX.", "is text, not a list"),
        ("nats.reply_prefixes", [], "has 0 entries"),
        ("nats.reply_prefixes", ["_INBOX.>"], "without wildcards"),
        ("nats.reply_prefixes", ["_INBOX.", "_INBOX."], "twice"),
        ("nats.reply_prefixes", ["_INBOX.", 3], "has an entry 3 that is a whole number"),
        ("nats.dialects", ["klingon"], "is not one of"),
        ("nats.jetstream.ack_wait_ms", 999, "is not in 1000…"),
        ("nats.jetstream.stream", "A.B", "without blanks"),
        ("worker.id", "model", "is a subject of its own"),
        ("worker.id", "cancel", "is a subject of its own"),
        ("worker.id", "a.b", "1 to 64 of the characters"),
        ("worker.id", "a\n", "1 to 64 of the characters"),
        ("worker.id", "x" * 65, "1 to 64 of the characters"),
        ("worker.model_name", "Qwen2.5", "1 to 64 of the characters"),
        ("worker.model", 8, "put it in quotes"),
        ("worker.model", "a\0b", "holds a NUL"),
        ("worker.prewarm", 3, "expected a section with enabled, prompt, max_tokens"),
        ("worker.prewarm", [], "expected a section"),
        ("nats", "nats://x", "expected a section"),
        ("nats.url", "http://host", "only nats:// and tls://"),
        ("nats.url", "host:4222", "does not begin with nats://"),
        ("nats.url", "nats://", "names no host"),
        ("nats.url", "nats://host:0", "names no host or no port"),
        ("nats.url", "nats://host:99999", "cannot be read"),
        ("nats.url", "nats://host/path", "nothing may follow"),
        ("nats.url", "nats://a,nats://b", "one server"),
        ("nats.url", "nats://ho\nst", "one server"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(
    load: Load, path: str, value: object, expected: str
) -> None:
    (problem,) = problems_of(lambda: load(yaml.safe_dump(tree_with(path, value))))
    assert problem.startswith(f"cluster.{path}: ")
    assert expected in problem
    assert re.search(r" \(cluster\.yaml:\d+\)\Z", problem)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("worker.continuous_batching.max_batchsize", "continuous_batching.max_batch_size"),
        ("worker.continuous_batching.maxBatchSize", "continuous_batching.max_batch_size"),
        ("worker.max_batch_size", "cluster.worker.continuous_batching.max_batch_size"),
        ("max_depth", "cluster.worker.request_queue.max_depth"),
        ("worker.nats.url", "cluster.nats"),
        ("worker.request-queue", "cluster.worker.request_queue"),
        ("request_queue", "cluster.worker.request_queue"),
        ("wroker", "cluster.worker"),
        ("worker.prewarm.enabeld", "cluster.worker.prewarm.enabled"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(load: Load, path: str, meant: str) -> None:
    (problem,) = problems_of(lambda: load(yaml.safe_dump(tree_with(path, 3))))
    assert "unknown key; did you mean" in problem
    assert meant in problem


def test_an_unknown_key_that_resembles_nothing_is_named(load: Load) -> None:
    (problem,) = problems_of(lambda: load("cluster: {worker: {zzzzqqq: 3}}"))
    assert problem == "cluster.worker.zzzzqqq: unknown key (cluster.yaml:1)"


def test_a_section_beside_cluster_is_named_with_its_place(load: Load) -> None:
    (problem,) = problems_of(lambda: load("worker: {model: x}"))
    assert problem == "worker: unknown key; did you mean cluster.worker? (cluster.yaml:1)"


BAD_VALUES: list[object] = [{"no such key": 1}, [[]], float("nan"), -(10**30)]


@given(
    st.lists(
        st.tuples(st.sampled_from(all_keys()), st.sampled_from(BAD_VALUES)), min_size=1, max_size=8
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_bad_leaf_is_named_and_no_other(
    tmp_path: Path, chosen: list[tuple[Key, object]]
) -> None:
    """All problems at once: one for each bad leaf, at its path."""
    tree: dict[str, Any] = {}
    for key, value in chosen:
        level = tree
        for name in ["cluster", *key.path.split(".")[:-1]]:
            level = level.setdefault(name, {})
        level[key.path.rpartition(".")[2]] = copy.deepcopy(value)
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    problems = problems_of(lambda: load_config(path, environ={}, hostname="host"))
    named = {problem.partition(":")[0] for problem in problems}
    assert named == {f"cluster.{key.path}" for key, _ in chosen}


def test_problems_of_all_sources_come_together(tmp_path: Path) -> None:
    problems = problems_of(
        lambda: load_config(
            tmp_path / "missing.yaml",
            environ={"TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS": "x", "TRIO_WORKER__X": "y"},
            overrides=["worker.prewarm.enabled=3", "nothing=4"],
            hostname="host",
        )
    )
    assert len(problems) == 5


@given(st.one_of(st.binary(), st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b'cluster: {worker: {model: "\\ud800"}}')
@example(b"cluster: 1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1:1.0")
@example(b"%YAML 999999999999999999999999.1\n---\na")
@example(b"cluster: {worker: {simulated: {turn_ms: 1e400}}}")
@example(b"cluster: " + b"9" * 10_000)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_raise_anything_but_config_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(text)
    for problem in problems_if_any(partial(load_config, path, environ={}, hostname="host")):
        assert len(problem.splitlines()) == 1


@given(
    name=st.text(max_size=30),
    text=st.text(max_size=30),
    override=st.text(max_size=30),
    key=st.sampled_from(all_keys()),
)
def test_no_override_raises_anything_but_config_error(
    name: str, text: str, override: str, key: Key
) -> None:
    environ = {"TRIO_WORKER__" + name: text, variable_of(key.path): text}
    overrides = [override, f"{override}={text}", f"{key.path}={text}"]
    loading = partial(load_config, None, environ=environ, overrides=overrides, hostname="host")
    for problem in problems_if_any(loading):
        assert len(problem.splitlines()) == 1
