"""The subjects a worker listens and speaks on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

from trio_worker.core.priority import NAMES
from trio_worker.protocol.turn import RequestId

GROUP = "trio-workers"
CANCEL = "inference.cancel"
JOBS = "jobs.inference.>"
"""Every durable job."""
DEAD = "dead.inference.>"
"""Every job that was given up."""
NOBODY = "-"
"""Where a job's caller would stand."""
REPLY_SUBJECT_MAX = 512
"""Longer ones would not leave room for the control subject on the server's line of 4096 bytes."""

_TOKEN = r"[^\s.*>\x00-\x1f\x7f]+"  # noqa: S105 - a pattern
_CONCRETE = re.compile(rf"\A{_TOKEN}(?:\.{_TOKEN})*\Z")


def direct(worker_id: str) -> str:
    return f"inference.{worker_id}"


def shared(model_name: str) -> tuple[str, str]:
    """The subjects served together with the rest of the fleet, in one queue group."""
    return ("inference", f"inference.model.{model_name}")


_BY_CALLER = "inference.by."


def by_caller(caller: str, *, model: str | None = None) -> str:
    """Where requests of one caller go, whom the server's permissions hold to its own subject.

    To any of the fleet, or to those that serve a model; with `*`, those of all callers.
    """
    return f"{_BY_CALLER}{caller}" + ("" if model is None else f".model.{model}")


def shared_by_caller(model_name: str) -> tuple[str, str]:
    """As `shared`, for requests whose subject names the caller: patterns."""
    return (by_caller("*"), by_caller("*", model=model_name))


class Origin(NamedTuple):
    """What the subject says of a request that came in on it."""

    subject: str
    """One of few, to count it by."""
    caller: str | None
    """The token where a caller's name should be; None where the subject has none."""


def origin_of(subject: str) -> Origin:
    """Where a request came in, with the callers' own subjects taken together."""
    if not subject.startswith(_BY_CALLER):
        return Origin(subject, None)
    caller, *rest = subject.removeprefix(_BY_CALLER).split(".")
    return Origin(".".join([by_caller("*"), *rest]), caller)


def for_request(*, worker_id: str | None, model: object, caller: str | None = None) -> str:
    """Where a request is sent: to one worker, to those that serve a model, or to any.

    With a caller, except to one worker, on the subject that names it.
    """
    if worker_id is not None:
        return direct(worker_id)
    named = model if isinstance(model, str) and _CONCRETE.match(model) else None
    if caller is not None:
        return by_caller(caller, model=named)
    return "inference" if named is None else shared(named)[1]


def control(worker_id: str, request_id: RequestId | str) -> str:
    """The control subject of one request; with `*`, of all of this worker's."""
    return f"inference.{worker_id}.ctl.{request_id}"


def is_control(subject: str, worker_id: str) -> bool:
    """Whether a message there is about a request rather than one."""
    return subject == CANCEL or subject.startswith(control(worker_id, ""))


def ping(worker_id: str) -> str:
    return f"worker.{worker_id}.ping"


def stats(worker_id: str) -> str:
    return f"worker.{worker_id}.stats"


def beat(worker_id: str) -> str:
    """Where a worker says how it is; with `*`, where all do."""
    return f"worker.{worker_id}.beat"


def forwarded(worker_id: str, number: int | str) -> str:
    """The reply subject of a request that a worker has handed on: the server's word comes there.

    With `*`, of all that it has handed on.
    """
    return f"inference.{worker_id}.fwd.{number}"


def is_forwarded(subject: str, worker_id: str) -> bool:
    """Whether a message there is the server's word about a request that was handed on."""
    return subject.startswith(forwarded(worker_id, ""))


def job(*, level: str, caller: str | None, model: str) -> str:
    """Where a durable job is published; the model is last, for its name may have dots."""
    return f"jobs.inference.{level}.{caller or NOBODY}.{model}"


def jobs_counted_as(level: str) -> str:
    """What stands for all of one level's jobs where requests are counted by subject."""
    return f"jobs.inference.{level}"


def jobs_of(level: str, model: str) -> str:
    """One level's jobs for one model, whoever asks."""
    return f"jobs.inference.{level}.*.{model}"


def dead(job_subject: str) -> str:
    """Where a job goes that is given up."""
    return f"dead.{job_subject.partition('.')[2]}"


def result(request_id: str) -> str:
    """Where a job's answer is stored."""
    return f"results.inference.{request_id}"


def answer(request_id: str) -> str:
    """Where a job's answer is said when it is stored."""
    return f"answers.inference.{request_id}"


class JobSubject(NamedTuple):
    level: str
    caller: str | None
    model: str


def read_job(subject: str) -> JobSubject | None:
    """What a job's subject says; None if it is none."""
    tokens = subject.split(".", 4)
    if len(tokens) < 5 or tokens[:2] != ["jobs", "inference"] or tokens[2] not in NAMES:
        return None
    _, _, level, caller, model = tokens
    return JobSubject(level, None if caller == NOBODY else caller, model)


def jetstream_inbox(worker_id: str, life: str) -> str:
    """Where JetStream answers a worker; `life` tells it from an earlier one of this id.

    Below its own subject, where it may listen and callers may not speak.
    """
    return f"inference.{worker_id}.js.{life}"


def can_be_in_one(name: str) -> bool:
    """Whether a name, such as a model's, may stand in a subject."""
    return _CONCRETE.match(name) is not None


def may_reply_to(subject: str | None, prefixes: Sequence[str]) -> TypeGuard[str]:
    """Whether an answer may go there: one concrete subject below a permitted prefix."""
    return (
        subject is not None
        and len(subject) <= REPLY_SUBJECT_MAX
        and subject.startswith(tuple(prefixes))
        and _CONCRETE.match(subject) is not None
    )


def probe(worker_id: str, token: str) -> str:
    """Where the server says that a message met nobody; with `*`, of all of this worker's."""
    return f"inference.{worker_id}.probe.{token}"


# --- those of mlx-serving's controller ------------------------------------------------------

REGISTER = "worker.register"
HEARTBEAT = "worker.heartbeat"
DEREGISTER = "worker.deregister"


def from_controllers(member_id: str) -> str:
    """Where controllers send a worker's requests."""
    return f"worker.{member_id}.inference"


def to_controllers(request_id: RequestId) -> str:
    """Where a controller waits for an answer."""
    return f"response.{request_id}"
