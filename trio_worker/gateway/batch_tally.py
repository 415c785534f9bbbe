"""How far a batch is, and the files of its answers: both made from the answers when asked for.

Rule: nothing of an answer is copied. It is there as long as results are kept, and so are these.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime

import msgspec
from msgspec.structs import replace

from trio_worker.gateway.batch_jobs import line_of_answer, request_id_of
from trio_worker.gateway.batch_queue import LOOK_AT, answers_to
from trio_worker.gateway.batch_records import BatchRecord, Tally
from trio_worker.gateway.batch_store import BatchStore
from trio_worker.jetstream.api import Stored
from trio_worker.wire import native
from trio_worker.wire.batch_file import unanswered_line

AHEAD = 240
_UNANSWERED = {
    "batch_expired": "this request was not done before the batch expired",
    "batch_cancelled": "this request was not done before the batch was cancelled",
}


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = msgspec.field(default_factory=_Details)
    completion_tokens_details: _Details = msgspec.field(default_factory=_Details)


class _Answer(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


async def looked_after(
    store: BatchStore, results: str, record: BatchRecord, sequence: int, now: Callable[[], float]
) -> tuple[BatchRecord, Tally]:
    """The batch as it is now, with what has come of all its requests.

    What was learnt is kept, unless somebody else was quicker. Raises `JetStreamError`.
    """
    if record.is_settled:
        return record, record.tally
    changed, tally = await _count(store, results, record)
    second = int(now())
    is_all = changed.counted == record.total and record.submitted_at is not None
    if not record.is_over and record.cancelling_at is None:
        if is_all:
            changed = replace(changed, completed_at=tally.last_at or second)
        elif second >= record.expires_at:
            changed = replace(changed, expired_at=record.expires_at)
    if changed != record:
        await store.replace(changed, sequence)
    return changed, tally


async def _count(store: BatchStore, results: str, record: BatchRecord) -> tuple[BatchRecord, Tally]:
    """The batch, counted as far as all are answered, and the tally of all.

    The queue is first come, first served, so behind `AHEAD` requests without any answer none is
    looked for: what has come there, out of order, is counted a little later.
    """
    counted, tally, beyond = record.counted, record.tally, Tally()
    first = last = counted
    while first < min(record.total, last + AHEAD):
        numbers = range(first + 1, min(first + LOOK_AT, record.total) + 1)
        ids = [request_id_of(record.id, number) for number in numbers]
        found = await answers_to(store.jetstream, results, ids)
        for place, request_id in enumerate(ids, start=first):
            if request_id not in found:
                continue
            one = _tally_of(found[request_id])
            if place == counted:
                counted, tally = place + 1, tally.with_more(one)
            else:
                beyond = beyond.with_more(one)
        first += len(ids)
        last = first if found else last
    return replace(record, counted=counted, tally=tally), tally.with_more(beyond)


def _tally_of(answer: Stored) -> Tally:
    at = stored_at(answer.headers)
    if answer.headers.get(native.Header.TERMINAL) == "error":
        return Tally(failed=1, last_at=at)
    try:
        usage = msgspec.json.decode(answer.body, type=_Answer).usage
    except (msgspec.MsgspecError, UnicodeDecodeError):
        usage = _Usage()
    return Tally(
        succeeded=1,
        last_at=at,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.completion_tokens_details.reasoning_tokens,
    )


def stored_at(headers: Mapping[str, str]) -> int:
    """When a message was stored, by the server's clock, in seconds since 1970; 0 if unsaid."""
    try:
        # Nanoseconds are more than is understood here.
        text = headers["Nats-Time-Stamp"].partition(".")[0].removesuffix("Z")
        return int(datetime.fromisoformat(f"{text}+00:00").timestamp())
    except (LookupError, ValueError):
        return 0


async def answer_lines(
    store: BatchStore, results: str, record: BatchRecord, *, of_errors: bool
) -> AsyncIterator[bytes]:
    """The file of a batch's answers, or of its errors, some lines at a time.

    Raises `JetStreamError`. Cancelled: nothing is left.
    """
    number = 0
    together: list[str] = []
    async for custom_id in store.ids(record):
        together.append(custom_id)
        if len(together) == LOOK_AT:
            yield await _lines(store, results, record, number, together, of_errors=of_errors)
            number += len(together)
            together = []
    if together:
        yield await _lines(store, results, record, number, together, of_errors=of_errors)


async def _lines(
    store: BatchStore,
    results: str,
    record: BatchRecord,
    start: int,
    custom_ids: list[str],
    *,
    of_errors: bool,
) -> bytes:
    ids = [request_id_of(record.id, start + place) for place in range(1, len(custom_ids) + 1)]
    found = await answers_to(store.jetstream, results, ids)
    lines = []
    for custom_id, request_id in zip(custom_ids, ids, strict=True):
        answer = found.get(request_id)
        if answer is not None:
            line, is_answered = line_of_answer(
                answer.headers, answer.body, custom_id=custom_id, request_id=request_id
            )
        else:
            code, is_answered = record.unanswered_code, False
            line = unanswered_line(
                custom_id=custom_id,
                request_id=request_id,
                code=code,
                message=_UNANSWERED[code],
            )
        if is_answered is not of_errors:
            lines.append(line)
    return b"".join(lines)
