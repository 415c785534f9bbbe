"""cluster.yaml: everything wrong is said at once, where it stands and what was expected."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.paths import REPOSITORY

from trio_worker import config
from trio_worker.__main__ import main
from trio_worker.config import (
    Config,
    all_keys,
    load_config,
    load_with_sources,
    strict_yaml,
    variable_of,
)
from trio_worker.config.keys import Key
from trio_worker.errors import ConfigError

DEFAULTS = load_config(None, environ={}, hostname="host")

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a text as the file, which is then named `cluster.yaml` in messages."""

    def load_text(
        text: str | bytes, *overrides: str, read_secrets: bool = True, **environ: str
    ) -> Config:
        path = tmp_path / "cluster.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            return load_config(
                path,
                environ=environ,
                overrides=overrides,
                hostname="host",
                read_secrets=read_secrets,
            )
        except ConfigError as error:
            shortened = [each.replace(str(path), "cluster.yaml") for each in error.problems]
            raise ConfigError(*shortened) from None

    return load_text


def problems_of(loading: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loading()
    return list(caught.value.problems)


def problems_if_any(loading: Callable[[], object]) -> list[str]:
    try:
        loading()
    except ConfigError as error:
        return list(error.problems)
    return []


def tree_with(path: str, value: object) -> dict[str, Any]:
    """A file's content with one value in it."""
    for name in reversed(["cluster", *path.split(".")]):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def value_at(loaded: Config, path: str) -> object:
    value: object = loaded
    for name in path.split("."):
        value = getattr(value, name)
    return value


# --- what is accepted -----------------------------------------------------------------------


def test_the_shipped_file_is_the_defaults() -> None:
    assert load_config(REPOSITORY / "cluster.yaml", environ={}, hostname="host") == DEFAULTS


def test_sections_made_without_a_file_have_the_same_defaults() -> None:
    """Tests build sections directly; they must not differ from what a file would give."""
    assert Config().worker.continuous_batching == DEFAULTS.worker.continuous_batching
    assert Config().nats == DEFAULTS.nats
    assert Config().worker.model_name == DEFAULTS.worker.model_name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("worker.continuous_batching.enabled", True),
        ("worker.continuous_batching.min_batch_size", 1),
        ("worker.continuous_batching.max_batch_size", 8),
        ("worker.continuous_batching.batch_timeout_ms", 50),
        ("worker.continuous_batching.adaptive_timeout", True),
        ("worker.request_queue.enabled", True),
        ("worker.request_queue.max_depth", 100),
        ("worker.request_queue.reject_when_full", True),
        ("worker.request_queue.priority_levels", 3),
        ("worker.resource_limits.max_memory_mb", 8192),
        ("worker.resource_limits.critical_memory_mb", 10240),
        ("worker.resource_limits.check_interval_ms", 5000),
    ],
)
def test_the_keys_of_the_specification_have_its_names_and_defaults(path: str, value: int) -> None:
    assert value_at(DEFAULTS, path) == value


def test_a_file_lays_its_values_over_the_defaults(load: Load) -> None:
    loaded = load("cluster: {worker: {request_queue: {max_depth: 7, aging_ms: null}}}")
    assert loaded.worker.request_queue.max_depth == 7
    assert loaded.worker.request_queue.aging_ms is None
    assert loaded.worker.request_queue.priority_levels == 3


@pytest.mark.parametrize("text", ["cluster:", "cluster: {}", "cluster: {nats: , worker: }"])
def test_an_empty_section_is_its_defaults(load: Load, text: str) -> None:
    """What is left when somebody comments out every key below a section."""
    assert load(text) == DEFAULTS


def test_whole_numbers_are_numbers(load: Load) -> None:
    loaded = load("cluster: {worker: {simulated: {turn_ms: 3}}}")
    assert loaded.worker.simulated.turn_ms == 3.0
    assert type(loaded.worker.simulated.turn_ms) is float


def test_tls_is_off_unless_it_is_there(load: Load) -> None:
    assert DEFAULTS.nats.tls is None
    assert load("cluster: {nats: {tls: }}").nats.tls is None
    assert load("cluster: {nats: {tls: {}}}").nats.tls == config.TlsConfig()
    assert load("cluster: {nats: {tls: }}", "nats.tls.ca_file=ca.pem").nats.tls == (
        config.TlsConfig(ca_file="ca.pem")
    )


# --- three sources --------------------------------------------------------------------------


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


# --- derived values -------------------------------------------------------------------------


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
    assert worker_id not in ("model", "cancel")


# --- one bad value --------------------------------------------------------------------------


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
        ("nats.jetstream.subject", "jobs..x", "a NATS subject"),
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


# --- values that do not go together ---------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["worker.resource_limits.max_memory_mb=20000"], "worker.resource_limits.max_memory_mb",
         "above cluster.worker.resource_limits.critical_memory_mb, which is 10240"),
        (["worker.continuous_batching.min_batch_size=9"],
         "worker.continuous_batching.min_batch_size", "max_batch_size, which is 8"),
        (["worker.requests.default_max_tokens=5000"], "worker.requests.default_max_tokens", "4096"),
        (["worker.requests.timeout_limit_ms=1"], "worker.requests.default_timeout_ms", "is 1"),
        (["worker.continuous_batching.turn_timeout_ms=100"], "worker.engine.token_gap_target_ms",
         "turn_timeout_ms"),
        (["nats.user=a"], "nats.user", "needs cluster.nats.password"),
        (["nats.password=a"], "nats.password", "needs cluster.nats.user"),
        (["nats.token=a", "nats.credentials_file=b"], "nats.token", "one kind of login"),
        (["nats.token_file=a", "nats.credentials_file=b"], "nats.token_file", "one kind of login"),
        (["nats.password_file=a"], "nats.password_file", "needs cluster.nats.user"),
        (["nats.token_file=a", "nats.token=b"], "nats.token_file", "expected one of them"),
        (["nats.password_file=a", "nats.password=b", "nats.user=c"], "nats.password_file",
         "expected one of them"),
        (["nats.url=nats://a:b@localhost", "nats.token=c"], "nats.url", "one kind of login"),
        (["nats.tls.cert_file=a"], "nats.tls.cert_file", "needs cluster.nats.tls.key_file"),
        (["nats.tls.key_file=a"], "nats.tls.key_file", "needs cluster.nats.tls.cert_file"),
        (["nats.embedded=always", "nats.url=nats://example.org"], "nats.embedded", "this machine"),
        (["nats.reply_prefixes=[infer]"], "nats.reply_prefixes", "begin with inference"),
        (["nats.reply_prefixes=[$SYS.]"], "nats.reply_prefixes", "begin with $"),
        (["nats.reply_prefixes=[w]"], "nats.reply_prefixes", "begin with worker."),
        (["nats.dialects=[native, mlx-serving]"], "nats.dialects", "not built yet"),
        (["nats.jetstream.enabled=true"], "nats.jetstream.enabled", "not built yet"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(overrides: list[str], path: str, words: str) -> None:
    (problem,) = problems_of(
        lambda: load_config(None, environ={}, overrides=overrides, hostname="host")
    )
    assert problem.startswith(f"cluster.{path}: ")
    assert words in problem
    assert problem.endswith(f"(--set {overrides[0].partition('=')[0]})")


@pytest.mark.parametrize(
    "overrides",
    [
        ["worker.resource_limits.max_memory_mb=10240"],
        ["nats.user=a", "nats.password=b"],
        ["nats.url=tls://a:b@example.org"],
        ["nats.embedded=always", "nats.url=nats://[::1]:5222"],
        ["nats.reply_prefixes=[_INBOX., _APP, app.replies.]"],
        ["nats.tls.cert_file=a", "nats.tls.key_file=b"],
    ],
)
def test_values_that_go_together(overrides: list[str]) -> None:
    load_config(None, environ={}, overrides=overrides, hostname="host")


def test_a_bad_value_is_not_compared_with_another_one(load: Load) -> None:
    """One mistake, one message."""
    text = "cluster: {worker: {resource_limits: {max_memory_mb: 99999, critical_memory_mb: x}}}"
    (problem,) = problems_of(lambda: load(text))
    assert problem.startswith("cluster.worker.resource_limits.critical_memory_mb: ")


# --- secrets --------------------------------------------------------------------------------

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"cluster: {{nats: {{password: [{SECRET}]}}}}",
        f"cluster: {{nats: {{password: {SECRET}}}}}",
        f"cluster: {{nats: {{token: {SECRET}{'x' * 5000}}}}}",
        f"cluster: {{nats: {{passwrd: {SECRET}}}}}",
        f"cluster: {{password: {SECRET}}}",
        f"cluster: {{nats: {{password: !{SECRET} x}}}}",
        f"cluster: {{nats: {{password: !{SECRET}!x}}}}",
        f"cluster: {{nats: {{password: *{SECRET}}}}}",
        f"cluster: {{nats: {{password: &{SECRET} x}}}}",
        f"cluster: {{nats: {{password: {SECRET}, password: {SECRET}}}}}",
        f"cluster: {{nats: {{url: 'http://u:{SECRET}@host'}}}}",
        f"cluster: {{nats: {{url: 'u:{SECRET}@host'}}}}",
        f"cluster: {{nats: {{url: 'nats://u:{SECRET}@host:x'}}}}",
        f"cluster: {{nats: {{url: 'nats://u:{SECRET}@{'x' * 5000}'}}}}",
        f"cluster: {{nats: {{url: ['nats://u:{SECRET}@host']}}}}",
        f"cluster: {{nats: {{url: 'nats://u:{SECRET}@host', token: x}}}}",
        f'cluster: {{nats: {{password: "{SECRET}',
    ],
)
def test_a_secret_is_in_no_message(load: Load, text: str) -> None:
    assert SECRET not in "\n".join(problems_of(lambda: load(text)))


def test_a_secret_is_in_no_repr(load: Load) -> None:
    by_user = load(f"cluster: {{nats: {{user: u, password: {SECRET}}}}}")
    by_token = load(f"cluster: {{nats: {{token: {SECRET}}}}}")
    by_url = load(f"cluster: {{nats: {{url: 'nats://u:{SECRET}@host:4222'}}}}")
    for loaded in (by_user, by_token, by_url):
        assert SECRET not in f"{loaded!r} {loaded} {loaded.nats!r}"
        assert SECRET not in repr(loaded.nats.__rich_repr__())
        assert SECRET in msgspec.json.encode(loaded).decode()


def secret_file(tmp_path: Path, content: bytes = f"{SECRET}\n".encode()) -> str:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_comes_from_its_file(tmp_path: Path, load: Load, end: str) -> None:
    file = secret_file(tmp_path, f" {SECRET} ü ".encode() + end.encode())
    by_user = load("cluster: {nats: {user: u}}", f"nats.password_file={file}")
    by_token = load("cluster: {}", f"nats.token_file={file}")
    assert by_user.nats.password == f" {SECRET} ü "
    assert by_user.nats.token is None
    assert by_token.nats.token == f" {SECRET} ü "
    assert by_token.nats.password is None
    for loaded in (by_user, by_token):
        assert SECRET not in f"{loaded!r} {loaded.nats!r}"
        assert config.warnings_about(loaded, total_memory_bytes=16 * 2**30) == []


def test_a_secret_is_left_in_its_file_for_who_does_not_need_it(load: Load) -> None:
    path = "/nowhere/secret"
    loaded = load(f"cluster: {{nats: {{token_file: {path}}}}}", read_secrets=False)
    assert loaded.nats.token is None
    assert config.files_with_secrets(loaded.nats) == {"nats.token_file": path}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\r\n", "is empty"),
        (SECRET.encode() + b"\n\n", "more than one line"),
        (SECRET.encode() + b"\nother", "more than one line"),
        (SECRET.encode() + b"\0", "cannot be printed"),
        (SECRET.encode() + b"\xff", "not text in UTF-8"),
        (SECRET.encode() * 1000, "longer than 4096 bytes"),
        (b"x" * 4095 + "ü".encode() * 99, "longer than 4096 bytes"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("name", ["password", "token"])
def test_a_file_without_a_secret_is_named_with_its_key(
    tmp_path: Path, load: Load, name: str, content: bytes | None, words: str
) -> None:
    file = str(tmp_path / "missing") if content is None else secret_file(tmp_path, content)
    beside = ["nats.user=u"] if name == "password" else []
    (problem,) = problems_of(
        lambda: load("cluster: {worker: {}}", *beside, f"nats.{name}_file={file}")
    )
    assert problem.startswith(f"cluster.nats.{name}_file: ")
    assert words in problem
    assert file in problem
    assert problem.endswith(f"(--set nats.{name}_file)")
    assert SECRET not in problem


def test_a_folder_in_the_place_of_a_secret_is_named(tmp_path: Path, load: Load) -> None:
    (problem,) = problems_of(lambda: load("cluster: {worker: {}}", f"nats.token_file={tmp_path}"))
    assert "directory" in problem


def test_a_secret_that_everybody_can_read_is_warned_about(tmp_path: Path, load: Load) -> None:
    path = Path(secret_file(tmp_path))
    for name in ("token_file", "credentials_file", "nkey_seed_file"):
        loaded = load("cluster: {worker: {}}", f"nats.{name}={path}")
        path.chmod(0o640)
        assert config.warnings_about(loaded, total_memory_bytes=16 * 2**30) == []
        path.chmod(0o644)
        (warning,) = config.warnings_about(loaded, total_memory_bytes=16 * 2**30)
        assert warning.startswith(f"cluster.nats.{name}: ")
        assert str(path) in warning
        assert SECRET not in warning


# --- files that are not what they should be -------------------------------------------------


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


@given(st.text(alphabet="{}[]:,-\"'#&*!|>%@`?<=\n \tab01~.", max_size=60))
@settings(max_examples=300)
def test_no_scraps_of_yaml_raise_anything_but_not_yaml(text: str) -> None:
    with contextlib.suppress(strict_yaml.NotYaml):
        strict_yaml.parse(b"cluster: " + text.encode())


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


# --- shown whole ----------------------------------------------------------------------------


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


def test_what_check_config_prints_is_a_file_that_it_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    asked = ["check-config", "--set", "worker.model=a\nb", "--set", "nats.jetstream.stream=S"]
    assert main(asked) == 0
    first = capsys.readouterr()
    path.write_text(first.out)
    assert main(["check-config", "--config", str(path)]) == 0
    second = capsys.readouterr()
    assert first.out.startswith("# the defaults: valid.")
    assert second.out.startswith(f"# {path}: valid.")
    assert yaml.safe_load(first.out) == yaml.safe_load(second.out)
    assert "nats.jetstream.stream" in second.err


def test_a_file_name_cannot_end_its_remark(tmp_path: Path) -> None:
    path = tmp_path / "a\nworker: b"
    path.write_text("cluster: {worker: {model: m}}")
    assert remarks_of(shown_whole(path)).keys() == remarks_of(shown_whole(None)).keys()


# --- warnings -------------------------------------------------------------------------------


def test_the_defaults_raise_no_warning_on_a_machine_that_is_large_enough() -> None:
    assert config.warnings_about(DEFAULTS, total_memory_bytes=16 * 2**30) == []


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["worker.resource_limits.critical_memory_mb=20000"], "resource_limits.critical_memory_mb"),
        (["worker.engine.prefix_cache_mb=8192"], "engine.prefix_cache_mb"),
        (["worker.resource_limits.degraded_max_tokens=5000"], "degraded_max_tokens"),
        (["worker.monitoring.host=0.0.0.0"], "monitoring.host"),
        (["nats.jetstream.stream=OTHER"], "nats.jetstream.stream"),
        (["nats.jetstream.subject=jobs.>"], "nats.jetstream.subject"),
        (["nats.jetstream.max_deliver=4"], "nats.jetstream.max_deliver"),
        (["nats.jetstream.ack_wait_ms=1"], "nats.jetstream.ack_wait_ms"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(overrides: list[str], path: str) -> None:
    loaded = load_config(None, environ={}, overrides=overrides, hostname="host")
    (warning,) = config.warnings_about(loaded, total_memory_bytes=16 * 2**30)
    assert path in warning


def test_limits_above_the_machine_are_warned_about() -> None:
    assert len(config.warnings_about(DEFAULTS, total_memory_bytes=4 * 2**30)) == 2


# --- the schema -----------------------------------------------------------------------------


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
