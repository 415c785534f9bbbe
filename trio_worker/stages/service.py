"""Answers to `$SRV.PING`, `INFO` and `STATS`: the worker as a NATS micro service (ADR-32).

The service's instance id is the worker's id, which is used once. Its endpoints are the subjects
that requests come in on, each with its own counts; the snapshot is the data of the worker's own
subject. Everything happens inside the broker's callback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeAlias

import msgspec
import trio
from loguru import logger

from trio_worker import __version__
from trio_worker.config import WorkerConfig
from trio_worker.errors import MessageTooLarge
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.monitoring.recent import Recent
from trio_worker.monitoring.snapshot import Snapshot
from trio_worker.ports import Broker, Message
from trio_worker.protocol.turn import EngineInfo
from trio_worker.wire import subjects

NAME = "trio-worker"
_TYPE = "io.nats.micro.v1.{}_response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A subject that requests come in on."""

    name: str
    subject: str
    queue_group: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


def endpoints_of(worker: WorkerConfig) -> tuple[Endpoint, ...]:
    shared = (
        *subjects.shared(worker.model_name),
        *subjects.shared_by_caller(worker.model_name),
    )
    names = ("fleet", "model", "fleet-by-caller", "model-by-caller")
    return (
        Endpoint(name="worker", subject=subjects.direct(worker.id)),
        *(
            Endpoint(name=name, subject=subject, queue_group=subjects.GROUP)
            for name, subject in zip(names, shared, strict=True)
        ),
    )


async def run_service(
    *,
    broker: Broker,
    worker: WorkerConfig,
    info: EngineInfo,
    counters: RequestCounters,
    snapshot: Callable[[], Snapshot],
    reply_prefixes: tuple[str, ...],
    started_at: float,
    also: tuple[Endpoint, ...] = (),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled. Started when the subscriptions stand.

    `also` are subjects of other dialects that requests come in on. `started_at` is by the wall
    clock, in seconds since 1970. Cancelled: the subscriptions stay,
    and answers are given until the connection ends.
    """
    service = _Service(
        worker=worker,
        info=info,
        counters=counters,
        snapshot=snapshot,
        started_at=started_at,
        also=also,
    )

    def answer(compute: _Compute, recent: Recent[_Bodies], message: Message) -> None:
        if not subjects.may_reply_to(message.reply, reply_prefixes):
            return
        for body in recent.get(lambda: _encoded(compute())):
            try:
                broker.publish(Message(subject=message.reply, body=body))
            except MessageTooLarge:
                continue
            return
        logger.debug("The server's max_payload is too small for an answer to $SRV")

    for verb, compute in (
        ("PING", service.ping),
        ("INFO", service.info),
        ("STATS", service.stats),
    ):
        sink = partial(answer, compute, Recent[_Bodies]())
        for subject in (
            f"$SRV.{verb}",
            f"$SRV.{verb}.{NAME}",
            f"$SRV.{verb}.{NAME}.{worker.id}",
        ):
            await broker.subscribe(subject, sink)
    task_status.started()
    await trio.sleep_forever()


_Bodies: TypeAlias = tuple[bytes, ...]
"""A choice of answers, encoded, to be tried in turn until one is not too large."""
_Compute: TypeAlias = Callable[[], tuple[Mapping[str, Any], ...]]


def _encoded(choice: tuple[Mapping[str, Any], ...]) -> _Bodies:
    return tuple(map(msgspec.json.encode, choice))


class _Service:
    """The answers: each a choice of bodies, to be tried in turn until one is not too large."""

    def __init__(
        self,
        *,
        worker: WorkerConfig,
        info: EngineInfo,
        counters: RequestCounters,
        snapshot: Callable[[], Snapshot],
        started_at: float,
        also: tuple[Endpoint, ...],
    ) -> None:
        self._endpoints = (*endpoints_of(worker), *also)
        self._counters = counters
        self._snapshot = snapshot
        self._started = datetime.fromtimestamp(started_at, UTC).isoformat().replace("+00:00", "Z")
        self._identity = {
            "name": NAME,
            "id": worker.id,
            "version": __version__,
            "metadata": _metadata(worker, info),
        }

    def ping(self) -> tuple[Mapping[str, Any], ...]:
        return ({"type": _TYPE.format("ping"), **self._identity},)

    def info(self) -> tuple[Mapping[str, Any], ...]:
        about = {
            "type": _TYPE.format("info"),
            **self._identity,
            "description": "Serves a language model to callers on NATS.",
            "endpoints": self._endpoints,
        }
        return (about,)

    def stats(self) -> tuple[Mapping[str, Any], ...]:
        return (self._stats(self._snapshot()), self._stats(None))

    def _stats(self, snapshot: Snapshot | None) -> Mapping[str, Any]:
        own, *shared = self._endpoints
        return {
            "type": _TYPE.format("stats"),
            **self._identity,
            "started": self._started,
            "endpoints": [self._counts(own, snapshot), *(self._counts(each) for each in shared)],
        }

    def _counts(self, endpoint: Endpoint, data: Snapshot | None = None) -> Mapping[str, Any]:
        """Of the requests that have got their terminal message; those in flight are in `data`."""
        counts = self._counters.by_subject[endpoint.subject]
        processing_ns = round(1e9 * counts.processing_s)
        return {
            "name": endpoint.name,
            "subject": endpoint.subject,
            "queue_group": endpoint.queue_group,
            "num_requests": counts.answered,
            "num_errors": counts.failed,
            "last_error": counts.last_error,
            "processing_time": processing_ns,
            "average_processing_time": processing_ns // max(counts.answered, 1),
            "data": data,
        }


def _metadata(worker: WorkerConfig, info: EngineInfo) -> Mapping[str, str]:
    """What a caller needs to know before it sends anything; all text, as ADR-32 wants it."""
    batching = worker.continuous_batching
    values = {
        "worker_id": worker.id,
        "model": worker.model_name,
        "context_length": info.context_length,
        "device": info.device,
        "max_batch_size": batching.max_batch_size if batching.enabled else 1,
        "max_queue_depth": worker.request_queue.max_depth if worker.request_queue.enabled else 0,
        "priority_levels": worker.request_queue.priority_levels,
        "max_tokens_limit": worker.requests.max_tokens_limit,
        "max_prompt_bytes": worker.requests.max_prompt_bytes,
        "timeout_limit_ms": worker.requests.timeout_limit_ms,
        "max_memory_mb": worker.resource_limits.max_memory_mb,
        "critical_memory_mb": worker.resource_limits.critical_memory_mb,
    }
    return {key: str(value) for key, value in values.items()}
