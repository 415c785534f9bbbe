"""What a worker tells a controller of itself, in the form of the controller's own schema.

The controller checks nothing of it and uses the id, the models, the status, the timestamps and
`activeRequests`; the rest is shown.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from enum import StrEnum

import msgspec

_PORT = 8080
"""What mlx-serving's workers name where none is configured; nobody connects to it."""
_PORT_MIN = 1024
_GB = 2**30


class Status(StrEnum):
    """Requests go to who is online, and to nobody else."""

    ONLINE = "online"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a worker is."""

    active: int
    """Requests that run or wait."""
    handled: int
    """Requests that have got their last message."""
    mean_latency_ms: float
    """Of these."""
    memory_bytes: int
    cpu_percent: float


class _Skills(msgspec.Struct, frozen=True, rename="camel"):
    available_models: tuple[str, ...]
    model_paths: dict[str, str]
    total_model_size: int
    last_scanned: int


class _Metrics(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    cpu_usage_percent: float
    memory_used_gb: float = msgspec.field(name="memoryUsedGB")
    gpu_utilization_percent: float
    active_requests: int
    total_requests_handled: int
    avg_latency_ms: float
    models_loaded: tuple[str, ...]


class _Registration(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    worker_id: str
    hostname: str
    ip: str
    port: int
    skills: _Skills
    status: Status
    timestamp: int


class _Heartbeat(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    worker_id: str
    status: Status
    metrics: _Metrics
    timestamp: int


class _Deregistration(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    worker_id: str
    timestamp: int


_encode = msgspec.json.Encoder().encode


def member_id(worker_id: str) -> str:
    """The UUID by which controllers know a worker: always the same for the same id."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"trio-worker:{worker_id}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What does not change about a worker, and how it is told. Times are seconds since 1970."""

    id: str
    """As `member_id` makes it."""
    hostname: str
    ip: str
    port: int | None
    """That of its monitoring pages, if they have one that is known."""
    model_name: str
    model: str
    """Where the model comes from."""
    loaded_at: float

    def registration(self, status: Status, *, now: float) -> bytes:
        """Makes a controller know the worker, also one that has been restarted."""
        return _encode(
            _Registration(
                worker_id=self.id,
                hostname=self.hostname,
                ip=self.ip,
                port=self.port if self.port is not None and self.port >= _PORT_MIN else _PORT,
                skills=_Skills(
                    available_models=(self.model_name,),
                    model_paths={self.model_name: self.model},
                    total_model_size=0,
                    last_scanned=_ms(self.loaded_at),
                ),
                status=status,
                timestamp=_ms(now),
            )
        )

    def heartbeat(self, status: Status, load: Load, *, now: float) -> bytes:
        """Keeps the worker from being taken for gone. What cannot be read of a GPU is 0."""
        return _encode(
            _Heartbeat(
                worker_id=self.id,
                status=status,
                metrics=_Metrics(
                    cpu_usage_percent=min(100.0, max(0.0, _finite(load.cpu_percent))),
                    memory_used_gb=round(load.memory_bytes / _GB, 3),
                    gpu_utilization_percent=0.0,
                    active_requests=load.active,
                    total_requests_handled=load.handled,
                    avg_latency_ms=round(_finite(load.mean_latency_ms), 3),
                    models_loaded=(self.model_name,),
                ),
                timestamp=_ms(now),
            )
        )

    def deregistration(self, *, now: float) -> bytes:
        """Makes a controller forget the worker; what runs goes on."""
        return _encode(_Deregistration(worker_id=self.id, timestamp=_ms(now)))


def _ms(seconds: float) -> int:
    """A whole number: the controller crashes over a timestamp that is a text."""
    return round(1000 * seconds)


def _finite(value: float) -> float:
    """JSON has no other numbers: a controller would drop the whole message."""
    return value if math.isfinite(value) else 0.0
