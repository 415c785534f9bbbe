"""A durable job in a worker's hands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from trio_worker.flow.job import Job, JobsHeld, job_of
from trio_worker.ports import Message
from trio_worker.wire import native

REPLY = "$JS.ACK.{stream}.high-m.3.17.4.1700000000000000005.6"


@dataclass
class Outbox:
    max_payload: int = 2**20
    said: list[Message] = field(default_factory=list)

    def publish(self, message: Message) -> None:
        self.said.append(message)


def make_job(
    outbox: Outbox | None = None,
    *,
    stream: str = "INFERENCE",
    headers: dict[str, str] | None = None,
) -> Job:
    message = Message(
        subject="jobs.inference.high.me.m",
        body=b"{}",
        reply=REPLY.format(stream=stream),
        headers=headers or {},
    )
    broker: Any = outbox or Outbox()
    job = job_of(broker, message)
    assert job is not None
    return job


def test_what_is_no_job_is_none() -> None:
    broker: Any = Outbox()
    assert job_of(broker, Message(subject="jobs.inference.high.me.m")) is None
    assert job_of(broker, Message(subject="x", reply=REPLY.format(stream="S"))) is None


def test_its_level_its_caller_and_its_tries_are_what_the_stream_says() -> None:
    job = make_job()
    assert (job.level, job.caller, job.tried, job.is_redelivered) == ("high", "me", 2, True)


def test_its_id_is_the_one_of_its_body_or_of_its_publication_or_of_its_place() -> None:
    job = make_job(headers={"Nats-Msg-Id": "published"})
    assert job.request_id == "published"
    job.take_id({"request_id": "asked"})
    assert job.request_id == "asked"
    job.take_id({})
    assert job.request_id == "published"
    place = make_job(headers={"Nats-Msg-Id": "no id"}).request_id
    assert place == "INFERENCE-17-17979cfe362a0005"


def test_a_place_may_always_be_an_id() -> None:
    job = make_job(stream="jöbs#" + "x" * 200)
    assert native.request_id_of({"request_id": job.request_id}) == job.request_id


def test_it_is_settled_once_and_nothing_is_said_afterwards() -> None:
    outbox = Outbox()
    job = make_job(outbox)
    job.progress()
    job.acknowledge()
    job.progress()
    assert [(each.subject, each.body) for each in outbox.said] == [
        (job.message.reply, b"+WPI"),
        (job.message.reply, b"+ACK"),
    ]
    for settle in (job.acknowledge, job.give_back, lambda: job.end("x")):
        with pytest.raises(AssertionError):
            settle()


def test_what_is_sent_on_of_its_headers_can_be_sent() -> None:
    """Anybody may submit a job, with any headers: none may bring the worker down."""
    job = make_job(headers={"Trace": "t", "a b": "x", "ö": "x", "nats-ttl": "1", "Nats-TTL": "1"})
    headers = job.headers_when_dead("why")
    assert headers == {
        "Trace": "t",
        "Request-Id": job.request_id,
        "Dead-Reason": "why",
        "Dead-Deliveries": "2",
        "Nats-Msg-Id": "INFERENCE-17-17979cfe362a0005",
    }


def test_its_answer_has_its_id_whatever_is_drawn() -> None:
    job = make_job(headers={"Nats-Msg-Id": "j1"})
    replies: list[Any] = []
    reply = job.arrival(replies, "w1").open_reply(
        native.request_id_of({"request_id": "drawn"}),  # type: ignore[arg-type]
        is_admitted=False,
    )
    assert replies == [reply]
    reply.finish(b"{}")
    assert replies[0].headers["Request-Id"] == "j1"


def test_how_many_are_held_is_counted_and_told() -> None:
    held = JobsHeld()
    held.add(2)
    held.add(-1)
    assert held.beside == 1
