"""The keys of cluster.yaml and their defaults: what a valid file may say."""

from __future__ import annotations

import pytest
from support.configurations import (
    DEFAULTS,
    Load,
    load_fixture,  # noqa: F401 - a fixture
    problems_of,
    value_at,
)
from support.paths import REPOSITORY

from trio_worker import config
from trio_worker.config import Config, load_config


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


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ("[]", ()),
        ('["*"]', ("*",)),
        ("[https://chat.example, app://x]", ("https://chat.example", "app://x")),
    ],
)
def test_a_page_is_named_by_its_origin(load: Load, given: str, origins: tuple[str, ...]) -> None:
    assert load(f"cluster: {{gateway: {{cors_origins: {given}}}}}").gateway.cors_origins == origins


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/path", "null", ""])
def test_what_is_no_origin_is_said(load: Load, origin: str) -> None:
    """A browser would send nothing that it is compared with."""
    (problem,) = problems_of(lambda: load("cluster:", f'gateway.cors_origins=["{origin}"]'))
    assert problem.startswith("cluster.gateway.cors_origins: ")
    assert "an origin such as https://chat.example" in problem


def test_tls_is_off_unless_it_is_there(load: Load) -> None:
    assert DEFAULTS.nats.tls is None
    assert load("cluster: {nats: {tls: }}").nats.tls is None
    assert load("cluster: {nats: {tls: {}}}").nats.tls == config.TlsConfig()
    assert load("cluster: {nats: {tls: }}", "nats.tls.ca_file=ca.pem").nats.tls == (
        config.TlsConfig(ca_file="ca.pem")
    )


@pytest.mark.parametrize("written", ["off", '"off"', "false"])
def test_off_needs_no_quotes_though_yaml_takes_it_for_a_truth_value(
    load: Load, written: str
) -> None:
    assert load(f"cluster: {{worker: {{tools: {written}}}}}").worker.tools == "off"
    (problem,) = problems_of(lambda: load("cluster: {worker: {tools: on}}"))
    assert "true is a truth value, not one of auto, off, prompt" in problem
