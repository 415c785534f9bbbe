"""A durable job in a worker's hands: what it asks for, and what is said of it to the stream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from trio_util import RepeatedEvent

from trio_worker.flow.kept_reply import KeptReply
from trio_worker.flow.reception import Arrival
from trio_worker.jetstream import api
from trio_worker.jetstream.api import Delivery
from trio_worker.ports import Broker, Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native, subjects
from trio_worker.wire.native import Fields
from trio_worker.wire.subjects import JobSubject

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9_-]")
_MAY_BE_SENT_ON = re.compile(r"\A[A-Za-z0-9_-]{1,128}\Z")
"""Names of headers: whoever submits a job may have sent anything for one."""

Replies: TypeAlias = "list[KeptReply]"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStreams:
    """The names of the streams."""

    jobs: str
    results: str
    dead: str


class JobsHeld:
    """How many jobs a worker has that are no requests in flight: being looked up, or stored."""

    def __init__(self) -> None:
        self.beside = 0
        """Bound: the worker's slots."""
        self.changed = RepeatedEvent()

    def add(self, count: int) -> None:
        self.beside += count
        self.changed.set()


class Job:
    """One delivery of a job. Its state: its id, and whether the stream knows what became of it."""

    def __init__(
        self, broker: Broker, message: Message, where: JobSubject, delivery: Delivery
    ) -> None:
        self.message = message
        self.level = where.level
        self.caller = where.caller
        self.delivery = delivery
        self.request_id = self.own_id
        """That of its answer; until its body is read, the one for want of another."""
        self.is_settled = False
        self._broker = broker

    @property
    def is_redelivered(self) -> bool:
        return self.delivery.delivered > 1

    @property
    def tried(self) -> int:
        """How often it has been in somebody's hands before, for all that is known."""
        return self.delivery.delivered - 1

    @property
    def own_id(self) -> RequestId:
        """Its request id where the body names none: the same at every delivery.

        The `Nats-Msg-Id` it was published with, if that may be one; else the stream, the number
        in it, and when it was stored, since a stream made anew counts from 1 again.
        """
        given = native.request_id_of({"request_id": self.message.headers.get(api.MESSAGE_ID)})
        return given or RequestId(self._place)

    @property
    def _place(self) -> str:
        """Where it stands: what may be an id, and names no other job."""
        at = self.delivery
        stream = _NOT_IN_IDS.sub("_", at.stream)[:64]
        return f"{stream}-{at.sequence}-{at.stored_at_ns:x}"

    def take_id(self, fields: Fields) -> None:
        """It may be named in the body, which has been read."""
        self.request_id = native.request_id_of(fields) or self.own_id

    def arrival(self, replies: Replies, worker_id: str) -> Arrival:
        """How it arrives; its answer will be the last of `replies`."""

        def open_reply(request_id: RequestId, *, is_admitted: bool) -> KeptReply:  # noqa: ARG001
            reply = KeptReply(
                dialect=native,
                # The one given is drawn where the body could not be read.
                request_id=self.request_id,
                worker_id=worker_id,
                max_payload=self._broker.max_payload,
            )
            replies.append(reply)
            return reply

        return Arrival(
            body=self.message.body,
            subject=subjects.jobs_counted_as(self.level),
            dialect=native,
            open_reply=open_reply,
            caller=self.caller,
        )

    def headers_when_dead(self, reason: str) -> dict[str, str]:
        """Its own, as far as they may be sent on, with what is to be known of its end."""
        own = {
            name: value
            for name, value in self.message.headers.items()
            if _MAY_BE_SENT_ON.match(name) and not name.lower().startswith("nats-")
        }
        return own | {
            "Request-Id": self.request_id,
            "Dead-Reason": reason,
            "Dead-Deliveries": str(self.tried),
            api.MESSAGE_ID: self._place,
        }

    # --- what the stream is told: each is one message, put into the outbox ----------------

    def progress(self) -> None:
        """It is being worked on."""
        if not self.is_settled:
            self._say(api.PROGRESS)

    def acknowledge(self) -> None:
        """It has been answered."""
        self._settle(api.ACK)

    def give_back(self, delay_s: float = 0.0) -> None:
        """Somebody else may do it, `delay_s` from now; it counts as a delivery."""
        self._settle(api.nak(delay_s))

    def end(self, reason: str) -> None:
        """It has been given up."""
        self._settle(api.term(reason))

    def _settle(self, body: bytes) -> None:
        assert not self.is_settled, "a job is settled once"
        self.is_settled = True
        self._say(body)

    def _say(self, body: bytes) -> None:
        assert self.message.reply is not None
        self._broker.publish(Message(subject=self.message.reply, body=body))


def job_of(broker: Broker, message: Message) -> Job | None:
    """The job that a pull has brought; None for what is none."""
    where, delivery = subjects.read_job(message.subject), api.delivery_of(message.reply)
    if where is None or delivery is None:
        return None
    return Job(broker, message, where, delivery)
