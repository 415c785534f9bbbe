"""The subjects of a worker, and which of a caller may be answered."""

from __future__ import annotations

import pytest

from trio_worker.wire import subjects


def test_the_subjects_of_a_worker() -> None:
    assert subjects.GROUP == "trio-workers"
    assert subjects.direct("w1") == "inference.w1"
    assert subjects.shared("m") == ("inference", "inference.model.m")
    assert subjects.by_caller("app-a") == "inference.by.app-a"
    assert subjects.by_caller("app-a", model="m.v1") == "inference.by.app-a.model.m.v1"
    assert subjects.shared_by_caller("m") == ("inference.by.*", "inference.by.*.model.m")
    assert subjects.control("w1", "r1") == "inference.w1.ctl.r1"
    assert subjects.ping("w1") == "worker.w1.ping"
    assert subjects.stats("w1") == "worker.w1.stats"
    assert subjects.beat("w1") == "worker.w1.beat"
    assert subjects.by_caller("shop") == "inference.by.shop"
    assert subjects.forwarded("w1", 7) == "inference.w1.fwd.7"
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


@pytest.mark.parametrize(
    ("worker_id", "model", "expected"),
    [
        ("w1", "m", "inference.w1"),
        (None, "m.v1", "inference.by.app-a.model.m.v1"),
        (None, None, "inference.by.app-a"),
        (None, "a.*", "inference.by.app-a"),
    ],
)
def test_where_a_request_is_sent_in_a_callers_name(
    worker_id: str | None, model: object, expected: str
) -> None:
    assert subjects.for_request(worker_id=worker_id, model=model, caller="app-a") == expected


@pytest.mark.parametrize(
    ("subject", "counted", "caller"),
    [
        ("inference", "inference", None),
        ("inference.w1", "inference.w1", None),
        ("inference.model.by.x", "inference.model.by.x", None),
        ("inference.by.app-a", "inference.by.*", "app-a"),
        ("inference.by.app-a.model.m.v1", "inference.by.*.model.m.v1", "app-a"),
        ("inference.by.a b", "inference.by.*", "a b"),
    ],
)
def test_what_a_subject_says_of_who_asks(subject: str, counted: str, caller: str | None) -> None:
    assert subjects.origin_of(subject) == (counted, caller)


def test_an_answer_may_go_below_any_permitted_prefix_up_to_512_characters() -> None:
    prefixes = ["_INBOX.", "answers."]
    assert subjects.may_reply_to("answers.x", prefixes)
    assert subjects.may_reply_to("_INBOX." + "x" * 505, prefixes)
    assert not subjects.may_reply_to("_INBOX." + "x" * 506, prefixes)
    assert not subjects.may_reply_to("elsewhere.x", prefixes)
    assert not subjects.may_reply_to("_INBOX.x", [])


@pytest.mark.parametrize(
    ("subject", "permitted"),
    [
        ("_INBOX.abc.1", True),
        (f"_INBOX.{'x' * 505}", True),
        (f"_INBOX.{'x' * 506}", False),
        (None, False),
        ("", False),
        ("_INBOX.", False),
        ("_INBOX", False),
        ("_INBOX.*", False),
        ("_INBOX.a.>", False),
        ("_INBOX.a b", False),
        ("_INBOX.a\r\nPUB x", False),
        ("orders", False),
    ],
)
def test_which_reply_subjects_may_be_answered(subject: str | None, *, permitted: bool) -> None:
    assert subjects.may_reply_to(subject, ["_INBOX."]) is permitted


def test_a_jobs_subject_says_how_urgent_it_is_and_for_whom_and_for_which_model() -> None:
    subject = subjects.job(level="low", caller="me", model="qwen2.5-7b")
    assert subject == "jobs.inference.low.me.qwen2.5-7b"
    assert subjects.read_job(subject) == ("low", "me", "qwen2.5-7b")
    assert subjects.read_job(subjects.job(level="high", caller=None, model="m")) == (
        "high",
        None,
        "m",
    )
    assert subjects.jobs_of("low", "qwen2.5-7b") == "jobs.inference.low.*.qwen2.5-7b"
    assert subjects.dead(subject) == "dead.inference.low.me.qwen2.5-7b"


@pytest.mark.parametrize(
    "subject",
    ["jobs.inference.low.me", "jobs.inference.urgent.me.m", "jobs.other.low.me.m", "x", ""],
)
def test_what_is_no_jobs_subject_is_none(subject: str) -> None:
    assert subjects.read_job(subject) is None
