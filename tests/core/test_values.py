"""The small values that everything else is made of: their defaults, names and words."""

from __future__ import annotations

import dataclasses

import pytest
from support.factories import make_request, make_sequence

from trio_worker.core.priority import level_of, name_of
from trio_worker.core.request import ChatMessage
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import RUNNING, Ending, Event, Stage, queue_key
from trio_worker.ports import EngineStatistics
from trio_worker.protocol.turn import (
    EngineInfo,
    FinishReason,
    Output,
    Prefill,
    RequestId,
    Sampling,
    Work,
)
from trio_worker.wire import subjects


def test_the_words_that_callers_and_dashboards_read() -> None:
    assert [each.value for each in FinishReason] == ["stop", "length"]
    assert [each.value for each in Stage] == [
        *("waiting", "tokenising", "queued", "prefill", "decode", "resuming", "ended")
    ]
    assert [each.value for each in Event] == [
        *("placed", "tokenised", "batched", "decoded", "engine lost", "preempted", "end")
    ]
    assert [each.value for each in Ending] == [
        *("cancelled", "caller gone", "backlog", "draining", "fault", "too large")
    ]


def test_by_default_nothing_of_the_sampling_is_switched_on() -> None:
    assert dataclasses.asdict(Sampling()) == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "seed": 0,
        "logprobs": False,
        "top_logprobs": 0,
    }


def test_by_default_a_turn_does_no_more_than_one_step() -> None:
    assert dataclasses.asdict(Work()) == {
        "admit": (),
        "remove": (),
        "prefill_tokens": 512,
        "trim_caches": False,
    }
    output = Output(request_id=RequestId("r"), token=1, text="x")
    assert (output.finish, output.logprob) == (None, None)
    assert Prefill(request_id=RequestId("r"), done=1, total=2).cached == 0
    info = EngineInfo(
        model="m", context_length=1, vocabulary_size=2, cache_bytes_per_token=1, device="d"
    )
    assert info.accelerator == "cpu"
    reading = EngineStatistics(state="loading", pid=None, restarts=0, info=None)
    assert reading.restarts_by_reason == {}


def test_a_request_is_a_chat_if_it_has_no_prompt() -> None:
    assert not make_request(prompt="").is_chat
    hello = ChatMessage(role="user", content="hello")
    assert make_request(prompt=None, messages=(hello,)).is_chat


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
        "stage": Stage.TOKENISING,
        "ending": None,
        "subject": "",
        "max_tokens": 100,  # of the factory
        "produced": [],
        "outputs": None,
        "handed_out": 0,
        "concluded": False,
        "prefilled": 0,
        "cached": 0,
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


@pytest.mark.parametrize(
    ("levels", "names"),
    [
        (1, ["high"]),
        (2, ["high", "medium"]),
        (3, ["high", "medium", "low"]),
        (4, ["high", "1", "medium", "low"]),
        (5, ["high", "1", "medium", "3", "low"]),
    ],
)
def test_the_levels_that_have_names(levels: int, names: list[str]) -> None:
    assert [name_of(level, levels) for level in range(levels)] == names
    assert (level_of("high", levels), level_of("low", levels)) == (0, levels - 1)
    with pytest.raises(KeyError):
        level_of("urgent", levels)


# --- the queue ----------------------------------------------------------------------------------


def test_the_queue_passes_over_a_level_only_where_it_is_told_to() -> None:
    queue = RequestQueue(max_size=3)
    assert (queue.first(), queue.first(hold_level=1), queue.by_level()) == (None, None, {})
    with pytest.raises(KeyError, match="nothing to take"):
        queue.take()
    low, medium = make_sequence("low", level=2), make_sequence("medium", level=1)
    with pytest.raises(KeyError, match="nothing to take"):
        queue.take(low)
    queue.add(low)
    assert (queue.first(hold_level=2), queue.first(hold_level=1)) == (None, low)
    queue.add(medium)
    assert (queue.first(), queue.first(hold_level=1), queue.first(hold_level=2)) == (
        *(medium, low, medium),
    )
    assert queue.by_level() == {2: 1, 1: 1}
    assert (queue.ahead_of(low.key), queue.ahead_of(medium.key)) == (1, 0)
    assert queue.take(low) is low
    assert (queue.promotions, queue.by_level()) == (1, {1: 1})
    assert queue.take() is medium
    assert (queue.promotions, queue.by_level()) == (1, {})


def test_two_with_one_key_are_a_fault_and_so_is_one_too_many() -> None:
    queue = RequestQueue(max_size=1)
    first = make_sequence("a")
    queue.add(first)
    with pytest.raises(AssertionError, match="more than 1 requests"):
        queue.add(make_sequence("b"))
    twin = make_sequence("twin")
    twin.key = first.key
    assert twin not in queue
    assert queue.remove(twin) is False
    assert queue.remove(first) is True
    queue.add(first)
    queue.max_size = 2
    with pytest.raises(AssertionError, match="two sequences with one key"):
        queue.add(twin)


# --- subjects -----------------------------------------------------------------------------------


def test_the_subjects_of_a_worker() -> None:
    assert subjects.GROUP == "trio-workers"
    assert subjects.direct("w1") == "inference.w1"
    assert subjects.shared("m") == ("inference", "inference.model.m")
    assert subjects.control("w1", "r1") == "inference.w1.ctl.r1"
    assert subjects.ping("w1") == "worker.w1.ping"
    assert subjects.stats("w1") == "worker.w1.stats"
    assert [
        subjects.is_control(each, "w1")
        for each in (
            *("inference.cancel", "inference.w1.ctl.r1", "inference.w1.ctl."),
            *("inference.w1", "inference.w1.ctl", "inference.w2.ctl.r1", "inference.cancel.x"),
        )
    ] == [True, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("worker_id", "model", "expected"),
    [
        ("w1", "m", "inference.w1"),
        (None, "m.v1", "inference.model.m.v1"),
        (None, None, "inference"),
        (None, 7, "inference"),
        (None, "", "inference"),
        (None, "a b", "inference"),
        (None, "a.*", "inference"),
        (None, "a..b", "inference"),
        (None, "a.", "inference"),
        (None, ">", "inference"),
        (None, "a\x7f", "inference"),
    ],
)
def test_where_a_request_is_sent(worker_id: str | None, model: object, expected: str) -> None:
    assert subjects.for_request(worker_id=worker_id, model=model) == expected


def test_an_answer_may_go_below_any_permitted_prefix_up_to_512_characters() -> None:
    prefixes = ["_INBOX.", "answers."]
    assert subjects.may_reply_to("answers.x", prefixes)
    assert subjects.may_reply_to("_INBOX." + "x" * 505, prefixes)
    assert not subjects.may_reply_to("_INBOX." + "x" * 506, prefixes)
    assert not subjects.may_reply_to("elsewhere.x", prefixes)
    assert not subjects.may_reply_to("_INBOX.x", [])
