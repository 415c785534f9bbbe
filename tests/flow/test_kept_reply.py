"""The answer to a job, kept in whole."""

from __future__ import annotations

import json

import pytest

from trio_worker.errors import PayloadTooLarge, QueueFull, RequestTimeout
from trio_worker.flow.kept_reply import HEADERS_ROOM, KeptReply
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native


def reply_of(max_payload: int = 2**20) -> KeptReply:
    return KeptReply(
        dialect=native,
        request_id=RequestId("j1"),
        worker_id="w1",
        max_payload=max_payload,
    )


def test_an_answer_has_the_headers_of_a_terminal_message() -> None:
    reply = reply_of()
    assert not reply.ended
    reply.finish(b"{}")
    assert (reply.ended, reply.error, reply.body) == (True, None, b"{}")
    assert reply.headers == {
        "Request-Id": "j1",
        "Worker-Id": "w1",
        "Sequence": "0",
        "Terminal": "done",
    }


def test_an_error_is_kept_with_its_class() -> None:
    reply = reply_of()
    reply.fail(QueueFull("full"), retry_after_ms=250)
    assert isinstance(reply.error, QueueFull)
    assert reply.retry_after_ms == 250
    assert json.loads(reply.body)["error"]["code"] == "QUEUE_FULL"
    assert reply.headers["Terminal"] == "error"


def test_there_is_one_terminal_message_and_no_other() -> None:
    reply = reply_of()
    with pytest.raises(AssertionError):
        reply.send(b"part")
    reply.finish(b"{}")
    with pytest.raises(AssertionError):
        reply.finish(b"{}")


def test_what_the_server_would_not_take_is_not_kept() -> None:
    reply = reply_of(HEADERS_ROOM + 100)
    with pytest.raises(PayloadTooLarge, match="101 bytes"):
        reply.finish(b"x" * 101)
    assert not reply.ended
    reply.finish(b"x" * 100)


def test_an_error_with_too_much_text_loses_it() -> None:
    reply = reply_of(HEADERS_ROOM + 500)
    reply.fail(RequestTimeout("late", details={"text": "x" * 1000}))
    assert isinstance(reply.error, RequestTimeout)
    assert "text" not in json.loads(reply.body)["error"]["details"]
