"""One request on its way: its stages, why it ends, and its place in the queue."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from support.factories import Scope, make_request, make_sequence

from trio_worker.core.sequence import (
    RUNNING,
    TRANSITIONS,
    Ending,
    Event,
    Stage,
    queue_key,
    sequences_of,
)
from trio_worker.protocol.prompt import FREE
from trio_worker.protocol.turn import Sampling
from trio_worker.wire import native


@pytest.mark.parametrize(
    ("stage", "event"), list(itertools.product(Stage, Event)), ids=lambda each: each.name
)
def test_the_life_cycle_goes_along_its_table_and_nowhere_else(stage: Stage, event: Event) -> None:
    sequence = make_sequence()
    sequence.stage = stage
    if (stage, event) in TRANSITIONS:
        sequence.advance(event)
        assert sequence.stage is TRANSITIONS[stage, event]
    else:
        with pytest.raises(AssertionError):
            sequence.advance(event)
        assert sequence.stage is stage


def test_only_the_first_reason_to_end_counts_and_none_after_the_end() -> None:
    sequence = make_sequence()
    scope = sequence.scope
    assert isinstance(scope, Scope)
    sequence.end(Ending.CANCELLED)
    sequence.end(Ending.DRAINING)
    assert sequence.ending is Ending.CANCELLED
    assert scope.reasons == ["cancelled"]
    ended = make_sequence()
    ended.advance(Event.END)
    ended.end(Ending.CANCELLED)
    assert ended.ending is None


def test_each_choice_has_a_sequence_whose_id_no_caller_can_send_and_a_seed_of_its_own() -> None:
    request = make_request("r", choices=3, sampling=Sampling(temperature=1.0, seed=2**53 - 2))
    first = sequences_of(
        request,
        subject="inference",
        reply_subject="_INBOX.x",
        arrivals=itertools.count(7),
        arrived_at=5.0,
        aging_s=None,
        scope=Scope(),
    )
    rows = first.rows
    assert [row.request_id for row in rows] == ["r", "r.1", "r.2"]
    assert [native.request_id_of({"request_id": row.request_id}) for row in rows[1:]] == [None] * 2
    assert [row.sampling.seed for row in rows] == [2**53 - 2, 2**53 - 1, 0]
    assert {row.sampling.temperature for row in rows} == {1.0}
    assert [row.key for row in rows] == [(1, 5.0, 7), (1, 5.0, 8), (1, 5.0, 9)]
    assert [row.leader for row in rows] == [None, first, first]
    assert [row.rows for row in rows] == [rows] * 3


def test_what_ends_one_choice_ends_the_request() -> None:
    first = make_sequence(choices=3)
    first.rows[1].end(Ending.TOO_LARGE)
    first.end(Ending.CANCELLED)
    assert [row.ending for row in first.rows] == [Ending.TOO_LARGE] * 3
    assert isinstance(first.scope, Scope)
    assert first.scope.reasons == ["too large"], "once, for they have one scope"


def test_a_new_sequence_has_done_nothing_yet() -> None:
    sequence = make_sequence("r", level=3)
    assert (sequence.request_id, sequence.level) == ("r", 3)
    rest = {
        name: getattr(sequence, name)
        for name in sequence.__slots__
        if name
        not in {"request", "reply_subject", "arrival", "arrived_at", "scope", "key", "prompt"}
    }
    assert rest == {
        "choice": 0,
        "leader": None,
        "siblings": (),
        "request_id": "r",
        "sampling": Sampling(),
        "form": FREE,
        "stage": Stage.TOKENISING,
        "ending": None,
        "subject": "",
        "elsewhere": None,
        "is_opened": False,
        "max_tokens": 100,  # of the factory
        "produced": [],
        "outputs": None,
        "handed_out": 0,
        "concluded": False,
        "prefilled": 0,
        "cached": 0,
        "computed": 0,
        "booked": 0,
        "queued_at": None,
        "batched_at": None,
        "first_token_at": None,
        "last_token_at": None,
        "left_at": None,
        "degraded": [],
        "preempted": 0,
        "resumed": 0,
        "crashes": 0,
        "faults": 0,
    }
    made = dataclasses.replace(sequence)
    defaults = {each.name: each.default for each in dataclasses.fields(made)}
    assert defaults["max_tokens"] == 0
    assert {Stage.PREFILL, Stage.DECODE, Stage.RESUMING} == RUNNING


def test_an_end_is_the_end() -> None:
    sequence = make_sequence()
    sequence.advance(Event.END)
    for event in Event:
        with pytest.raises(AssertionError, match=f"{event} at stage ended of r"):
            sequence.advance(event)


def test_the_key_of_the_queue_is_the_time_aged_by_the_level() -> None:
    assert queue_key(enqueued_at=7.0, level=3, aging_s=2.0, arrival=5) == (0, 13.0, 5)
    assert queue_key(enqueued_at=7.0, level=3, aging_s=None, arrival=5) == (3, 7.0, 5)


def test_the_words_that_callers_and_dashboards_read() -> None:
    assert [each.value for each in Stage] == [
        *("waiting", "tokenising", "queued", "prefill", "decode", "resuming", "ended")
    ]
    assert [each.value for each in Event] == [
        *("placed", "tokenised", "batched", "decoded", "engine lost", "preempted", "end")
    ]
    assert [each.value for each in Ending] == [
        *("cancelled", "caller gone", "backlog", "draining", "fault", "too large")
    ]
