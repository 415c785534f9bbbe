"""The subjects a worker listens and speaks on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeGuard

from trio_worker.protocol.turn import RequestId

GROUP = "trio-workers"
CANCEL = "inference.cancel"
REPLY_SUBJECT_MAX = 512
"""Longer ones would not leave room for the control subject on the server's line of 4096 bytes."""

_TOKEN = r"[^\s.*>\x00-\x1f\x7f]+"  # noqa: S105 - a pattern
_CONCRETE = re.compile(rf"\A{_TOKEN}(?:\.{_TOKEN})*\Z")


def direct(worker_id: str) -> str:
    return f"inference.{worker_id}"


def shared(model_name: str) -> tuple[str, str]:
    """The subjects served together with the rest of the fleet, in one queue group."""
    return ("inference", f"inference.model.{model_name}")


def for_request(*, worker_id: str | None, model: object) -> str:
    """Where a caller sends a request: to one worker, to those that serve a model, or to any."""
    if worker_id is not None:
        return direct(worker_id)
    if isinstance(model, str) and _CONCRETE.match(model):
        return shared(model)[1]
    return "inference"


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


def may_reply_to(subject: str | None, prefixes: Sequence[str]) -> TypeGuard[str]:
    """Whether an answer may go there: one concrete subject below a permitted prefix."""
    return (
        subject is not None
        and len(subject) <= REPLY_SUBJECT_MAX
        and subject.startswith(tuple(prefixes))
        and _CONCRETE.match(subject) is not None
    )
