"""OpenAI's files of requests and of answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.wire.batch_file import (
    URLS,
    BadLine,
    RequestLine,
    answer_line,
    answered_id,
    request_lines,
    unanswered_line,
)

RIGHT = {"custom_id": "a", "method": "POST", "url": URLS[0], "body": {"model": "m"}}


def text_of(*lines: object) -> bytes:
    return b"\n".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines
    )


def test_lines_are_read_as_they_stand_and_blank_ones_are_passed_over() -> None:
    text = b"\xef\xbb\xbf" + text_of(RIGHT, b"", b"  \r", {**RIGHT, "custom_id": "b"}) + b"\r\n"
    first, second = request_lines(text)
    assert isinstance(first, RequestLine)
    assert isinstance(second, RequestLine)
    assert (first.line, first.custom_id, first.url) == (1, "a", URLS[0])
    assert json.loads(first.body) == {"model": "m"}
    assert (second.line, second.custom_id) == (4, "b")


def test_a_method_may_be_left_out_since_there_is_but_one() -> None:
    (line,) = request_lines(text_of({name: RIGHT[name] for name in ("custom_id", "url", "body")}))
    assert isinstance(line, RequestLine)


@pytest.mark.parametrize(
    ("wrong", "where", "said"),
    [
        (b"nonsense", None, "it is not JSON"),
        (b"\xff\xfe", None, "it is not JSON"),
        (b"[1]", None, "Expected `object`, got `array`"),
        ({**RIGHT, "custom_id": 1}, "custom_id", "Expected `str`, got `int`"),
        ({**RIGHT, "custom_id": ""}, "custom_id", "length >= 1"),
        ({**RIGHT, "custom_id": "x" * 513}, "custom_id", "length <= 512"),
        ({"custom_id": "a", "url": URLS[0]}, None, "missing required field `body`"),
        ({**RIGHT, "more": 1}, None, "unknown field `more`"),
        ({**RIGHT, "method": "GET"}, "method", "expected POST"),
        ({**RIGHT, "url": "/v1/embeddings"}, "url", "expected /v1/chat/completions or"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_place(
    wrong: object, where: str | None, said: str
) -> None:
    right, line = request_lines(text_of({**RIGHT, "custom_id": "first"}, wrong))
    assert isinstance(right, RequestLine)
    assert isinstance(line, BadLine)
    assert (line.line, line.where) == (2, where)
    assert line.message.startswith("line 2: ")
    assert said in line.message


def test_an_id_is_there_once() -> None:
    *_, third = request_lines(text_of(RIGHT, {**RIGHT, "custom_id": "b"}, RIGHT))
    assert isinstance(third, BadLine)
    assert "is that of line 1, too" in third.message


@given(st.binary(max_size=300))
def test_whatever_the_bytes_are_each_line_is_read_or_is_wrong(text: bytes) -> None:
    for each in request_lines(text):
        assert isinstance(each, (RequestLine, BadLine))


def test_an_answer_is_in_its_line_as_it_came() -> None:
    line = answer_line(custom_id="ä", request_id="r1", status=200, body=b'{"x":\n1.50}')
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert b"1.50" in line
    assert json.loads(line) == {
        "id": "batch_req_r1",
        "custom_id": "ä",
        "response": {"status_code": 200, "request_id": "r1", "body": {"x": 1.5}},
        "error": None,
    }
    assert answered_id(line) == "ä"
    assert answered_id(line[:-5]) is None


def test_a_request_that_nobody_will_answer_has_a_line_too() -> None:
    line = unanswered_line(custom_id="a", request_id="r1", code="batch_expired", message="late")
    assert json.loads(line)["response"] is None
    assert json.loads(line)["error"] == {"code": "batch_expired", "message": "late"}
    assert answered_id(line) == "a"
