"""What has to hold in every run, whatever went wrong. Each check yields sentences.

To add one: a generator over (plan, record), listed in `CHECKS`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby, pairwise
from typing import Any, TypeAlias

from support.wire_requests import ROOMY, read

from trio_worker.core.memory import MB
from trio_worker.markup.reader import AnswerReader
from trio_worker.ports import Message
from trio_worker.protocol.prompt import FREE, Form
from trio_worker.simulated.forms import form_of
from trio_worker.simulated.speech import STYLE, Speaker
from trio_worker.stages.intake import SUBSCRIPTION_DRAIN_S
from trio_worker.wire import subjects

from .plan import FORM_FIELDS, Call, Plan, caller_of
from .record import Admitted, Published, Record
from .world import make_config

Check: TypeAlias = Callable[[Plan, Record], Iterator[str]]

SLACK_S = 1e-6


def violations(plan: Plan, record: Record) -> list[str]:
    """Everything that is wrong with a run; empty if nothing is."""
    return [
        *record.violations,
        *(f"{check.__name__}: {each}" for check in CHECKS for each in check(plan, record)),
    ]


def outcomes_of(record: Record) -> Iterator[str]:
    """`ok` or the error's code, for each answered request."""
    for each in record.published:
        for _, terminal in each.terminals:
            error = terminal.headers.get("Nats-Service-Error", "ok")
            yield error.partition(":")[0]


# --- messages -------------------------------------------------------------------------------


def exactly_one_terminal_message(_plan: Plan, record: Record) -> Iterator[str]:
    for each in record.published:
        if not each.messages:
            continue
        headers = [message.headers for _, message in each.messages]
        terminals = [at for at, header in enumerate(headers) if "Terminal" in header]
        if len(terminals) > 1:
            yield f"{each.inbox} got {len(terminals)} terminal messages"
        elif terminals and terminals[0] != len(headers) - 1:
            yield f"{each.inbox} got messages after the terminal one"
    answered = defaultdict(list)
    for each in record.published:
        if each.messages and each.is_admitted and each.terminals:
            answered[each.inbox].append(each)
    for inbox, group in _by_inbox(record.admitted).items():
        if len(answered[inbox]) != len(group):
            yield f"{len(group)} requests of {inbox} were admitted, {len(answered[inbox])} answered"


def every_request_that_arrives_is_answered(plan: Plan, record: Record) -> Iterator[str]:
    """Unless the worker was ended at once: then what intake had not read is lost."""
    if plan.disturbed or len(record.stops_at) > 1 or record.ended != "ok":
        return
    answered: dict[str, int] = defaultdict(int)
    for each in record.published:
        if each.terminals:
            answered[each.inbox] += 1
    arrived: dict[str, int] = defaultdict(int)
    for _, message in record.delivered:
        if subjects.may_reply_to(message.reply, ["_INBOX."]):
            assert message.reply is not None
            arrived[message.reply] += 1
    for inbox in sorted({*answered, *arrived}):
        if answered[inbox] != arrived[inbox]:
            yield f"{arrived[inbox]} requests of {inbox} arrived, {answered[inbox]} were answered"


def sequence_numbers_have_no_gaps(_plan: Plan, record: Record) -> Iterator[str]:
    for each in record.published:
        numbers = [int(message.headers["Sequence"]) for _, message in each.messages]
        if numbers != list(range(len(numbers))):
            yield f"{each.inbox} was sent the numbers {numbers}"


def callers_get_what_was_published(plan: Plan, record: Record) -> Iterator[str]:
    """Backlogged answers come with a gap, and what a dead connection held is lost."""
    if record.outbox_dropped or any(each.what == "close" for each in plan.happenings):
        return
    vanished = {call.inbox for call in plan.calls if call.cancel == "vanish"}
    published: dict[str, list[Message]] = defaultdict(list)
    cut: set[str] = set()
    for each in record.published:
        if each.messages:
            published[each.inbox] += [message for _, message in each.messages]
            if each.discarded:
                cut.add(each.inbox)
    for inbox, received in record.received.items():
        if inbox in vanished:
            continue
        got = [message for _, message in received if "Status" not in message.headers]
        sent = published[inbox]
        if inbox in cut:
            if any("Terminal" in each.headers and each not in got for each in sent):
                yield f"{inbox} did not get the terminal message of a backlogged answer"
        elif _sorted(got) != _sorted(sent):
            yield f"{inbox} was sent {len(sent)} messages and got {len(got)}"


def _sorted(messages: list[Message]) -> list[tuple[str, bytes]]:
    return sorted((message.headers["Sequence"], message.body) for message in messages)


def a_refused_request_gets_one_error_and_no_control_subject(
    _plan: Plan, record: Record
) -> Iterator[str]:
    for each in record.published:
        if not each.messages or each.is_admitted:
            continue
        if len(each.messages) != 1 or each.messages[0][1].headers.get("Terminal") != "error":
            yield f"{each.inbox} was refused with {len(each.messages)} messages"
    for each in record.published:
        if each.messages and len({message.reply for _, message in each.messages}) != 1:
            yield f"{each.inbox} was told several control subjects"


def nobody_is_answered_whom_the_worker_may_not_answer(_plan: Plan, record: Record) -> Iterator[str]:
    for each in record.published:
        if each.messages and not each.inbox.startswith("_INBOX."):
            yield f"published to {each.inbox}"


# --- answers --------------------------------------------------------------------------------


def completed_answers_are_those_of_a_run_without_trouble(
    plan: Plan, record: Record
) -> Iterator[str]:
    calls = {call.inbox: call for call in plan.calls if call.fields is not None}
    for each in record.published:
        if not each.terminals:
            continue
        _, terminal = each.terminals[0]
        body = json.loads(terminal.body)
        if terminal.headers["Terminal"] == "done":
            yield from _compare_answer(plan, calls[each.inbox], each, body)
        elif "text" in (details := body["error"].get("details") or {}):
            yield from _compare_part(plan, calls[each.inbox], details)


def _compare_answer(
    plan: Plan, call: Call, published: Published, body: dict[str, Any]
) -> Iterator[str]:
    assert call.fields is not None
    note, usage = body["worker"], body["usage"]
    asked = call.fields.get("max_tokens", min(12, plan.context_length - usage["prompt_tokens"]))
    if note["degraded"] and call.fields.get("n", 1) > 1:
        # Each choice was cut down or not by what memory was when it entered: which, nobody says.
        for choice in range(call.fields["n"]):
            text, _, _ = expected_answer(plan, call, note["seed"] + choice, asked)
            if not text.startswith(_told(published, choice)[0]):
                yield f"{published.inbox} was not told the beginning of {text!r}"
        return
    if note["degraded"]:
        asked = usage["completion_tokens"]
    counted = 0
    for choice in range(call.fields.get("n", 1)):
        text, tokens, finish = expected_answer(plan, call, note["seed"] + choice, asked)
        counted += tokens
        got, ended = _told(published, choice)
        if got != text:
            yield f"{published.inbox} was told {got!r} rather than {text!r}"
        if ended != finish:
            yield f"{published.inbox} ended for another reason than {finish}"
    if usage["completion_tokens"] != counted:
        yield f"{published.inbox} was counted {usage['completion_tokens']} tokens, not {counted}"
    if call.fields.get("seed", note["seed"]) != note["seed"]:
        yield f"{published.inbox} got another seed than it asked for"


def _compare_part(plan: Plan, call: Call, details: dict[str, Any]) -> Iterator[str]:
    if call.fields is None or "seed" not in call.fields or "stop" in call.fields:
        return
    text, _, _ = expected_answer(plan, call, call.fields["seed"], details["tokens"])
    # The tokens are those of all choices, the text is the first one's; what may be a mark waits.
    may_be_less = call.fields.get("n", 1) > 1 or "tools" in call.fields
    is_whole = details["text"] == text or may_be_less
    if not (is_whole and text.startswith(details["text"])):
        yield f"{call.inbox} timed out with {details['text']!r} rather than {text!r}"


def expected_answer(plan: Plan, call: Call, seed: int, max_tokens: int) -> tuple[str, int, str]:
    """Text, number of tokens and finish reason: a function of the request alone."""
    assert call.fields is not None
    prompt = call.fields.get("prompt") or call.fields["messages"][0]["content"]
    tokens = tuple(zlib.crc32(each.encode()) % plan.vocabulary for each in prompt.split())
    speaker, form = _speaker_of(plan.vocabulary), _form_of(plan, call)
    speech = speaker.speech(tokens, form, seed=seed, max_tokens=max_tokens)
    reader = AnswerReader(STYLE, form)
    is_read = form.finds_reasoning or bool(form.tools)
    text, stops, finish = "", call.fields.get("stop", []), "length"
    count = len(speech.tokens)
    for position in range(count):
        said, is_over = speech.text_at(position), False
        if is_read:
            reading = reader.feed(said)
            said, is_over = reading.content, reading.is_over
        text += said
        if position + 1 == count and not is_over:
            text += reader.finish(is_cut=not speech.ends).content if is_read else ""
            finish = "stop" if speech.ends else "length"
        ends = [end for stop in stops if (end := text.find(stop)) >= 0]
        if ends or is_over:
            text, count, finish = text[: min(ends, default=len(text))], position + 1, "stop"
            break
    return text, count, "tool_calls" if finish == "stop" and reader.has_called else finish


@cache
def _speaker_of(vocabulary: int) -> Speaker:
    return Speaker(vocabulary)


def _form_of(plan: Plan, call: Call) -> Form:
    assert call.fields is not None
    wanted = {name: value for name, value in call.fields.items() if name in FORM_FIELDS}
    if not wanted:
        return FREE
    # Of the rest nothing matters but whether it is a chat.
    asked = {"messages": call.fields["messages"]} if "messages" in call.fields else {"prompt": "a"}
    request = read(json.dumps({**asked, **wanted}).encode(), ROOMY)
    grammars = _speaker_of(plan.vocabulary).grammars
    return form_of(request.wanted, grammars, is_chat=request.is_chat)


def _told(published: Published, choice: int) -> tuple[str, str | None]:
    """What has been said of a choice, and why it ended."""
    text, finish = "", None
    for _, message in published.messages:
        for each in json.loads(message.body)["choices"]:
            if each["index"] == choice:
                part = each.get("delta") or each.get("message") or {}
                text += each.get("text") or part.get("content") or ""
                finish = each["finish_reason"] or finish
    return text, finish


def errors_have_a_cause(plan: Plan, record: Record) -> Iterator[str]:
    """No code is given that nothing in the plan explains."""
    if plan.disturbed:
        return
    calls = {call.inbox: call for call in plan.calls}
    cancelled_ids = {
        call.fields["request_id"]
        for call in plan.calls
        if call.cancel not in {None, "stranger", "vanish"} and call.fields is not None
    }
    vanished = {call.inbox for call in plan.calls if call.cancel == "vanish"}
    by_inbox = _by_inbox(record.admitted)
    for each in record.published:
        for at, message in each.terminals:
            if message.headers["Terminal"] != "error":
                continue
            error = json.loads(message.body)["error"]
            code, call = error["code"], calls[each.inbox]
            request_id = message.headers["Request-Id"]
            admitted = by_inbox.get(each.inbox, [])
            cause = {
                "CANCELLED": request_id in cancelled_ids
                or each.inbox in vanished
                or each.discarded,
                "REQUEST_TIMEOUT": (error["details"] or {}).get("stage") == "admission"
                or any(abs(at - one.deadline) <= SLACK_S for one in admitted),
                "WORKER_DRAINING": bool(record.stops_at) or record.ended != "ok",
                "ENGINE_FAILED": _engine_may_fail(plan, call),
                "RESOURCE_LIMIT_EXCEEDED": plan.critical_mb < 1000
                or any(h.what == "memory" for h in plan.happenings),
                "INVALID_REQUEST": call.fields is None
                or plan.faults.refuse_tokenise > 0
                or _choices_of(call) > _places_of(plan),
                "MODEL_NOT_FOUND": call.fields is None,
                "PAYLOAD_TOO_LARGE": call.fields is None or len(call.body) > 2000,
                "CONTEXT_LENGTH_EXCEEDED": plan.context_length < 200 or call.fields is None,
                "DUPLICATE_REQUEST": call.copies > 1 or request_id.startswith("same"),
                "QUEUE_FULL": _caller_was_full(plan, record, at, call)
                or _queue_was_full(plan, record, at, _choices_of(call)),
            }.get(code, False)
            if not cause:
                yield f"{each.inbox} got {code} at {at:.4f} for no reason: {error['message']}"


def _choices_of(call: Call) -> int:
    return 1 if call.fields is None else int(call.fields.get("n", 1))


def _slots_of(plan: Plan) -> int:
    batching = make_config(plan.overrides).worker.continuous_batching
    return batching.max_batch_size if batching.enabled else 1


def _places_of(plan: Plan) -> int:
    queueing = make_config(plan.overrides).worker.request_queue
    if not queueing.enabled:
        return _slots_of(plan)
    return min(queueing.max_depth, queueing.max_per_caller or queueing.max_depth)


def _caller_was_full(plan: Plan, record: Record, at: float, call: Call) -> bool:
    """Its other rows that had not entered the batch before; of several some may have."""
    queueing = make_config(plan.overrides).worker.request_queue
    if not queueing.enabled or queueing.max_per_caller is None:
        return False
    rows = sum(
        len(each.sequence.rows)
        for each in record.admitted
        if each.sequence.caller == caller_of(call) and each.at <= at <= _ended_at(each)
    )
    return rows + _choices_of(call) > queueing.max_per_caller


def _queue_was_full(plan: Plan, record: Record, at: float, wanted: int) -> bool:
    """As the configuration says and the ledger knows; what ended in that moment is still there."""
    queueing, slots = make_config(plan.overrides).worker.request_queue, _slots_of(plan)
    there = [each for each in record.admitted if each.at <= at <= _ended_at(each)]
    rows = sum(len(each.sequence.rows) for each in there)
    if not queueing.enabled:
        return rows + wanted > slots
    places = queueing.max_depth * (1 if queueing.reject_when_full else 2)
    # Of several choices, when the first has entered others may still wait.
    unserved = sum(
        len(each.sequence.rows)
        for each in there
        if each.entered_at is None or each.entered_at >= at or len(each.sequence.rows) > 1
    )
    # Whoever waits for several places is overtaken by nobody: meanwhile all but one may be free.
    most = max((len(each.sequence.rows) for each in there), default=1)
    kept = 0 if queueing.reject_when_full else most - 1
    return unserved + wanted > places - kept or rows + wanted > places + slots - kept


def _ended_at(admitted: Admitted) -> float:
    return math.inf if admitted.ended_at is None else admitted.ended_at


def _engine_may_fail(plan: Plan, call: Call) -> bool:
    faults = plan.faults
    bad_words = faults.deadly_words | faults.failing_words
    random_faults = (
        *(faults.hang, faults.crash, faults.fail_sequence),
        *(faults.out_of_memory, faults.crash_tokenise, faults.hang_tokenise),
    )
    return (
        any(rate > 0 for rate in random_faults)
        or any(each.what == "crash" for each in plan.happenings)
        or any(each.encode() in call.body for each in bad_words)
    )


# --- time -----------------------------------------------------------------------------------


def nothing_is_answered_later_than_its_deadline_and_a_turn(
    _plan: Plan, record: Record
) -> Iterator[str]:
    for each in record.admitted:
        late_s = (each.ended_at if each.ended_at is not None else 1e9) - each.deadline
        if late_s > record.longest_turn_s + SLACK_S:
            yield f"{each.sequence.request_id} ended {late_s:.3f} s after its deadline"


def a_streaming_caller_hears_something_every_five_seconds(
    _plan: Plan, record: Record
) -> Iterator[str]:
    streams = {each.sequence.reply_subject: each for each in record.admitted}
    for each in record.published:
        if not each.messages or not each.is_admitted:
            continue
        admitted = streams.get(each.inbox)
        if admitted is not None and admitted.sequence.request.stream:
            times = [at for at, _ in each.messages]
            gap_s = max((b - a for a, b in pairwise(times)), default=0.0)
            if gap_s > 5 + SLACK_S:
                yield f"{each.inbox} heard nothing for {gap_s:.1f} s"


def nobody_of_the_lowest_level_is_overtaken_beyond_the_bound(
    plan: Plan, record: Record
) -> Iterator[str]:
    """By who came later than (levels - 1) × aging; time that pressure holds it back apart.

    Another level may be served on the claim of any that waits there; and within the level by
    shares.
    """
    if plan.aging_s is None:
        return
    bound_s = (plan.levels - 1) * plan.aging_s
    for low, other in _overtakings(record):
        if low.sequence.level != plan.levels - 1 or _goes_by_shares(low, other):
            continue
        earliest = min(each.at for each in _claimants(record, low, other))
        if earliest > low.at + bound_s + SLACK_S:
            yield (
                f"{low.sequence.request_id} of {low.at:.3f} was overtaken by "
                f"{other.sequence.request_id} of {other.at:.3f}; the bound is {bound_s:g} s"
            )


def the_queue_is_served_in_the_order_of_its_rule(plan: Plan, record: Record) -> Iterator[str]:
    def rank(one: Admitted) -> tuple[float, float]:
        if plan.aging_s is None:
            return (one.sequence.level, one.at)
        return (0.0, one.at + one.sequence.level * plan.aging_s)

    for waiting, other in _overtakings(record):
        if _goes_by_shares(waiting, other):
            continue
        mine, its = rank(waiting), min(map(rank, _claimants(record, waiting, other)))
        if (its[0], its[1] - SLACK_S) > mine:
            yield (
                f"{other.sequence.request_id} {its} entered the batch before "
                f"{waiting.sequence.request_id} {mine}"
            )


def _goes_by_shares(one: Admitted, other: Admitted) -> bool:
    """Whether they are of two callers of one level, between whom their keys decide nothing."""
    mine, its = one.sequence, other.sequence
    return mine.level == its.level and mine.caller != its.caller


def _claimants(record: Record, waiting: Admitted, other: Admitted) -> Iterator[Admitted]:
    """On whose claim `other` may have entered before `waiting`: of another level, all who wait."""
    yield other
    if waiting.sequence.level == other.sequence.level:
        return
    assert other.entered_order is not None
    assert other.entered_at is not None
    for each in record.admitted:
        rows = each.sequence.rows
        # Rows of several, and those that left the batch, may wait after the first has entered.
        has_left = len(rows) == 1 and not each.sequence.preempted + each.sequence.resumed
        if (
            each.sequence.level == other.sequence.level
            and each.queued_order is not None
            and each.queued_order < other.entered_order <= _left_queue_at(each, has_left=has_left)
            and _ended_at(each) >= other.entered_at
        ):
            yield each


def _left_queue_at(each: Admitted, *, has_left: bool) -> float:
    return math.inf if each.entered_order is None or not has_left else each.entered_order


def what_two_callers_who_wait_are_served_differs_by_the_bound(
    _plan: Plan, record: Record
) -> Iterator[str]:
    """From any time on while both have requests of a level in the queue: by 2 × rows × longest."""
    most_begun: dict[int, int] = {}
    leads: dict[tuple[int, str, str], tuple[int, int]] = {}
    for share in record.shares:
        for level, begun in share.begun.items():
            most_begun[level] = max(begun, most_begun.get(level, 0))
        pairs = {
            (level, one, other)
            for level, one in share.waiting
            for its_level, other in share.waiting
            if level == its_level and one < other
        }
        for gone in leads.keys() - pairs:
            del leads[gone]
        for level, one, other in sorted(pairs):
            lead = share.served.get((level, one), 0) - share.served.get((level, other), 0)
            least, most = leads.get((level, one, other), (lead, lead))
            leads[level, one, other] = least, most = min(least, lead), max(most, lead)
            bound = 2 * max(1, most_begun.get(level, 0)) * record.longest_row
            if most - least > bound:
                yield f"{one!r} and {other!r} of level {level}: {most - least}, {bound} at most"


def _overtakings(record: Record) -> Iterator[tuple[Admitted, Admitted]]:
    """Who was in the queue while who entered the batch for the first time."""
    entered = [each for each in record.admitted if each.entered_order is not None]
    for waiting in record.admitted:
        if waiting.queued_order is None or waiting.pressed:
            continue
        for other in entered:
            assert other.entered_order is not None
            if other is waiting or other.entered_order < waiting.queued_order:
                continue
            if _entered_first(other, waiting):
                yield waiting, other


def _entered_first(other: Admitted, waiting: Admitted) -> bool:
    assert other.entered_order is not None
    assert other.entered_at is not None
    if waiting.entered_order is not None:
        return other.entered_order < waiting.entered_order
    return waiting.ended_at is not None and other.entered_at < waiting.ended_at


def nobody_is_admitted_while_memory_is_critical(plan: Plan, record: Record) -> Iterator[str]:
    for each in record.admitted:
        if each.used_bytes >= plan.critical_mb * MB:
            yield f"{each.sequence.request_id} was admitted at {each.used_bytes // MB} MB"


def caches_stay_below_the_limit(plan: Plan, record: Record) -> Iterator[str]:
    """What running requests may come to hold is promised before; kept caches come on top."""
    kept_bytes = plan.prefix_cache_tokens * plan.cache_bytes_per_token
    most_bytes = plan.critical_mb * MB + kept_bytes
    if record.engine_bytes_most > most_bytes:
        yield f"the engine held {record.engine_bytes_most // MB} MB of {most_bytes // MB}"


def nobody_is_admitted_after_a_stop(_plan: Plan, record: Record) -> Iterator[str]:
    for each in record.admitted:
        if record.stops_at and each.at > record.stops_at[0]:
            yield f"{each.sequence.request_id} was admitted {each.at - record.stops_at[0]} s after"


# --- the end --------------------------------------------------------------------------------


def whoever_has_no_token_at_a_stop_is_not_kept_waiting(plan: Plan, record: Record) -> Iterator[str]:
    """The subscriptions drain for a second at most; then those without a token are told."""
    if not record.stops_at or plan.disturbed:
        return
    limit = record.stops_at[0] + 2 * SUBSCRIPTION_DRAIN_S + SLACK_S
    for each in record.admitted:
        ended_at = each.ended_at if each.ended_at is not None else 1e9
        first_token_at = each.sequence.first_token_at
        if ended_at > limit and (first_token_at is None or first_token_at > limit):
            yield f"{each.sequence.request_id} had no token at {limit:.3f} and went on to wait"


def the_worker_ends_as_it_should(plan: Plan, record: Record) -> Iterator[str]:
    if record.ended is None:
        yield "the worker has not ended"
    elif (
        (record.ended != "ok" and not plan.may_fault)
        or "Assertion" in record.ended
        or "Error:" in record.ended.replace("WorkerFault", "")
    ):
        yield f"the worker ended with {record.ended}"


def nothing_is_left(_plan: Plan, record: Record) -> Iterator[str]:
    yield from record.left_over
    if record.in_flight:
        yield f"{record.in_flight} requests"
    admission, scheduler, queue = record.admission, record.scheduler, record.queue
    if admission is None or scheduler is None or queue is None:
        return
    left = {
        "in flight": len(admission.in_flight),
        "places": admission.depth,
        "waiting for a place": admission.waiting,
        "running": len(scheduler.running),
        "queued": len(queue),
    }
    for name, count in left.items():
        if count:
            yield f"{name}: {count}"


def _by_inbox(admitted: list[Admitted]) -> dict[str, list[Admitted]]:
    ordered = sorted(admitted, key=lambda one: one.sequence.reply_subject)
    return {
        inbox: list(group)
        for inbox, group in groupby(ordered, key=lambda one: one.sequence.reply_subject)
    }


CHECKS: tuple[Check, ...] = (
    exactly_one_terminal_message,
    every_request_that_arrives_is_answered,
    sequence_numbers_have_no_gaps,
    callers_get_what_was_published,
    a_refused_request_gets_one_error_and_no_control_subject,
    nobody_is_answered_whom_the_worker_may_not_answer,
    completed_answers_are_those_of_a_run_without_trouble,
    errors_have_a_cause,
    nothing_is_answered_later_than_its_deadline_and_a_turn,
    a_streaming_caller_hears_something_every_five_seconds,
    nobody_of_the_lowest_level_is_overtaken_beyond_the_bound,
    the_queue_is_served_in_the_order_of_its_rule,
    what_two_callers_who_wait_are_served_differs_by_the_bound,
    nobody_is_admitted_while_memory_is_critical,
    caches_stay_below_the_limit,
    nobody_is_admitted_after_a_stop,
    whoever_has_no_token_at_a_stop_is_not_kept_waiting,
    the_worker_ends_as_it_should,
    nothing_is_left,
)
