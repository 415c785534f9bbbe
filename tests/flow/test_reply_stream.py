"""Answering one caller: what is on the wire after each story, to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import msgspec
import pytest

from trio_worker.errors import (
    BY_CODE,
    Details,
    MessageTooLarge,
    PayloadTooLarge,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.flow.reply_stream import BACKLOG_BYTES_MAX, ReplyStream
from trio_worker.ports import Broker, Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native

CONTROL = "inference.w1.ctl.r"


@dataclass
class Wire:
    """The outlet of a broker; it takes messages whose bodies have at most `limit` bytes."""

    limit: int = 2**20
    unpublished_bytes: int = 0
    sent: list[Message] = field(default_factory=list)
    discards: int = 0
    common: Message | None = None
    """What the outlet was opened with."""

    def open_outlet(self, subject: str, *, reply: str | None, headers: Mapping[str, str]) -> Wire:
        self.common = Message(subject=subject, reply=reply, headers=headers)
        return self

    def publish(self, body: bytes, headers: Mapping[str, str]) -> None:
        if len(body) > self.limit:
            raise MessageTooLarge(len(body), self.limit)
        assert self.common is not None
        whole = {**self.common.headers, **headers}
        self.sent.append(replace(self.common, body=body, headers=whole))

    def discard(self) -> None:
        self.discards += 1


def open_reply(wire: Wire, control_subject: str | None = CONTROL) -> ReplyStream:
    return ReplyStream(
        cast("Broker", wire),
        dialect=native,
        subject="_INBOX.me",
        control_subject=control_subject,
        request_id=RequestId("r"),
        worker_id="w1",
    )


def message(sequence: int, body: bytes, **headers: str) -> Message:
    return Message(
        subject="_INBOX.me",
        reply=CONTROL,
        headers={
            "Request-Id": "r",
            "Worker-Id": "w1",
            "Sequence": str(sequence),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
        body=body,
    )


def error_of(sent: Message) -> Any:
    return msgspec.json.decode(sent.body)["error"]


# --- the order of messages ----------------------------------------------------------------


def test_messages_are_numbered_from_0_and_the_last_one_says_so() -> None:
    wire = Wire()
    reply = open_reply(wire)
    reply.send(b"a")
    reply.send(b"b")
    ended = [reply.ended]
    reply.finish(b"c")
    assert [*ended, reply.ended] == [False, True]
    assert wire.sent == [message(0, b"a"), message(1, b"b"), message(2, b"c", Terminal="done")]


@pytest.mark.parametrize("ending", ["finish", "fail"])
def test_nothing_follows_the_terminal_message(ending: str) -> None:
    wire = Wire()
    reply = open_reply(wire)
    if ending == "finish":
        reply.finish(b"whole")
    else:
        reply.fail(WorkerDraining("ask another"))
    assert reply.ended
    for more in (reply.send, reply.finish):
        with pytest.raises(AssertionError, match="a second terminal message for r"):
            more(b"more")
    with pytest.raises(AssertionError):
        reply.fail(WorkerDraining("ask another"))
    assert len(wire.sent) == 1


def test_a_rejection_has_no_control_subject() -> None:
    wire = Wire()
    open_reply(wire, None).fail(WorkerDraining("ask another"))
    assert wire.sent[0].reply is None


def test_what_could_not_be_sent_is_forgotten_and_the_gap_shows() -> None:
    wire = Wire()
    reply = open_reply(wire)
    reply.send(b"a")
    reply.discard_unsent()
    assert wire.discards == 1
    reply.send(b"b")
    assert wire.sent[-1] == message(1, b"b")


def test_a_backlog_is_more_than_256_kib() -> None:
    wire = Wire()
    reply = open_reply(wire)
    assert BACKLOG_BYTES_MAX == 262_144
    wire.unpublished_bytes = 262_144
    assert not reply.backlogged
    wire.unpublished_bytes += 1
    assert reply.backlogged


# --- errors -------------------------------------------------------------------------------

NUMBERS = {
    "INVALID_REQUEST": ("400", False),
    "CONTEXT_LENGTH_EXCEEDED": ("400", False),
    "MODEL_NOT_FOUND": ("404", False),
    "DUPLICATE_REQUEST": ("409", False),
    "PAYLOAD_TOO_LARGE": ("413", False),
    "QUEUE_FULL": ("429", True),
    "CANCELLED": ("499", False),
    "ENGINE_FAILED": ("500", False),
    "INTERNAL": ("500", True),
    "RESOURCE_LIMIT_EXCEEDED": ("503", True),
    "WORKER_DRAINING": ("503", True),
    "REQUEST_TIMEOUT": ("504", True),
}


@pytest.mark.parametrize("code", list(BY_CODE))
@pytest.mark.parametrize("overridden", [None, False, True])
def test_every_error_is_on_the_wire_with_all_its_fields(
    code: str,
    overridden: bool | None,  # noqa: FBT001
) -> None:
    number, retryable = NUMBERS[code]
    if overridden is not None:
        retryable = overridden
    details: Details = {"depth": 3, "text": "so far", "ratio": 0.5, "gone": None}
    wire = Wire()
    reply = open_reply(wire)
    reply.send(b"a")
    reply.fail(
        BY_CODE[code]("a sentence", details=details, retryable=overridden), retry_after_ms=1234
    )
    body = {
        "error": {
            "code": code,
            "message": "a sentence",
            "retryable": retryable,
            "retry_after_ms": 1234 if retryable else None,
            "details": details,
        }
    }
    assert wire.sent[1] == message(
        1,
        msgspec.json.encode(body),
        Terminal="error",
        Nats_Service_Error_Code=number,
        Nats_Service_Error=f"{code}: a sentence",
    )


def test_an_error_that_names_no_time_has_none() -> None:
    wire = Wire()
    open_reply(wire).fail(WorkerDraining("ask another"))
    assert error_of(wire.sent[0])["retry_after_ms"] is None
    assert error_of(wire.sent[0])["details"] == {}


def test_an_error_of_a_long_message_has_512_characters_of_it_in_the_header() -> None:
    wire = Wire()
    open_reply(wire).fail(WorkerDraining("x" * 1000))
    header = wire.sent[0].headers["Nats-Service-Error"]
    assert header == "WORKER_DRAINING: " + "x" * (512 - len("WORKER_DRAINING: "))
    assert error_of(wire.sent[0])["message"] == "x" * 1000


@pytest.mark.parametrize(
    "error",
    [
        RequestTimeout("too late, " + "x" * 1000, details={"text": "y" * 1000, "tokens": 3}),
        ResourceLimitExceeded("never fits" + "x" * 1000, retryable=False),
        WorkerDraining("short", details={"text": "y" * 1000}),
    ],
    ids=lambda error: error.code.value,
)
def test_an_error_that_is_too_large_is_shortened_and_says_so(error: WorkerError) -> None:
    """The number is the one that the long form would have had, and so is the rest."""
    wire = Wire(limit=800)
    reply = open_reply(wire)
    reply.send(b"a")
    reply.fail(error, retry_after_ms=77)
    size = len(native.error_body(error, 77))
    omitted = (
        f"a message of this answer has {size} bytes with its headers; the server takes 800: "
        "ask for a stream, or for fewer tokens"
    )
    body = {
        "error": {
            "code": error.code,
            "message": error.message[:256],
            "retryable": error.retryable,
            "retry_after_ms": 77 if error.retryable else None,
            "details": {"details_omitted": omitted},
        }
    }
    assert wire.sent[1:] == [
        message(
            1,
            msgspec.json.encode(body),
            Terminal="error",
            Nats_Service_Error_Code=str(error.number),
            Nats_Service_Error=f"{error.code}: {error.message[:256]}",
        )
    ]
    assert reply.ended


@pytest.mark.parametrize("method", ["send", "finish"])
def test_a_message_that_is_too_large_is_not_sent_and_the_answer_can_still_end(method: str) -> None:
    wire = Wire(limit=400)
    reply = open_reply(wire)
    reply.send(b"a")
    with pytest.raises(PayloadTooLarge, match=r"has 401 bytes .* takes 400: ask") as caught:
        getattr(reply, method)(b"x" * 401)
    assert caught.value.details == {"bytes": 401, "limit": 400}
    assert not reply.ended
    reply.fail(caught.value)
    assert [sent.headers["Sequence"] for sent in wire.sent] == ["0", "1"]
    assert error_of(wire.sent[1])["code"] == "PAYLOAD_TOO_LARGE"
