"""Files and batches as they are kept, and as OpenAI's clients are told of them.

Times are seconds since 1970. A batch keeps how far it has been counted: the answers to its first
`counted` requests are, and need not be looked at again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from trio_worker.gateway.json_body import invalid, quoted
from trio_worker.wire import subjects

FILES_SUBJECT = "batches.file"
BATCHES_SUBJECT = "batches.batch"
TASKS = "batches.task.>"
ALL = "batches.>"
WINDOW_S = 86_400
"""OpenAI's `24h`, the one there is."""
_OUTPUT, _ERRORS = "-output", "-errors"


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file that somebody has sent."""

    id: str
    caller: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int
    parts: int

    @property
    def subject(self) -> str:
        return file_subject(self.caller, self.id)

    def told(self) -> dict[str, Any]:
        return file_object(
            self.id,
            filename=self.filename,
            size=self.bytes,
            created_at=self.created_at,
            expires_at=self.expires_at,
            purpose="batch",
        )


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a line of a file, in OpenAI's names."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What has come of requests."""

    succeeded: int = 0
    failed: int = 0
    last_at: int = 0
    """When the last of them was answered."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def answered(self) -> int:
        return self.succeeded + self.failed

    def with_more(self, more: Tally) -> Tally:
        names = [name for name in Tally.__struct_fields__ if name != "last_at"]
        sums = {name: getattr(self, name) + getattr(more, name) for name in names}
        return Tally(last_at=max(self.last_at, more.last_at), **sums)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway is to do for a batch."""

    what: str
    """`begin` or `cancel`."""
    caller: str
    batch: str

    @property
    def subject(self) -> str:
        return f"batches.task.{self.what}.{self.batch}"


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    id: str
    caller: str
    input_file_id: str
    endpoint: str
    created_at: int
    expires_at: int
    keep_results_s: int
    priority: str
    most_urgent: str | None = None
    metadata: dict[str, str] | None = None
    total: int = 0
    parts: int = 0
    """Messages that its requests' ids are kept in."""
    in_progress_at: int | None = None
    submitted_at: int | None = None
    """When all its requests were in the queue, or no more of them were to be put there."""
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    errors: tuple[Fault, ...] = ()
    counted: int = 0
    tally: Tally = Tally()
    """Of those that are counted."""

    @property
    def subject(self) -> str:
        return batch_subject(self.caller, self.id)

    @property
    def status(self) -> str:
        """In OpenAI's words; `finalizing` is none of them, since there is nothing to be done."""
        for name in ("failed", "cancelled", "expired", "completed", "cancelling"):
            if getattr(self, f"{name}_at") is not None:
                return name
        return "validating" if self.in_progress_at is None else "in_progress"

    @property
    def is_over(self) -> bool:
        return self.status in {"failed", "cancelled", "expired", "completed"}

    @property
    def is_settled(self) -> bool:
        """Whether nothing of it changes any more; of what was cut off, some may still be done."""
        return self.status in {"failed", "completed"}

    @property
    def ended_at(self) -> int:
        ends = (self.completed_at, self.cancelled_at, self.expired_at, self.failed_at)
        return next((at for at in ends if at is not None), self.created_at)

    @property
    def unanswered_code(self) -> str:
        """Of requests that nobody will answer any more."""
        return "batch_cancelled" if self.cancelled_at is not None else "batch_expired"

    def task(self) -> Task:
        """What a gateway has to do for it, unless one has done so."""
        what = "begin" if self.cancelling_at is None else "cancel"
        return Task(what=what, caller=self.caller, batch=self.id)

    def told(self, tally: Tally) -> dict[str, Any]:
        """`tally` is of all its requests."""
        over = self.is_over and self.failed_at is None
        failures = tally.failed or tally.answered < self.total
        errors = [msgspec.to_builtins(fault) for fault in self.errors]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": output_id(self.id) if over and tally.succeeded else None,
            "error_file_id": errors_id(self.id) if over and failures else None,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.completed_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {
                "total": self.total,
                "completed": tally.succeeded,
                "failed": tally.failed,
            },
            "usage": _usage(tally),
            "metadata": self.metadata,
        }


def file_subject(caller: str | None, file_id: str) -> str:
    return f"{FILES_SUBJECT}.{caller or subjects.NOBODY}.{file_id}"


def batch_subject(caller: str | None, batch_id: str) -> str:
    return f"{BATCHES_SUBJECT}.{caller or subjects.NOBODY}.{batch_id}"


def part_subject(owner: str, number: int | str) -> str:
    """A part of a file's content, or of the ids of a batch's requests; `*`: all of them."""
    return f"batches.part.{owner}.{number}"


def output_id(batch_id: str) -> str:
    return f"file-{batch_id}{_OUTPUT}"


def errors_id(batch_id: str) -> str:
    return f"file-{batch_id}{_ERRORS}"


def batch_of_file(file_id: str) -> tuple[str, bool] | None:
    """The batch whose answers a file has, and whether they are errors; None for any other file."""
    name = file_id.removeprefix("file-")
    for end, is_errors in ((_OUTPUT, False), (_ERRORS, True)):
        if name.endswith(end):
            return name.removesuffix(end), is_errors
    return None


def file_object(
    file_id: str,
    *,
    filename: str,
    size: int,
    created_at: int,
    expires_at: int,
    purpose: str,
) -> dict[str, Any]:
    """A file as OpenAI's clients are told of it."""
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": created_at,
        "expires_at": expires_at,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
    }


def stream_config(name: str, *, keep_s: int, bytes_max: int) -> dict[str, Any]:
    """The stream in which all of this is kept: of each subject the last message."""
    return {
        "name": name,
        "subjects": [ALL],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_age": keep_s * 1_000_000_000,
        "max_bytes": bytes_max,
        "allow_direct": True,
    }


def page_of(
    told: list[dict[str, Any]], *, after: str | None, limit: int, is_newest_first: bool
) -> Mapping[str, Any]:
    """A part of a list, as OpenAI's clients ask for it: so many behind the one called `after`.

    Raises `InvalidRequest` if there is none of that name.
    """
    told = sorted(told, key=lambda each: (each["created_at"], each["id"]), reverse=is_newest_first)
    ids = [each["id"] for each in told]
    if after is not None and after not in ids:
        raise invalid("after", f"there is no {quoted(after)} in this list; begin without it")
    start = 0 if after is None else ids.index(after) + 1
    shown = told[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(told),
    }


def _usage(tally: Tally) -> dict[str, Any]:
    return {
        "input_tokens": tally.prompt_tokens,
        "input_tokens_details": {"cached_tokens": tally.cached_tokens},
        "output_tokens": tally.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": tally.reasoning_tokens},
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
    }
