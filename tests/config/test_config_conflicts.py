"""Values that are each allowed and do not go together."""

from __future__ import annotations

import pytest
from support.configurations import (
    Load,
    load_fixture,  # noqa: F401 - a fixture
    problems_of,
)

from trio_worker.config import load_config


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
        (["gateway.port=1", "nats.dialects=[mlx-serving]"], "gateway.port", "expected null"),
        (["gateway.host=0.0.0.0"], "gateway.host", "a file with keys in cluster.gateway.keys_file"),
        (["gateway.host=::"], "gateway.host", "such as 127.0.0.1"),
        (["gateway.host=chat.example"], "gateway.host", "from other machines by everybody"),
        (["fleet.forget_after_ms=1999"], "fleet.forget_after_ms",
         "less than twice cluster.fleet.beat_interval_ms, which is 1000"),
        (["nats.jetstream.results=INFERENCE"], "nats.jetstream.results", "a stream of its own"),
        (["nats.jetstream.dead=RESULTS"], "nats.jetstream.dead", "nats.jetstream.results, too"),
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
        ["fleet.forget_after_ms=2000"],
        ["gateway.host=::1"],
        ["gateway.host=localhost", "gateway.port=0"],
        ["gateway.host=0.0.0.0", "gateway.keys_file=keys"],
    ],
)
def test_values_that_go_together(overrides: list[str]) -> None:
    load_config(None, environ={}, overrides=overrides, hostname="host")


def test_a_bad_value_is_not_compared_with_another_one(load: Load) -> None:
    """One mistake, one message."""
    text = "cluster: {worker: {resource_limits: {max_memory_mb: 99999, critical_memory_mb: x}}}"
    (problem,) = problems_of(lambda: load(text))
    assert problem.startswith("cluster.worker.resource_limits.critical_memory_mb: ")
