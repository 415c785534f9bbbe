"""What a configuration says that is allowed, but probably not meant."""

from __future__ import annotations

from collections.abc import Iterator

from trio_worker.config.hosts import is_loopback
from trio_worker.config.keys import shown
from trio_worker.config.secrets import files_with_secrets, is_readable_by_all
from trio_worker.config.sections import Config, GatewayConfig, JetStreamConfig, QueueConfig

LEASE_LEAST_MS = 5_000
"""Below this, what a server loses of a lease by rounding matters."""


def warnings_about(config: Config, *, total_memory_bytes: int) -> list[str]:
    """What is allowed but probably not meant, one sentence each."""
    total_mb = total_memory_bytes // 2**20
    limits = config.worker.resource_limits
    found = [
        f"cluster.worker.resource_limits.{name}: {value} MB is more than this machine's "
        f"{total_mb} MB, so the machine runs out of memory before the limit takes effect"
        for name, value in (
            ("max_memory_mb", limits.max_memory_mb),
            ("critical_memory_mb", limits.critical_memory_mb),
        )
        if value > total_mb
    ]
    if config.worker.engine.prefix_cache_mb >= limits.max_memory_mb:
        found.append(
            f"cluster.worker.engine.prefix_cache_mb: {config.worker.engine.prefix_cache_mb} MB "
            f"fill max_memory_mb ({limits.max_memory_mb}) alone"
        )
    if limits.degraded_max_tokens > config.worker.requests.max_tokens_limit:
        found.append(
            f"cluster.worker.resource_limits.degraded_max_tokens: {limits.degraded_max_tokens} "
            f"is above max_tokens_limit ({config.worker.requests.max_tokens_limit}) "
            "and has no effect"
        )
    found += _about_callers(config.worker.request_queue)
    found += _about_origins(config.gateway)
    found += [
        f"cluster.{path}: {shown(name)} can be read by every user of this machine; "
        f"`chmod o-r` keeps the secret in it"
        for path, name in files_with_secrets(config.nats).items()
        if is_readable_by_all(name)
    ]
    found += _without_effect(config.nats.jetstream)
    found += _about_leases(config.nats.jetstream)
    monitoring = config.worker.monitoring
    if monitoring.port is not None and not is_loopback(monitoring.host):
        found.append(
            f"cluster.worker.monitoring.host: {shown(monitoring.host)} can be reached from other "
            "machines, and the monitoring pages ask for no password"
        )
    return found


def _about_callers(queue: QueueConfig) -> Iterator[str]:
    most = queue.max_depth if queue.reject_when_full else 2 * queue.max_depth
    if queue.max_per_caller is None:
        return
    path = f"cluster.worker.request_queue.max_per_caller: {queue.max_per_caller}"
    if not queue.enabled:
        yield f"{path} has no effect while cluster.worker.request_queue.enabled is false"
    elif queue.max_per_caller >= most:
        yield f"{path} has no effect, since there are {most} places"


def _about_origins(gateway: GatewayConfig) -> Iterator[str]:
    if "*" in gateway.cors_origins and gateway.keys_file is None:
        yield (
            'cluster.gateway.cors_origins: "*" without cluster.gateway.keys_file lets every page '
            "that a user of this machine looks at ask the model"
        )


def _about_leases(jetstream: JetStreamConfig) -> Iterator[str]:
    if jetstream.enabled and jetstream.ack_wait_ms < LEASE_LEAST_MS:
        yield (
            f"cluster.nats.jetstream.ack_wait_ms: {jetstream.ack_wait_ms} is below "
            f"{LEASE_LEAST_MS}: a restart of nats-server, which keeps such times in whole seconds, "
            "may give a job to a second worker while the first is at it"
        )


def _without_effect(jetstream: JetStreamConfig) -> Iterator[str]:
    """What is said of JetStream while it is off."""
    if jetstream.enabled:
        return
    default = JetStreamConfig()
    for name in jetstream.__struct_fields__:
        value = getattr(jetstream, name)
        if value != getattr(default, name):
            yield (
                f"cluster.nats.jetstream.{name}: {shown(value)} has no effect while "
                "cluster.nats.jetstream.enabled is false"
            )
