"""The streams and consumers of jobs: how they are made, and what they have to be. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trio_worker.jetstream.api import NS, PRIORITY_GROUP, Json
from trio_worker.wire import subjects

DUPLICATES_S = 600
"""For how long a stream knows the `Nats-Msg-Id` of what it has taken: who is not sure whether a
message was stored may send it again for so long."""
KEEP_JOBS_S = 7 * 86_400
"""How long a job waits for somebody to do it."""
KEEP_DEAD_S = 30 * 86_400
JOBS_BYTES_MAX = 2**30
RESULTS_BYTES_MAX = 2 * 2**30
DEAD_BYTES_MAX = 256 * 2**20
"""The server sets these aside when the stream is made, of three quarters of the free disk."""
ACK_PENDING_MAX = 10_000
"""Jobs of one level and model that may be under way at a time, in the whole fleet."""
WAITING_MAX = 4_096
"""Pulls that may wait at one consumer: one for each worker."""

_NOT_IN_NAMES = re.compile(r"[.*>\s/\\]")


def jobs_stream(name: str) -> Json:
    """Jobs that wait or are under way; an acknowledgement takes one out.

    `discard: new` makes the server refuse what does not fit rather than drop what waits.
    """
    return {
        "name": name,
        "subjects": [subjects.JOBS],
        "retention": "workqueue",
        "storage": "file",
        "discard": "new",
        "max_age": KEEP_JOBS_S * NS,
        "max_bytes": JOBS_BYTES_MAX,
        "duplicate_window": DUPLICATES_S * NS,
        "allow_msg_ttl": True,
        # Who goes on with a file of jobs looks which of them are there.
        "allow_direct": True,
    }


def results_stream(name: str, *, keep_s: int) -> Json:
    """What jobs have been answered, each once; what is stored goes out to who listens, too.

    When it is full it refuses: a worker keeps its answer and says so, rather than an answer that
    nobody has read yet making room.
    """
    return {
        "name": name,
        "subjects": [subjects.result("*")],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_age": keep_s * NS,
        "max_bytes": RESULTS_BYTES_MAX,
        "duplicate_window": min(DUPLICATES_S, keep_s) * NS,
        "allow_direct": True,
        "republish": {
            "src": subjects.result("*"),
            "dest": subjects.answer("{{wildcard(1)}}"),
        },
    }


def dead_stream(name: str) -> Json:
    """Jobs that were given up, as they were, with the reason; the oldest make room for new ones."""
    return {
        "name": name,
        "subjects": [subjects.DEAD],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_age": KEEP_DEAD_S * NS,
        "max_bytes": DEAD_BYTES_MAX,
        "duplicate_window": DUPLICATES_S * NS,
        "allow_direct": True,
    }


def consumer_name(level: str, model: str) -> str:
    """Of the durable consumer for one level's jobs for one model."""
    return f"{level}-{_NOT_IN_NAMES.sub('_', model)}"


def job_consumer(level: str, model: str, *, ack_wait_s: float) -> Json:
    """The durable consumer that all workers of this model pull this level's jobs from.

    It has no `max_deliver`: the server would leave what is over it in the stream for ever, given
    to nobody; so workers count.
    """
    return {
        "durable_name": consumer_name(level, model),
        "filter_subject": subjects.jobs_of(level, model),
        "ack_policy": "explicit",
        "ack_wait": round(ack_wait_s * NS),
        "max_deliver": -1,
        "max_ack_pending": ACK_PENDING_MAX,
        "max_waiting": WAITING_MAX,
        "priority_groups": [PRIORITY_GROUP],
        "priority_policy": "prioritized",
    }


def faults_of(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Why a stream that is there cannot be what is `wanted`; limits are their owner's matter.

    Only what would lose or hide something counts.
    """
    return list(_faults_of(found, wanted))


def _faults_of(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    missing = set(wanted["subjects"]) - set(found.get("subjects") or ())
    if missing:
        yield f"it does not take the subjects {', '.join(sorted(missing))}"
    for name in ("retention", "storage"):
        if found.get(name) != wanted[name]:
            yield f"{name} is {found.get(name)}, and has to be {wanted[name]}"
    # Of a work queue nothing is read but by its consumers.
    is_read = wanted["retention"] == "limits" and wanted.get("allow_direct")
    if is_read and not found.get("allow_direct"):
        yield "allow_direct has to be true"


def complaints_about(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a stream that is there does otherwise than its user will expect, one sentence each."""
    name, said = found.get("name"), []
    if wanted.get("discard") == "new" and found.get("discard", "old") == "old":
        said.append(
            f"the stream {name} has discard: old, so when it is full it throws away what waits, "
            "and nobody is told; set discard: new"
        )
    if wanted.get("republish") and not found.get("republish"):
        said.append(
            f"the stream {name} republishes nothing, so who waits on {subjects.answer('*')} "
            "hears nothing; set republish"
        )
    return said
