"""What is allowed and probably not meant."""

from __future__ import annotations

import pytest
from support.configurations import DEFAULTS

from trio_worker import config
from trio_worker.config import load_config


def test_the_defaults_raise_no_warning_on_a_machine_that_is_large_enough() -> None:
    assert config.warnings_about(DEFAULTS, total_memory_bytes=16 * 2**30) == []


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["worker.resource_limits.critical_memory_mb=20000"], "resource_limits.critical_memory_mb"),
        (["worker.engine.prefix_cache_mb=8192"], "engine.prefix_cache_mb"),
        (["worker.resource_limits.degraded_max_tokens=5000"], "degraded_max_tokens"),
        (["worker.monitoring.host=0.0.0.0"], "monitoring.host"),
        (['gateway.cors_origins=["*"]'], "gateway.cors_origins"),
        (["worker.request_queue.max_per_caller=100"], "request_queue.max_per_caller"),
        (
            ["worker.request_queue.max_per_caller=3", "worker.request_queue.enabled=false"],
            "request_queue.max_per_caller",
        ),
        (["nats.jetstream.stream=OTHER"], "nats.jetstream.stream"),
        (["nats.jetstream.store_dir=/x"], "nats.jetstream.store_dir"),
        (["nats.jetstream.max_deliver=4"], "nats.jetstream.max_deliver"),
        (["nats.jetstream.ack_wait_ms=1000"], "nats.jetstream.ack_wait_ms"),
        (
            ["nats.jetstream.enabled=true", "nats.jetstream.ack_wait_ms=4999"],
            "nats.jetstream.ack_wait_ms: 4999 is below 5000",
        ),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(overrides: list[str], path: str) -> None:
    loaded = load_config(None, environ={}, overrides=overrides, hostname="host")
    (warning,) = config.warnings_about(loaded, total_memory_bytes=16 * 2**30)
    assert path in warning


def test_limits_above_the_machine_are_warned_about() -> None:
    assert len(config.warnings_about(DEFAULTS, total_memory_bytes=4 * 2**30)) == 2
