"""What is said to JetStream and what it says back, without a server."""

from __future__ import annotations

import msgspec
import pytest

from trio_worker.jetstream import api, streams
from trio_worker.jetstream.api import Fault, JetStreamError
from trio_worker.ports import Message

SHORT = "$JS.ACK.INFERENCE.high-m.3.17.4.1700000000000000005.6"
LONG = "$JS.ACK._.aHash.INFERENCE.high-m.3.17.4.1700000000000000005.6"


@pytest.mark.parametrize("reply", [SHORT, LONG, f"{LONG}.random"])
def test_the_reply_of_a_delivery_is_read_in_every_form(reply: str) -> None:
    assert api.delivery_of(reply) == api.Delivery(
        stream="INFERENCE",
        consumer="high-m",
        delivered=3,
        sequence=17,
        stored_at_ns=1_700_000_000_000_000_005,
        pending=6,
    )


@pytest.mark.parametrize(
    "reply", [None, "", "_INBOX.x", "$JS.ACK.x", "$JS.FC.a.b.c.d.e.f.g", SHORT.replace("17", "x")]
)
def test_what_is_no_such_reply_is_none(reply: str | None) -> None:
    assert api.delivery_of(reply) is None


def test_a_jobs_own_header_is_no_status() -> None:
    """Whoever submits a job may put anything into its headers."""
    forged = Message(subject="jobs.x", reply=SHORT, headers={"Status": "404"})
    assert api.status_of(forged) is None
    assert api.status_of(Message(subject="i", headers={"Status": "404"})) is not None
    assert api.status_of(Message(subject="i")) is None


@pytest.mark.parametrize(
    ("number", "text", "ends", "gone", "usual"),
    [
        (100, "Idle Heartbeat", False, False, True),
        (404, "No Messages", True, False, True),
        (408, "Request Timeout", True, False, True),
        (409, "Server Shutdown", True, False, True),
        (409, "Consumer Deleted", True, True, False),
        (409, "Exceeded MaxWaiting", True, False, False),
        (503, "", True, True, False),
    ],
)
def test_statuses(number: int, text: str, ends: bool, gone: bool, usual: bool) -> None:  # noqa: FBT001
    status = api.Status(number=number, text=text)
    assert (status.ends_the_pull, status.consumer_is_gone, status.is_usual) == (ends, gone, usual)


def error_of(body: bytes, **headers: str) -> JetStreamError:
    with pytest.raises(JetStreamError) as caught:
        api.checked(Message(subject="i", body=body, headers=headers), "$JS.API.X")
    return caught.value


@pytest.mark.parametrize(
    ("number", "fault", "words"),
    [
        (10059, Fault.STREAM_MISSING, "create it"),
        (10014, Fault.CONSUMER_MISSING, "CONSUMER.CREATE"),
        (10058, Fault.OTHER_CONFIG, "never changed here"),
        (10065, Fault.OVERLAP, "these subjects already"),
        (10071, Fault.WRONG_LAST, "has a message already"),
        (10077, Fault.FULL, "the stream is full"),
        (10023, Fault.NO_STORAGE, "no room left"),
        (10039, Fault.OFF_FOR_ACCOUNT, "off for this account"),
        (10008, Fault.BUSY, "tried again"),
        (99999, Fault.OTHER, "the server's log"),
    ],
)
def test_an_error_says_what_was_wrong_and_what_to_do(number: int, fault: Fault, words: str) -> None:
    body = msgspec.json.encode({"error": {"code": 400, "err_code": number, "description": "why"}})
    error = error_of(body)
    assert (error.fault, error.code) == (fault, number)
    assert "$JS.API.X: why" in str(error)
    assert words in str(error)


def test_nobody_and_nonsense() -> None:
    assert error_of(b"", Status="503").fault is Fault.NOBODY
    assert error_of(b"\xff{").fault is Fault.OTHER
    assert "not JetStream" in str(error_of(b"[1]"))
    assert api.checked(Message(subject="i"), "$JS.ACK.x") == b""


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("$JS.API.CONSUMER.MSG.NEXT.A.b", "the consumer or its stream is missing"),
        ("$JS.API.DIRECT.GET.A.b", "allow_direct"),
        ("$JS.API.STREAM.INFO.A", "start nats-server with -js"),
        ("jobs.inference.high.-.m", "no stream takes this subject"),
    ],
)
def test_who_did_not_answer_is_told_apart(subject: str, words: str) -> None:
    assert words in str(api.nobody(subject))


def test_bodies() -> None:
    assert msgspec.json.decode(api.pull_body(expires_s=10, priority=3)) == {
        "batch": 1,
        "expires": 10_000_000_000,
        "group": "jobs",
        "priority": 3,
    }
    assert msgspec.json.decode(api.pull_body(expires_s=None, priority=0, no_wait=True)) == {
        "batch": 1,
        "no_wait": True,
        "group": "jobs",
        "priority": 0,
    }
    assert api.nak() == b"-NAK"
    assert api.nak(0.7) == b'-NAK {"delay":700000000}'
    assert api.term("too much") == b"+TERM too much"


def test_a_consumers_name_has_nothing_that_a_subject_splits_at() -> None:
    assert streams.consumer_name("high", "qwen2.5") == "high-qwen2_5"
    assert streams.consumer_name("low", "a b/c*d>e\\f") == "low-a_b_c_d_e_f"


def test_what_loses_or_hides_something_is_a_fault_and_limits_are_not() -> None:
    wanted = streams.results_stream("RESULTS", keep_s=60)
    assert streams.faults_of(wanted, wanted) == []
    assert streams.faults_of(wanted | {"max_bytes": 1, "max_age": 1}, wanted) == []
    more = {"subjects": [*wanted["subjects"], "other"]}
    assert streams.faults_of(wanted | more, wanted) == []
    for change in (
        {"subjects": ["results.other.*"]},
        {"retention": "workqueue"},
        {"storage": "memory"},
        {"allow_direct": False},
    ):
        assert len(streams.faults_of(wanted | change, wanted)) == 1, change
    queue = streams.jobs_stream("INFERENCE") | {"allow_direct": True}
    assert streams.faults_of(queue | {"allow_direct": False}, queue) == []
    assert streams.complaints_about(wanted, wanted) == []
    assert len(streams.complaints_about(wanted | {"republish": None}, wanted)) == 1
    assert len(streams.complaints_about(wanted | {"discard": "old"}, wanted)) == 1
