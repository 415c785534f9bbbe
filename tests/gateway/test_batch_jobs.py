"""What becomes of a line of a file: a job, or what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.batch_rig import CHAT, MODEL, line, terms, text_of

from trio_worker.errors import ModelNotFound
from trio_worker.gateway.batch_jobs import (
    Job,
    jobs_of,
    level_name,
    line_of_answer,
    request_id_of,
)
from trio_worker.gateway.keys import Key
from trio_worker.gateway.models import Limits
from trio_worker.wire.batch_file import BadLine


def read(*lines: dict[str, Any], url: str | None = None, **changes: Any) -> list[Job | BadLine]:
    return list(jobs_of(text_of(lines), terms(**changes), batch_id="night", url=url))


def one(given: dict[str, Any], **changes: Any) -> Job:
    (job,) = read(given, **changes)
    assert isinstance(job, Job), job
    return job


def fault(given: dict[str, Any], **changes: Any) -> BadLine:
    (bad,) = read(given, **changes)
    assert isinstance(bad, BadLine), bad
    return bad


def test_a_line_is_a_request_as_the_worker_takes_it() -> None:
    job = one(line("a", "hello", max_completion_tokens=7))
    assert job.subject == f"jobs.inference.low.-.{MODEL}"
    assert job.request_id == request_id_of("night", 1) == "night-1"
    assert json.loads(job.body) == {
        "messages": [{"role": "user", "content": "hello"}],
        "model": MODEL,
        "max_tokens": 7,
        "fit_max_tokens": True,
        "priority": "low",
        "timeout_ms": 60_000,
        "stream": False,
        "request_id": "night-1",
    }


def test_ids_are_counted_over_the_requests_of_a_file_wrong_ones_too() -> None:
    first, bad, third = read(line("a"), line("a"), line("c"))
    assert isinstance(first, Job)
    assert isinstance(bad, BadLine)
    assert isinstance(third, Job)
    assert (first.request_id, third.request_id) == ("night-1", "night-3")


def test_caller_and_priority_stand_in_the_subject() -> None:
    key = Key(caller="anna", most_urgent="medium")
    urgent = one(line("a", priority="high"), key=key)
    assert urgent.subject == f"jobs.inference.medium.anna.{MODEL}", (
        "no more than its key is good for"
    )
    assert json.loads(urgent.body)["caller"] == "anna"
    said = one(line("a", user="ben"), priority="high")
    assert said.subject == f"jobs.inference.high.ben.{MODEL}"


@pytest.mark.parametrize(
    ("priority", "levels", "name"),
    [
        ("medium", 5, "medium"),
        (0, 3, "high"),
        (1, 3, "medium"),
        (2, 3, "low"),
        (3, 5, "medium"),
        (4, 5, "low"),
        (0, 1, "high"),
    ],
)
def test_a_number_becomes_one_of_three_levels(priority: int | str, levels: int, name: str) -> None:
    assert level_name(priority, levels) == name


def test_another_model_is_asked_where_that_is_wanted() -> None:
    job = one(line("a"), model="mlx-community/other.4bit")
    assert job.subject.endswith(".-.mlx-community/other.4bit")
    assert json.loads(job.body)["model"] == "mlx-community/other.4bit"


def not_found(_: str | None) -> Limits:
    raise ModelNotFound("no worker serves it", details={"field": "model"})


@pytest.mark.parametrize(
    ("more", "changes", "where", "said"),
    [
        ({"stream": True}, {}, "body.stream", "answered as a whole"),
        ({"model": None}, {}, "body.model", "it is needed in a batch"),
        ({"model": "a b"}, {}, "body.model", "cannot be a part of a NATS subject"),
        ({"model": "a.>"}, {}, "body.model", "cannot be a part of a NATS subject"),
        ({}, {"limits_of": not_found}, "body.model", "no worker serves it"),
        ({"temperatur": 1}, {}, "body.temperatur", "did you mean temperature"),
        ({"top_p": "x"}, {}, "body.top_p", "Expected `float`"),
        ({"priority": 9}, {}, "body.priority", "is none of"),
        ({"user": "x" * 3000}, {"message_bytes": 1100}, "body", "the NATS server takes 1100"),
    ],
)
def test_what_is_wrong_with_a_body_is_said_with_its_line_and_place(
    more: dict[str, Any], changes: dict[str, Any], where: str, said: str
) -> None:
    bad = fault(line("a", **more), **changes)
    assert bad.where == where
    assert bad.message.startswith("line 1: ")
    assert said in bad.message


def test_all_lines_ask_what_the_batch_asks() -> None:
    bad = fault(line("a"), url="/v1/completions")
    assert bad.where == "url"
    assert isinstance(read(line("a"), url=CHAT)[0], Job)


def test_a_completion_is_read_as_one() -> None:
    given = {
        "custom_id": "a",
        "url": "/v1/completions",
        "body": {"model": MODEL, "prompt": "once upon"},
    }
    assert json.loads(one(given).body)["prompt"] == "once upon"


def test_an_answer_is_told_as_over_http() -> None:
    told, is_answered = line_of_answer(
        {"Terminal": "done"}, b'{"id":"x"}', custom_id="a", request_id="night-1"
    )
    assert is_answered
    assert json.loads(told)["response"] == {
        "status_code": 200,
        "request_id": "night-1",
        "body": {"id": "x"},
    }


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (
            b'{"error":{"code":"MODEL_NOT_FOUND","message":"m","details":{"field":"model"}}}',
            404,
            "model_not_found",
        ),
        (b"{}", 500, "internal"),
        (b"\xff", 500, "internal"),
        (b"[]", 500, "internal"),
    ],
)
def test_an_error_is_told_as_over_http(body: bytes, status: int, code: str) -> None:
    told, is_answered = line_of_answer(
        {"Terminal": "error"}, body, custom_id="a", request_id="night-1"
    )
    response = json.loads(told)["response"]
    assert not is_answered
    assert response["status_code"] == status
    assert response["body"]["error"]["code"] == code
