"""Readings: frozen values of counters and states, taken without waiting."""

from __future__ import annotations

from dataclasses import dataclass

from trio_worker.ports import BrokerStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReading:
    id: str
    version: str
    state: str
    """`loading`, `ready`, `restarting` (the engine is) or `draining`."""
    uptime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueReading:
    depth: int
    """Requests that hold a place: being tokenised or queued."""
    max_depth: int
    is_full: bool
    by_priority: dict[str, int]
    promotions: int
    waiting_for_place: int
    """Only with `reject_when_full: false`."""
    callers: int
    """Of whom requests are queued; all that name nobody are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReading:
    running: int
    max_batch_size: int
    turns: int
    mean_batch_size: float
    """Sequences that got a token, per decode step."""
    max_batch_seen: int
    last_formation_ms: float
    by_trigger: dict[str, int]
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesReading:
    memory_mb: float
    reserved_mb: float
    """The longest caches that the running requests may come to hold."""
    can_accept_request: bool
    under_pressure: bool
    pressure: str
    """`normal`, `soft` or `critical`."""
    steps: list[str]
    """The steps of degradation in force, in their order."""
    degradations: dict[str, int]
    """How often each step has begun."""
    available_mb: float
    limits: dict[str, int]

    @property
    def line(self) -> str:
        """For people: how much of the limits is used, and what is done about it."""
        soft_mb, hard_mb = self.limits["max_memory_mb"], self.limits["critical_memory_mb"]
        steps = f"; steps in force: {', '.join(self.steps)}" if self.steps else ""
        return (
            f"memory pressure {self.pressure}: {self.memory_mb:.0f} MB in use, "
            f"limits {soft_mb} and {hard_mb} MB{steps}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    pid: int | None
    state: str
    model: str
    restarts: int
    resumed: int
    context_length: int | None
    cache_bytes_per_token: int | None
    device: str | None
    memory_active_mb: float
    memory_cache_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of the last 1024 values; null where there is none yet."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsReading:
    in_flight: int
    completed: int
    by_outcome: dict[str, int]
    by_stage: dict[str, int]
    """Of those in flight."""
    dropped: int
    """Messages without a permitted reply subject: never run, never answered."""
    queue_wait_ms: Percentiles
    time_to_first_token_ms: Percentiles
    inter_token_ms: Percentiles
    request_ms: Percentiles
    cancel_ms: Percentiles
    """From the end of a cancelled request to its slot being free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensReading:
    prompt: int
    cached: int
    """Of the prompts', those taken from the prefix cache."""
    generated: int
    per_second: float
    """Generated, over the last ten seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsReading:
    """Of durable jobs."""

    beside: int
    """Those that are looked up, or whose answer is being stored: no requests in flight."""
    events: dict[str, int]
    """What has become of them, by the `what` of `jobs_total`."""
    trouble: str | None
    """What stands in the way, for people; requests that come directly go on all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlightReading:
    """One request in flight, without anything of its content."""

    request_id: str
    stage: str
    priority: str
    age_s: float
    prompt_tokens: int
    prefilled: int
    tokens: int
    max_tokens: int
    resumed: int
    preempted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReading:
    """How this worker shares work with others."""

    others: int
    """Workers on this NATS that were heard of lately, of whatever model."""
    handed_on: dict[str, int]
    """Requests that were passed to another worker, by why."""
    taken_over: int
    """Requests admitted that another worker had passed on."""
    returned: int
    """Of those handed on, the ones that nobody had taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReading:
    """One worker of the fleet, as of its last beat."""

    id: str
    model: str
    slots: int
    in_flight: int
    queued: int
    accepting: bool
    leaving: bool
    version: str
    age_s: float
    """Of the beat; 0 for the worker that says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything the worker says about itself; `/stats` and `worker.{id}.stats` carry it."""

    worker: WorkerReading
    queue: QueueReading
    batch: BatchReading
    resources: ResourcesReading
    engine: EngineReading
    requests: RequestsReading
    tokens: TokensReading
    fleet: FleetReading
    nats: BrokerStatistics
    jobs: JobsReading | None = None
    """None where none are taken."""
