"""What is said to JetStream and what it says back: subjects, bodies, replies, errors. Pure.

Times in bodies are nanoseconds. Field names and error numbers are those of nats-server; what is
relied on is held by one conformance suite against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec

from trio_worker.ports import Message

Json: TypeAlias = "dict[str, Any]"

NS = 1_000_000_000
"""Nanoseconds in a second."""
PRIORITY_GROUP = "jobs"
EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
"""With `0`, a publish is stored only if its subject has no message yet."""
MESSAGE_ID = "Nats-Msg-Id"
TIME_TO_LIVE = "Nats-TTL"
"""On a message of a stream that allows it: whole seconds until it is gone."""

UNKNOWN_FIELD = 10025
"""The number of the error by which a server says that it does not know a field or a value."""


# --- subjects -----------------------------------------------------------------------------


def stream_info(stream: str) -> str:
    return f"$JS.API.STREAM.INFO.{stream}"


def stream_create(stream: str) -> str:
    return f"$JS.API.STREAM.CREATE.{stream}"


def message_delete(stream: str) -> str:
    return f"$JS.API.STREAM.MSG.DELETE.{stream}"


def consumer_info(stream: str, consumer: str) -> str:
    return f"$JS.API.CONSUMER.INFO.{stream}.{consumer}"


def consumer_create(stream: str, consumer: str) -> str:
    return f"$JS.API.CONSUMER.CREATE.{stream}.{consumer}"


def consumer_list(stream: str) -> str:
    """All consumers of a stream, 256 at a time."""
    return f"$JS.API.CONSUMER.LIST.{stream}"


def next_message(stream: str, consumer: str) -> str:
    """Where a pull asks a consumer for messages."""
    return f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"


def direct_get(stream: str, subject: str | None = None) -> str:
    """Where the last message of one subject is had; without one, what the body describes."""
    return f"$JS.API.DIRECT.GET.{stream}" + ("" if subject is None else f".{subject}")


# --- bodies -------------------------------------------------------------------------------


def pull_body(*, expires_s: float | None, priority: int, no_wait: bool = False) -> bytes:
    """A pull for one message. `priority` 0 is served first, 9 last."""
    body: Json = {"batch": 1, "group": PRIORITY_GROUP, "priority": priority}
    if expires_s is not None:
        body["expires"] = round(expires_s * NS)
    if no_wait:
        body["no_wait"] = True
    return msgspec.json.encode(body)


def batch_body(*, subject: str, sequence: int, messages: int) -> bytes:
    """The messages of a stream from `sequence` on whose subject matches; for a direct get."""
    return msgspec.json.encode({"seq": sequence, "batch": messages, "next_by_subj": subject})


def last_of_body(subjects: list[str]) -> bytes:
    """The last message of each of these subjects; for a direct get."""
    return msgspec.json.encode({"multi_last": subjects})


ACK = b"+ACK"
PROGRESS = b"+WPI"
"""The message is being worked on: the time for its acknowledgement begins anew."""


def nak(delay_s: float = 0.0) -> bytes:
    """Give a message back; it comes again, to whoever asks then, `delay_s` from now."""
    if delay_s <= 0:
        return b"-NAK"
    return b"-NAK " + msgspec.json.encode({"delay": round(delay_s * NS)})


def term(reason: str) -> bytes:
    """Take a message out without having done what it asks for."""
    return f"+TERM {reason}".encode()


# --- what comes back ----------------------------------------------------------------------


class Fault(StrEnum):
    """What JetStream could not do."""

    STREAM_MISSING = "stream missing"
    CONSUMER_MISSING = "consumer missing"
    OTHER_CONFIG = "other config"
    """It is there, and not as it would have to be."""
    OVERLAP = "overlap"
    """Another stream has these subjects."""
    WRONG_LAST = "wrong last"
    """The subject has another last message than was said."""
    FULL = "full"
    """The stream takes nothing more."""
    NO_STORAGE = "no storage"
    """The server has no memory or disk left for it."""
    TOO_LARGE = "too large"
    OFF_FOR_ACCOUNT = "off for account"
    NOBODY = "nobody"
    """The server's 503: JetStream is off, or nothing takes this subject."""
    NO_ANSWER = "no answer"
    """Most likely a right is missing: then the server says so on the connection only."""
    BUSY = "busy"
    """It may go well later: there is no leader at the moment, or too much is asked for."""
    OTHER = "other"


class JetStreamError(Exception):
    """What JetStream did not do; the message says what was missing and what to do.

    Attributes:
        fault: the kind.
        code: the server's number of the error; 0 where it gave none.
    """

    def __init__(self, fault: Fault, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.fault = fault
        self.code = code


_FAULTS = {
    10008: Fault.BUSY,
    10014: Fault.CONSUMER_MISSING,
    10023: Fault.NO_STORAGE,
    10035: Fault.OFF_FOR_ACCOUNT,
    10039: Fault.OFF_FOR_ACCOUNT,
    10047: Fault.NO_STORAGE,
    10052: Fault.OTHER_CONFIG,
    10054: Fault.TOO_LARGE,
    10058: Fault.OTHER_CONFIG,
    10059: Fault.STREAM_MISSING,
    10065: Fault.OVERLAP,
    10071: Fault.WRONG_LAST,
    10074: Fault.BUSY,
    10076: Fault.OFF_FOR_ACCOUNT,
    10077: Fault.FULL,
    10099: Fault.OVERLAP,
    10100: Fault.OVERLAP,
    10148: Fault.OTHER_CONFIG,
}
_ADVICE = {
    Fault.STREAM_MISSING: "a stream is missing: create it, or let a worker with the rights for "
    "$JS.API.STREAM.CREATE do so",
    Fault.CONSUMER_MISSING: "a consumer is missing: a worker with the rights for "
    "$JS.API.CONSUMER.CREATE makes it",
    Fault.OTHER_CONFIG: "it is there with another configuration, which is never changed here: "
    "change or remove it yourself",
    Fault.OVERLAP: "another one has these subjects already: remove it, or choose other names in "
    "nats.jetstream",
    Fault.WRONG_LAST: "the subject has a message already",
    Fault.FULL: "the stream is full: wait until it is worked off, or raise its limits",
    Fault.NO_STORAGE: "the server has no room left for JetStream: give it more, or purge a stream",
    Fault.TOO_LARGE: "the message is larger than the stream takes: raise max_msg_size",
    Fault.OFF_FOR_ACCOUNT: "JetStream is off for this account: enable it in the server's "
    "configuration",
    Fault.BUSY: "the server cannot say now: it is tried again",
    Fault.OTHER: "see the server's log",
}


def no_answer(subject: str) -> JetStreamError:
    """Nothing came back from `subject` in time."""
    return JetStreamError(
        Fault.NO_ANSWER,
        f"nothing answered on {subject}: most likely this user may not publish there, or not "
        "subscribe to its inbox; grant it, as the permissions in the documentation do",
    )


def nobody(subject: str) -> JetStreamError:
    """The server's 503 for `subject`."""
    if subject.startswith("$JS.API.CONSUMER.MSG.NEXT."):
        what = "the consumer or its stream is missing, or JetStream is off"
    elif subject.startswith("$JS.API.DIRECT.GET."):
        what = "the stream is missing or does not allow_direct, or JetStream is off"
    elif subject.startswith("$JS."):
        what = (
            "JetStream is off: start nats-server with -js, or set nats.jetstream.enabled where "
            "it is embedded"
        )
    else:
        what = "no stream takes this subject: create it, or start a worker that does so"
    return JetStreamError(Fault.NOBODY, f"nobody answers on {subject}: {what}")


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Reply(msgspec.Struct):
    error: _Error | None = None


def checked(message: Message, asked: str) -> bytes:
    """The body of the reply to what was sent to `asked`. Raises `JetStreamError`."""
    if message.headers.get("Status") == "503":
        raise nobody(asked)
    if not message.body:
        # As an acknowledgement is acknowledged.
        return b""
    try:
        error = msgspec.json.decode(message.body, type=_Reply).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        shown = message.body[:64]
        raise JetStreamError(
            Fault.OTHER, f"what answers on {asked} is not JetStream: {shown!r}"
        ) from None
    if error is not None:
        fault = _FAULTS.get(error.err_code, Fault.OTHER)
        raise JetStreamError(
            fault,
            f"{asked}: {error.description} (error {error.err_code}); {_ADVICE[fault]}",
            code=error.err_code,
        )
    return message.body


class PubAck(msgspec.Struct, frozen=True):
    """The receipt for a message that has been stored."""

    stream: str
    seq: int
    duplicate: bool = False
    """It had been stored before, under the same `Nats-Msg-Id`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A message of a stream."""

    subject: str
    sequence: int
    body: bytes
    headers: Mapping[str, str]
    """Its own and, beginning with `Nats-`, the stream's."""


def stored(message: Message) -> Stored:
    """The message that a direct get has brought."""
    headers = message.headers
    return Stored(
        subject=headers["Nats-Subject"],
        sequence=int(headers["Nats-Sequence"]),
        body=message.body,
        headers=headers,
    )


class StreamState(msgspec.Struct, frozen=True):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    subjects: dict[str, int] | None = None
    """Messages by subject, where that was asked for."""


class StreamInfo(msgspec.Struct, frozen=True):
    config: Json
    state: StreamState = StreamState()


class ConsumerInfo(msgspec.Struct, frozen=True):
    config: Json
    num_pending: int = 0
    """Messages that nobody has been given yet."""
    num_ack_pending: int = 0
    """Messages that somebody works on."""
    num_waiting: int = 0
    """Open pulls."""
    num_redelivered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What the reply subject of a consumer's message tells."""

    stream: str
    consumer: str
    delivered: int
    """How often the message has been given to somebody, this time included."""
    sequence: int
    """Its number in the stream."""
    stored_at_ns: int
    """When it was stored, since the epoch."""
    pending: int
    """How many are left that match."""


def delivery_of(reply: str | None) -> Delivery | None:
    """Read `$JS.ACK.…`; None for what is no such subject.

    There are two forms, of which the longer has a domain and an account before the stream; so the
    tokens are counted from the right.
    """
    tokens = (reply or "").split(".")
    if len(tokens) < 9 or tokens[:2] != ["$JS", "ACK"]:
        return None
    # The longer form may grow a random token at the end, which is none of ours.
    tokens = tokens[:11] if len(tokens) > 11 else tokens
    try:
        delivered, sequence, _, stored_at_ns, pending = map(int, tokens[-5:])
    except ValueError:
        return None
    return Delivery(
        stream=tokens[-7],
        consumer=tokens[-6],
        delivered=delivered,
        sequence=sequence,
        stored_at_ns=stored_at_ns,
        pending=pending,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Word about a pull, in place of a message."""

    number: int
    text: str

    @property
    def ends_the_pull(self) -> bool:
        """All do but the heartbeat."""
        return self.number != 100

    @property
    def consumer_is_gone(self) -> bool:
        return self.number == 503 or (self.number == 409 and "Deleted" in self.text)

    @property
    def is_usual(self) -> bool:
        """Its time has passed, there was nothing, or the server is being shut down."""
        return self.number in {100, 404, 408} or "Shutdown" in self.text


def status_of(message: Message) -> Status | None:
    """The status that stands in a message's headers; None for what is a message of the stream."""
    number = message.headers.get("Status", "")
    if delivery_of(message.reply) is not None or not number.isdigit():
        return None
    return Status(number=int(number), text=message.headers.get("Description", ""))
