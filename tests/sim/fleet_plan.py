"""From a seed to a fleet, what it is asked, and what befalls its members."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from trio_worker.core.priority import NAMES

from .plan import MODEL_NAME, VOCABULARY, WORDS

CALLERS = ("app-a", "app-b", None)
TENANTS = 3
PATIENT_MS = 240_000
"""Nobody's deadline ends a request here: what goes wrong has another reason."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One worker of the fleet; its id stays when it is started again."""

    worker_id: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FleetCall:
    """One request to any worker."""

    at: float
    request_id: str
    subject: str
    fields: dict[str, Any]

    @property
    def inbox(self) -> str:
        return f"_INBOX.{self.request_id}"

    @property
    def body(self) -> bytes:
        return json.dumps(self.fields).encode()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, published into the stream."""

    at: float
    request_id: str
    level: str
    caller: str | None
    fields: dict[str, Any]

    @property
    def body(self) -> bytes:
        return json.dumps(self.fields).encode()


@dataclass(frozen=True, kw_only=True)
class Befalling:
    """Something that befalls a member, or where `member` is None, all."""

    at: float
    what: str
    member: str | None = None
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    seed: int
    members: tuple[Member, ...]
    calls: tuple[FleetCall, ...]
    jobs: tuple[Job, ...] = ()
    befallings: tuple[Befalling, ...] = ()
    ack_wait_s: float = 5.0
    max_deliver: int = 3
    vocabulary: int = VOCABULARY

    @property
    def has_jobs(self) -> bool:
        return bool(self.jobs)

    def is_troubled_by(self, *whats: str) -> bool:
        return any(each.what in whats for each in self.befallings)


def make_fleet_plan(seed: int) -> FleetPlan:
    rng = random.Random(f"fleet {seed}")
    duration_s = rng.uniform(2, 12)
    ids = [f"w{number}" for number in range(1, rng.choice((2, 3, 3, 4)) + 1)]
    jobs = _jobs(rng, duration_s) if rng.random() < 0.6 else []
    ack_wait_s, max_deliver = rng.choice((5.0, 8.0)), rng.choice((1, 2, 3))
    common = (
        f"nats.jetstream.enabled={'true' if jobs else 'false'}",
        f"nats.jetstream.ack_wait_ms={round(1000 * ack_wait_s)}",
        f"nats.jetstream.max_deliver={max_deliver}",
        f"fleet.hand_on={'true' if rng.random() < 0.85 else 'false'}",
        f"worker.request_queue.max_depth={rng.choice((1, 2, 8, 20))}",
        f"worker.drain_timeout_ms={rng.choice((200, 2000, 30_000))}",
        "worker.requests.default_max_tokens=12",
        "worker.requests.default_timeout_ms=60000",
        "worker.requests.refuse_unmeetable=false",
        f"worker.simulated.vocabulary={VOCABULARY}",
    )
    slow = rng.choice(ids) if rng.random() < 0.4 else None
    turn_ms = rng.choice((5, 20, 40))
    members = tuple(
        Member(
            worker_id=each,
            overrides=(
                *common,
                f"worker.id={each}",
                f"worker.continuous_batching.max_batch_size={rng.choice((1, 2, 4))}",
                f"worker.simulated.turn_ms={turn_ms * (2.5 if each == slow else 1)}",
            ),
        )
        for each in ids
    )
    return FleetPlan(
        seed=seed,
        members=members,
        calls=_calls(rng, duration_s),
        jobs=tuple(jobs),
        befallings=tuple(_befallings(rng, ids, duration_s)),
        ack_wait_s=ack_wait_s,
        max_deliver=max_deliver,
    )


def _calls(rng: random.Random, duration_s: float) -> tuple[FleetCall, ...]:
    """Conversations that share their beginnings, and single requests."""
    calls = []
    burst_at = rng.uniform(0, duration_s)
    for number in range(rng.randint(3, 60)):
        caller = rng.choice(CALLERS)
        subject = rng.choice(("inference", "inference", f"inference.model.{MODEL_NAME}"))
        if caller is not None and rng.random() < 0.4:
            subject = f"inference.by.{caller}"
        at = rng.choice((burst_at, rng.uniform(0, duration_s)))
        request_id = f"r{number}"
        fields = {**_ask(rng), "request_id": request_id, "timeout_ms": PATIENT_MS}
        fields["stream"] = rng.random() < 0.5
        if caller is not None:
            fields["caller"] = caller
        calls.append(FleetCall(at=at, request_id=request_id, subject=subject, fields=fields))
    return tuple(sorted(calls, key=lambda call: call.at))


def _jobs(rng: random.Random, duration_s: float) -> list[Job]:
    jobs = []
    for number in range(rng.randint(3, 40)):
        request_id = f"job{number}"
        fields = {**_ask(rng), "request_id": request_id, "timeout_ms": PATIENT_MS}
        if rng.random() < 0.06:
            fields["max_tokens"] = -1  # an error that is its answer
        if rng.random() < 0.3:
            del fields["seed"]
        jobs.append(
            Job(
                at=rng.uniform(0, duration_s),
                request_id=request_id,
                level=rng.choice(NAMES),
                caller=rng.choice(CALLERS),
                fields=fields,
            )
        )
    return sorted(jobs, key=lambda job: job.at)


def _ask(rng: random.Random) -> dict[str, Any]:
    tenant = rng.randrange(TENANTS)
    system = " ".join(f"{word}{tenant}" for word in WORDS * rng.choice((1, 6)))
    text = " ".join(rng.choice(WORDS) for _ in range(rng.choice((1, 5, 40))))
    return {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
        "max_tokens": rng.choice((1, 8, 30, 90)),
        "seed": rng.randrange(1000),
    }


def _befallings(rng: random.Random, ids: list[str], duration_s: float) -> list[Befalling]:
    def when() -> float:
        return rng.uniform(0.2, duration_s)

    found: list[Befalling] = []
    for member in ids:
        if rng.random() < 0.4:
            at, back = when(), rng.choice((0.2, 2.0, 8.0))
            what, undone = rng.choice(
                (
                    ("kill", "start"),
                    ("kill", "start"),
                    ("stop", "start"),
                    ("disconnect", "reconnect"),
                    ("freeze", "thaw"),
                )
            )
            found.append(Befalling(at=at, what=what, member=member))
            found.append(Befalling(at=at + back, what=undone, member=member))
        if rng.random() < 0.2:
            found.append(Befalling(at=when(), what="crash", member=member))
    if rng.random() < 0.15:
        at = when()
        for number, member in enumerate(ids):
            found.append(Befalling(at=at + 3 * number, what="stop", member=member))
            found.append(Befalling(at=at + 3 * number + 1.5, what="start", member=member))
    if len(ids) > 2 and rng.random() < 0.15:
        at = when()
        away = ids[: len(ids) // 2]
        found += [Befalling(at=at, what="split", member=member) for member in away]
        found.append(Befalling(at=at + rng.choice((0.5, 4.0, 9.0)), what="heal"))
    if rng.random() < 0.12:
        at = when()
        found += [Befalling(at=at, what="disconnect", member=member) for member in ids]
        found.append(Befalling(at=at + 0.3, what="forget"))
        found += [Befalling(at=at + 0.5, what="reconnect", member=member) for member in ids]
    if rng.random() < 0.15:
        at = when()
        found.append(Befalling(at=at, what="slow", value=rng.choice((0.001, 0.05))))
        found.append(Befalling(at=at + 2, what="slow"))
    return sorted(found, key=lambda each: each.at)
