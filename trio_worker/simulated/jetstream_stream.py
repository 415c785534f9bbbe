"""One stream of JetStream in the event loop, with its consumers.

Its clock is the loop's. What happens later is asked of the server that carries the messages.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec
import trio
from sortedcontainers import SortedDict

from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryServer, subject_matches

Json: TypeAlias = "dict[str, Any]"
NS = 1_000_000_000
EPOCH_NS = 1_700_000_000 * NS
"""What the loop's clock began at, as far as messages say."""


class Refused(Exception):
    """What the server answers as an error: its status, its number, its words."""

    def __init__(self, status: int, number: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.number = number
        self.text = text


@dataclass(slots=True, kw_only=True)
class Kept:
    """A message of a stream."""

    sequence: int
    subject: str
    body: bytes
    headers: Mapping[str, str]
    time_ns: int

    @property
    def size(self) -> int:
        return len(self.subject) + len(self.body) + sum(map(len, self.headers.values()))


class MemoryStream:
    """Its state: the messages by number, who pulls them, and the ids of late."""

    def __init__(self, server: MemoryServer, config: Json) -> None:
        self.config = config
        self.consumers: dict[str, MemoryConsumer] = {}
        self.messages: SortedDict[int, Kept] = SortedDict()
        self.by_subject: dict[str, list[int]] = {}
        self.last_sequence = 0
        self.bytes = 0
        self._server = server
        self._ids: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """By `Nats-Msg-Id`: the number, and until when it counts."""

    @property
    def name(self) -> str:
        return str(self.config["name"])

    def takes(self, subject: str) -> bool:
        return any(subject_matches(each, subject) for each in self.config["subjects"])

    def state(self, subjects: str | None) -> Json:
        state: Json = {
            "messages": len(self.messages),
            "bytes": self.bytes,
            "first_seq": self.messages.peekitem(0)[0] if self.messages else 0,
            "last_seq": self.last_sequence,
        }
        if subjects is not None:
            state["subjects"] = {
                name: len(numbers)
                for name, numbers in self.by_subject.items()
                if subject_matches(subjects, name)
            }
        return state

    def last_of(self, subject: str) -> Kept | None:
        numbers = self.by_subject.get(subject)
        return self.messages[numbers[-1]] if numbers else None

    # --- taking messages in ---------------------------------------------------------------

    def publish(self, message: Message) -> Json:
        """Store it, and return its receipt. Raises `Refused`."""
        now = trio.current_time()
        receipt: Json = {"stream": self.name, "seq": 0}
        given_id = message.headers.get("Nats-Msg-Id")
        if given_id is not None and (known := self._known(given_id, now)) is not None:
            return receipt | {"seq": known, "duplicate": True}
        self._check_expected(message)
        self._check_limits(message)
        last = self.last_of(message.subject)
        kept = self._keep(message, now)
        if given_id is not None:
            window_s = self.config.get("duplicate_window", 120 * NS) / NS
            self._ids[given_id] = (kept.sequence, now + window_s)
        self._republish(kept, 0 if last is None else last.sequence)
        for consumer in self.consumers.values():
            consumer.offer(kept)
        return receipt | {"seq": kept.sequence}

    def _known(self, given_id: str, now: float) -> int | None:
        while self._ids and next(iter(self._ids.values()))[1] <= now:
            self._ids.popitem(last=False)
        known = self._ids.get(given_id)
        return None if known is None else known[0]

    def _check_expected(self, message: Message) -> None:
        expected = message.headers.get("Nats-Expected-Last-Subject-Sequence")
        if expected is None:
            return
        last = self.last_of(message.subject)
        sequence = 0 if last is None else last.sequence
        if int(expected) != sequence:
            raise Refused(400, 10071, f"wrong last sequence: {sequence}")

    def _check_limits(self, message: Message) -> None:
        """Raise what the server would answer, or make room, as `discard` says."""
        config = self.config
        of_subject = self.by_subject.get(message.subject, [])
        is_new = config.get("discard", "old") == "new"
        per_subject = config.get("max_msgs_per_subject", -1)
        if 0 < per_subject <= len(of_subject):
            if is_new and config.get("discard_new_per_subject"):
                raise Refused(503, 10077, "maximum messages per subject exceeded")
            self.remove(of_subject[0])
        size = len(message.subject) + len(message.body)
        for limit, used, what in (
            (config.get("max_msgs", -1), len(self.messages) + 1, "messages"),
            (config.get("max_bytes", -1), self.bytes + size, "bytes"),
        ):
            if 0 < limit < used:
                if is_new:
                    raise Refused(503, 10077, f"maximum {what} exceeded")
                self.remove(self.messages.peekitem(0)[0])

    def _keep(self, message: Message, now: float) -> Kept:
        self.last_sequence += 1
        kept = Kept(
            sequence=self.last_sequence,
            subject=message.subject,
            body=message.body,
            headers=message.headers,
            time_ns=EPOCH_NS + round(now * NS),
        )
        self.messages[kept.sequence] = kept
        self.by_subject.setdefault(kept.subject, []).append(kept.sequence)
        self.bytes += kept.size
        ages = [self.config["max_age"] / NS] if self.config.get("max_age") else []
        if self.config.get("allow_msg_ttl") and "Nats-TTL" in message.headers:
            ages.append(float(message.headers["Nats-TTL"]))
        if ages:
            self._server.call_at(now + min(ages), lambda: self.remove(kept.sequence))
        return kept

    def _republish(self, kept: Kept, last_sequence: int) -> None:
        """To the one subject that `{{wildcard(1)}}` makes of the message's last token."""
        if (republish := self.config.get("republish")) is None:
            return
        subject = republish["dest"].replace("{{wildcard(1)}}", kept.subject.rpartition(".")[2])
        headers = dict(kept.headers) | self._own_headers(kept)
        headers["Nats-Last-Sequence"] = str(last_sequence)
        self._server.hand_out(subject, Message(subject=subject, body=kept.body, headers=headers))

    def _own_headers(self, kept: Kept) -> dict[str, str]:
        return {
            "Nats-Stream": self.name,
            "Nats-Subject": kept.subject,
            "Nats-Sequence": str(kept.sequence),
            "Nats-Time-Stamp": datetime.fromtimestamp(kept.time_ns / NS, UTC).isoformat(),
        }

    def remove(self, sequence: int) -> bool:
        """Take a message out; False if it is not there."""
        kept = self.messages.pop(sequence, None)
        if kept is None:
            return False
        self.bytes -= kept.size
        numbers = self.by_subject[kept.subject]
        numbers.remove(sequence)
        if not numbers:
            del self.by_subject[kept.subject]
        for consumer in self.consumers.values():
            consumer.forget(sequence)
        return True

    # --- reading --------------------------------------------------------------------------

    def direct(self, inbox: str, kept: Kept, **more: str) -> None:
        """Answer a direct get with this message."""
        headers = dict(kept.headers) | self._own_headers(kept)
        named = {name.replace("_", "-"): value for name, value in more.items()}
        message = Message(subject=inbox, body=kept.body, headers=headers | named)
        self._server.hand_out(inbox, message)

    def batch(self, inbox: str, asked: Json) -> None:
        """Answer a direct get of several messages."""
        if "multi_last" in asked:
            matching = [
                numbers[-1]
                for name, numbers in self.by_subject.items()
                if any(subject_matches(each, name) for each in asked["multi_last"])
            ]
            found, matching = sorted(matching), []
        else:
            matching = [
                sequence
                for sequence in self.messages.irange(minimum=asked.get("seq", 1))
                if subject_matches(asked["next_by_subj"], self.messages[sequence].subject)
            ]
            found, matching = matching[: asked["batch"]], matching[asked["batch"] :]
        if not found:
            self._say(inbox, 404, "Message Not Found")
            return
        left = len(matching)
        for number, sequence in enumerate(found):
            pending = str(left + len(found) - number - 1)
            self.direct(inbox, self.messages[sequence], Nats_Num_Pending=pending)
        self._say(inbox, 204, "EOB", {"Nats-Num-Pending": str(left)})

    def _say(
        self, inbox: str, status: int, text: str, headers: Mapping[str, str] | None = None
    ) -> None:
        said = {"Status": str(status), "Description": text} | dict(headers or {})
        self._server.hand_out(inbox, Message(subject=inbox, headers=said))


@dataclass(slots=True, kw_only=True)
class Pull:
    """A request for messages that waits."""

    inbox: str
    priority: int
    number: int
    is_wanted: Callable[[], bool]


@dataclass(slots=True)
class _UnderWay:
    """A message that somebody works on."""

    delivered: int = 0
    due: float = 0.0
    """When it comes again."""
    waits: bool = False
    """It is to be given to somebody again."""


class MemoryConsumer:
    """A durable pull consumer. Its state: what nobody has had yet, and who has what."""

    def __init__(self, server: MemoryServer, stream: MemoryStream, config: Json) -> None:
        self.config = config
        self.pulls: list[Pull] = []
        self.fresh: OrderedDict[int, None] = OrderedDict()
        self.under_way: dict[int, _UnderWay] = {}
        self._again: deque[int] = deque()
        self._server = server
        self._stream = stream
        self._numbers = itertools.count(1)
        for kept in stream.messages.values():
            self._note(kept)

    @property
    def name(self) -> str:
        return str(self.config["durable_name"])

    def info(self) -> Json:
        self._tidy()
        waiting = [each for each in self.under_way.values() if each.waits]
        return {
            "stream_name": self._stream.name,
            "name": self.name,
            "config": self.config,
            "num_pending": len(self.fresh),
            "num_ack_pending": len(self.under_way),
            "num_redelivered": len(waiting),
            "num_waiting": len(self.pulls),
        }

    def _note(self, kept: Kept) -> None:
        if subject_matches(self.config["filter_subject"], kept.subject):
            self.fresh[kept.sequence] = None

    def offer(self, kept: Kept) -> None:
        """The stream has one message more."""
        self._note(kept)
        self._serve()

    def forget(self, sequence: int) -> None:
        """The stream has this message no longer."""
        self.fresh.pop(sequence, None)
        self.under_way.pop(sequence, None)

    # --- pulls ----------------------------------------------------------------------------

    def pull(self, inbox: str, asked: Json) -> None:
        """Give a message now, or when there is one, or say that there is none."""
        if self.config.get("priority_policy") and "group" not in asked:
            self._say(inbox, 400, "Bad Request - Priority Group missing")
            return
        if not 0 <= asked.get("priority", 0) <= 9:
            self._say(inbox, 400, "Bad Request - Priority must be between 0 and 9")
            return
        pull = Pull(
            inbox=inbox,
            priority=asked.get("priority", 0),
            number=next(self._numbers),
            is_wanted=self._server.interest_in(inbox),
        )
        self.pulls.append(pull)
        self._serve()
        if pull not in self.pulls:
            return
        expires_s = asked.get("expires", 0) / NS
        if asked.get("no_wait") and not expires_s:
            if self._next_sequence() is None or not self._is_full():
                self._end(pull, 404, "No Messages")
        elif expires_s:
            due = trio.current_time() + expires_s
            self._server.call_at(due, lambda: self._end(pull, 408, "Request Timeout"))

    def end(self, status: int, text: str) -> None:
        """It is deleted: who waits is told."""
        for pull in list(self.pulls):
            self._end(pull, status, text)
        self.abandon()

    def abandon(self) -> None:
        """It is there no more: what was to come later comes to nothing."""
        self.pulls.clear()
        self.fresh.clear()
        self.under_way.clear()

    def _end(self, pull: Pull, status: int, text: str) -> None:
        if pull in self.pulls:
            self.pulls.remove(pull)
            self._say(pull.inbox, status, text)

    def _say(self, inbox: str, status: int, text: str) -> None:
        headers = {"Status": str(status), "Description": text}
        self._server.hand_out(inbox, Message(subject=inbox, headers=headers))

    def _tidy(self) -> None:
        self.pulls = [each for each in self.pulls if each.is_wanted()]

    def _is_full(self) -> bool:
        most = self.config.get("max_ack_pending", 1000)
        return not self._again and 0 < most <= len(self.under_way)

    def _next_sequence(self) -> int | None:
        while self._again:
            state = self.under_way.get(self._again[0])
            if state is not None and state.waits:
                return self._again[0]
            self._again.popleft()
        return next(iter(self.fresh), None)

    def _serve(self) -> None:
        """Give out what there is to who asks, the least busy first."""
        self._tidy()
        while self.pulls:
            sequence = self._next_sequence()
            if sequence is None or self._is_full():
                return
            pull = min(self.pulls, key=lambda each: (each.priority, each.number))
            self.pulls.remove(pull)
            if self._again:
                self._again.popleft()
            else:
                del self.fresh[sequence]
            self._give(pull, self._stream.messages[sequence])

    def _give(self, pull: Pull, kept: Kept) -> None:
        state = self.under_way.setdefault(kept.sequence, _UnderWay())
        state.delivered += 1
        state.waits = False
        self._await_ack(kept.sequence, state)
        tokens = (
            *(self._stream.name, self.name, state.delivered, kept.sequence, next(self._numbers)),
            *(kept.time_ns, len(self.fresh)),
        )
        reply = f"$JS.ACK.{'.'.join(map(str, tokens))}"
        message = Message(subject=kept.subject, body=kept.body, headers=kept.headers, reply=reply)
        self._server.hand_out(pull.inbox, message)

    # --- acknowledgements -----------------------------------------------------------------

    def _await_ack(self, sequence: int, state: _UnderWay) -> None:
        self._come_again(sequence, state, self.config.get("ack_wait", 30 * NS) / NS)

    def _come_again(self, sequence: int, state: _UnderWay, after_s: float) -> None:
        state.due = due = trio.current_time() + after_s

        def is_due() -> None:
            if self.under_way.get(sequence) is state and state.due == due and not state.waits:
                state.waits = True
                self._again.append(sequence)
                self._serve()

        self._server.call_at(due, is_due)

    def acknowledge(self, sequence: int, body: bytes) -> None:
        """What somebody says of a message that it was given."""
        state = self.under_way.get(sequence)
        if body.startswith(b"-NAK"):
            if state is not None and not state.waits:
                delay = msgspec.json.decode(body[5:])["delay"] if body[4:] else 0
                self._come_again(sequence, state, delay / NS)
        elif body == b"+WPI":
            if state is not None and not state.waits:
                self._await_ack(sequence, state)
        elif body == b"+ACK" or body.startswith(b"+TERM"):
            if self._stream.config.get("retention") == "workqueue":
                self._stream.remove(sequence)
            self.under_way.pop(sequence, None)
            self._serve()
