"""What has to hold in every run of a fleet, whatever befell its members.

To add one: a generator over (plan, record), listed in `CHECKS`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, TypeAlias

from trio_worker.core.jobs import seed_of
from trio_worker.ports import Message
from trio_worker.wire.native import is_silent

from .checkers import expected_answer
from .fleet_plan import FleetCall, FleetPlan
from .fleet_record import FleetRecord
from .plan import Call, Plan

Check: TypeAlias = Callable[[FleetPlan, FleetRecord], Iterator[str]]

STALE_S = 3.0
"""What a member knows of the others may be as old."""
ON_ITS_WAY_S = 1.0
"""Longer than a message takes to be taken; for so long a request that was passed on is kept."""
NEWS_S = 0.5
"""Longer than the way from one to all others: what was sent before may fill the room just then."""


def fleet_violations(plan: FleetPlan, record: FleetRecord) -> list[str]:
    """Everything that is wrong with a run; empty if nothing is."""
    return [
        *record.violations,
        *(f"{check.__name__}: {each}" for check in CHECKS for each in check(plan, record)),
    ]


def fleet_outcomes(plan: FleetPlan, record: FleetRecord) -> Counter[str]:
    """What became of requests and jobs: `ok` or the error's code, and the rest by its name."""
    outcomes: Counter[str] = Counter()
    for call in plan.calls:
        last = next(
            (each for _, each in record.received[call.inbox] if "Terminal" in each.headers), None
        )
        heard = any(_is_503(each) for _, each in record.received[call.inbox])
        error = "" if last is None else last.headers.get("Nats-Service-Error", "")
        code = error.partition(":")[0] or "ok"
        outcomes[("nobody listened" if heard else "lost") if last is None else code] += 1
    outcomes["handed on"] = sum("Route" in each.headers for _, each in record.published)
    outcomes["job dead"] = len(record.dead)
    outcomes["job answered"] = len(record.results) - len(record.dead)
    return +outcomes


# --- requests -------------------------------------------------------------------------------


def nobody_is_answered_twice(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    for call in plan.calls:
        messages = [message for _, message in record.received[call.inbox]]
        ends = [message for message in messages if "Terminal" in message.headers]
        if len(ends) > 1:
            yield f"{call.request_id} got {len(ends)} terminal messages"
        told = [each for each in messages if "Worker-Id" in each.headers]
        # One that drains may have told a caller that its request is alive.
        workers = {each.headers["Worker-Id"] for each in told if not is_silent(each.body)}
        if len(workers) > 1:
            yield f"{call.request_id} was answered by {sorted(workers)}"
        numbers = [int(each.headers["Sequence"]) for each in messages if "Sequence" in each.headers]
        if numbers != sorted(set(numbers)):
            yield f"{call.request_id} was sent the numbers {numbers}"


def only_what_was_cut_off_is_lost(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    """Core NATS delivers at most once: what a member holds that dies is gone, and nothing else."""
    for call in plan.calls:
        got = record.received[call.inbox]
        if any("Terminal" in each.headers or _is_503(each) for _, each in got):
            continue
        if not any(
            record.was_cut(worker, first, last) for worker, first, last in _had(record, call)
        ):
            yield f"{call.request_id} of {call.at:.3f} was never answered"


def _had(record: FleetRecord, call: FleetCall) -> list[tuple[str, float, float]]:
    """Who may have had a request, from when to when: whose end is an end of it."""
    spans = [span for span in record.admitted if span.request_id == call.request_id]
    had = [
        (span.worker, span.began, math.inf if span.ended is None else span.ended) for span in spans
    ]
    sent_at = _sent_at(record, call)
    # The first that it came to shows only where it is admitted or passed on.
    had += [
        (worker, sent_at, sent_at + ON_ITS_WAY_S)
        for worker in {life.worker for life in record.lives}
        if record.takes_messages(worker, sent_at)
    ]
    for at, message in record.published:
        if message.headers.get("Reply-To") != call.inbox:
            continue
        sender, target = message.headers["Route"].split(",")[-1], message.subject.split(".")[1]
        had.append((sender, at, at + ON_ITS_WAY_S))
        if record.takes_messages(target, at):
            had.append((target, at, at + ON_ITS_WAY_S))
    return had


def _sent_at(record: FleetRecord, call: FleetCall) -> float:
    return next((at for at, message in record.published if message.reply == call.inbox), math.inf)


def answers_are_those_of_one_worker_alone(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    for call in plan.calls:
        messages = [message for _, message in record.received[call.inbox]]
        last = next((each for each in messages if each.headers.get("Terminal") == "done"), None)
        numbers = [int(each.headers["Sequence"]) for each in messages if "Sequence" in each.headers]
        if last is None or numbers != list(range(len(numbers))):
            continue
        yield from _compare(plan, call.request_id, call.fields, messages)


def _compare(
    plan: FleetPlan, request_id: str, fields: dict[str, Any], messages: list[Message]
) -> Iterator[str]:
    got = "".join(_text_of(json.loads(message.body)) for message in messages)
    prompt = " ".join(each["content"] for each in fields["messages"])
    alike = {**fields, "messages": [{"role": "user", "content": prompt}]}
    text, _, _ = expected_answer(
        Plan(seed=0, overrides=(), calls=(), vocabulary=plan.vocabulary),
        Call(at=0, subject="", body=b"", fields=alike),
        fields.get("seed", seed_of(request_id)),
        fields["max_tokens"],
    )
    if got != text:
        yield f"{request_id} was told {got!r} rather than {text!r}"


def _text_of(body: dict[str, Any]) -> str:
    text = ""
    for choice in body.get("choices", ()):
        part = choice.get("delta") or choice.get("message") or {}
        text += part.get("content") or ""
    return text


def nobody_is_turned_away_while_another_has_room(
    plan: FleetPlan, record: FleetRecord
) -> Iterator[str]:
    """Unless that one's room is news, or it cannot be heard; what runs at a drain's end ends."""
    if not _hands_on(plan):
        return
    ran = {(span.request_id, span.worker) for span in record.running}
    for call in plan.calls:
        for at, message in record.received[call.inbox]:
            code = message.headers.get("Nats-Service-Error", "").partition(":")[0]
            code = "503" if _is_503(message) else code
            if code not in {"503", "QUEUE_FULL", "WORKER_DRAINING", "RESOURCE_LIMIT_EXCEEDED"}:
                continue
            if code == "WORKER_DRAINING" and (call.request_id, message.headers["Worker-Id"]) in ran:
                continue
            for life in record.lives:
                lived = life.ended_at is None or life.ended_at > at
                room = life.door_open if code == "503" else life.room
                if not lived or not room.cover(at - STALE_S, at + NEWS_S):
                    continue
                if not record.was_cut(life.worker, at - 2 * STALE_S, at):
                    yield f"{call.request_id} got {code} at {at:.3f}, {life.worker} had room"


def _hands_on(plan: FleetPlan) -> bool:
    return "fleet.hand_on=true" in plan.members[0].overrides


# --- handing on -----------------------------------------------------------------------------


def nothing_is_handed_around(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    """Each member passes a request on twice at most, and again what comes back from a dead one."""
    hops: dict[str, list[Message]] = defaultdict(list)
    for _, message in record.published:
        if "Reply-To" in message.headers:
            hops[message.headers["Reply-To"]].append(message)
    for inbox, messages in hops.items():
        if not _hands_on(plan):
            yield f"{inbox} was handed on"
        for message in messages:
            route = message.headers["Route"].split(",")
            if any(count > 2 for count in Counter(route).values()):
                yield f"{inbox} took the way {route}"
        if len(messages) > 3 * len(plan.members):
            yield f"{inbox} was handed on {len(messages)} times"


def no_request_runs_on_two_workers_at_a_time(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    """A job may, when the lease of one that could not be heard has run out."""
    spans = defaultdict(list)
    for span in record.running:
        spans[span.request_id].append(span)
    jobs = {job.request_id for job in plan.jobs}
    for request_id, found in spans.items():
        for one, two in combinations(found, 2):
            if one.worker == two.worker and one.began == two.began:
                continue
            if not one.overlaps(two):
                continue
            earlier, later = (one, two) if one.began <= two.began else (two, one)
            cut = record.was_cut(earlier.worker, earlier.began - plan.ack_wait_s, later.began)
            if request_id not in jobs or not cut:
                yield f"{request_id} ran on {one.worker} and {two.worker} at {later.began:.3f}"


# --- jobs -----------------------------------------------------------------------------------


def every_job_has_one_answer(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    if record.jobs_left:
        yield f"{record.jobs_left} jobs are left in the stream"
    dead = {json.loads(each.body)["request_id"]: each for each in record.dead}
    for job in plan.jobs:
        results = record.results.get(job.request_id, [])
        if len(results) != 1:
            yield f"{job.request_id} has {len(results)} results"
            continue
        (result,) = results
        if result.headers["Terminal"] == "done":
            yield from _compare(plan, job.request_id, job.fields, results)
            if job.request_id in dead:
                yield f"{job.request_id} is answered and dead"
        elif job.fields["max_tokens"] < 0:
            if json.loads(result.body)["error"]["code"] != "INVALID_REQUEST":
                yield f"{job.request_id} was answered {result.body!r}"
        elif job.request_id not in dead:
            yield f"{job.request_id} got {result.body!r} for no reason"


def no_job_is_tried_more_often_than_it_may(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    """By so many members, or lives of them: within one it may leave the batch and come back."""
    if plan.is_troubled_by("forget"):
        return  # a killed server counts from one again
    for job in plan.jobs:
        lives = {span.life for span in record.running if span.request_id == job.request_id}
        if len(lives) > plan.max_deliver:
            yield f"{job.request_id} was tried {len(lives)} times, not {plan.max_deliver}"


def a_dead_job_says_why(plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    for each in record.dead:
        if not plan.is_troubled_by("kill", "disconnect", "freeze", "crash", "stop"):
            yield f"{each.subject} is dead for no reason"
        if not any("eliver" in value for value in each.headers.values()):
            yield f"{each.subject} does not say why: {dict(each.headers)}"


# --- the end --------------------------------------------------------------------------------


def members_end_as_they_were_told(_plan: FleetPlan, record: FleetRecord) -> Iterator[str]:
    for life in record.lives:
        if life.how != ("killed" if life.killed else "ok"):
            yield f"{life.worker} ended: {life.how}"
    yield from record.left_over


def _is_503(message: Message) -> bool:
    return message.headers.get("Status") == "503"


CHECKS: tuple[Check, ...] = (
    nobody_is_answered_twice,
    only_what_was_cut_off_is_lost,
    answers_are_those_of_one_worker_alone,
    nobody_is_turned_away_while_another_has_room,
    nothing_is_handed_around,
    no_request_runs_on_two_workers_at_a_time,
    every_job_has_one_answer,
    no_job_is_tried_more_often_than_it_may,
    a_dead_job_says_why,
    members_end_as_they_were_told,
)
