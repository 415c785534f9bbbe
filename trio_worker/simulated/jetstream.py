"""JetStream in the event loop, as a part of `MemoryServer`, on any clock.

It does what this project asks of nats-server, and answers errors with the same numbers; one suite
of facts holds both to it. Where a test wants a fault, it sets `denied`, `is_on`, or says `forget`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryServer, subject_matches
from trio_worker.simulated.jetstream_stream import Json, MemoryConsumer, MemoryStream, Refused

_STREAM_DEFAULTS: Json = {
    "retention": "limits",
    "storage": "file",
    "discard": "old",
    "max_age": 0,
    "max_bytes": -1,
    "max_msgs": -1,
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "duplicate_window": 120_000_000_000,
    "allow_direct": False,
}
_STREAM_FIELDS = {
    *(*_STREAM_DEFAULTS, "name", "subjects", "republish", "allow_msg_ttl", "description"),
    *("discard_new_per_subject", "num_replicas"),
}


class MemoryJetStream:
    """Its state: the streams, each with its consumers."""

    def __init__(self, server: MemoryServer) -> None:
        self.streams: dict[str, MemoryStream] = {}
        self.is_on = True
        self.denied: set[str] = set()
        """Patterns of subjects that nobody may publish to: what is said there gets no answer."""
        self._server = server
        self._asked: dict[str, Callable[[str, Json], Json]] = {
            "STREAM.CREATE": self._create_stream,
            "STREAM.INFO": self._stream_info,
            "STREAM.DELETE": self._delete_stream,
            "STREAM.MSG.DELETE": self._delete_message,
            "CONSUMER.CREATE": self._create_consumer,
            "CONSUMER.INFO": self._consumer_info,
            "CONSUMER.DELETE": self._delete_consumer,
        }
        server.services.append(self._take)

    def forget_deliveries(self) -> None:
        """As a killed server may: what is under way comes again, numbered 1, and no pull waits."""
        for stream in self.streams.values():
            for name, consumer in list(stream.consumers.items()):
                consumer.abandon()
                stream.consumers[name] = MemoryConsumer(self._server, stream, consumer.config)

    def _take(self, message: Message) -> bool:
        """A message has been published; whether it was for JetStream."""
        if any(subject_matches(each, message.subject) for each in self.denied):
            return True
        if not self.is_on:
            return False
        if message.subject.startswith("$JS.ACK."):
            return self._acknowledge(message)
        if message.subject.startswith("$JS.API."):
            return self._serve(message)
        takers = [each for each in self.streams.values() if each.takes(message.subject)]
        for stream in takers:
            self._answer(message, partial(stream.publish, message))
        return bool(takers)

    def _serve(self, message: Message) -> bool:
        """Carry out a request; False for one that only a stream or consumer would answer."""
        asked = message.subject.removeprefix("$JS.API.")
        if asked.startswith("DIRECT.GET."):
            return self._direct_get(asked.removeprefix("DIRECT.GET."), message)
        if asked.startswith("CONSUMER.MSG.NEXT."):
            return self._pull(asked.removeprefix("CONSUMER.MSG.NEXT."), message)
        for name, function in self._asked.items():
            if asked.startswith(f"{name}."):
                which = asked.removeprefix(f"{name}.")
                body: Json = msgspec.json.decode(message.body) if message.body else {}
                self._answer(message, partial(function, which, body))
                return True
        return False

    def _answer(self, message: Message, act: Callable[[], Json]) -> None:
        try:
            answer = act()
        except Refused as refused:
            answer = {
                "error": {
                    "code": refused.status,
                    "err_code": refused.number,
                    "description": refused.text,
                }
            }
        if message.reply is not None:
            body = msgspec.json.encode(answer)
            self._server.hand_out(message.reply, Message(subject=message.reply, body=body))

    # --- streams --------------------------------------------------------------------------

    def _stream(self, name: str) -> MemoryStream:
        if (stream := self.streams.get(name)) is None:
            raise Refused(404, 10059, "stream not found")
        return stream

    def _create_stream(self, name: str, config: Json) -> Json:
        for field in config:
            if field not in _STREAM_FIELDS:
                raise Refused(400, 10025, f'invalid JSON: json: unknown field "{field}"')
        config = _STREAM_DEFAULTS | config
        if (known := self.streams.get(name)) is not None:
            if known.config != config:
                raise Refused(400, 10058, "stream name already in use with a different config")
        elif any(
            _overlap(one, other)
            for each in self.streams.values()
            for one in each.config["subjects"]
            for other in config["subjects"]
        ):
            raise Refused(400, 10065, "subjects overlap with an existing stream")
        else:
            self.streams[name] = MemoryStream(self._server, config)
        return self._stream_info(name, {}) | {"did_create": True}

    def _stream_info(self, name: str, asked: Json) -> Json:
        stream = self._stream(name)
        return {"config": stream.config, "state": stream.state(asked.get("subjects_filter"))}

    def _delete_stream(self, name: str, _asked: Json) -> Json:
        for consumer in self._stream(name).consumers.values():
            consumer.end(409, "Consumer Deleted")
        del self.streams[name]
        return {"success": True}

    def _delete_message(self, name: str, asked: Json) -> Json:
        if not self._stream(name).remove(asked["seq"]):
            raise Refused(400, 10057, "message not found")
        return {"success": True}

    # --- consumers ------------------------------------------------------------------------

    def _consumer(self, which: str) -> MemoryConsumer:
        stream, _, name = which.partition(".")
        if (consumer := self._stream(stream).consumers.get(name)) is None:
            raise Refused(404, 10014, "consumer not found")
        return consumer

    def _create_consumer(self, which: str, asked: Json) -> Json:
        stream_name, _, name = which.partition(".")
        stream, config = self._stream(stream_name), asked["config"]
        if (known := stream.consumers.get(name)) is not None:
            if known.config != config:
                raise Refused(400, 10148, "consumer already exists")
        elif stream.config["retention"] == "workqueue" and any(
            _overlap(each.config["filter_subject"], config["filter_subject"])
            for each in stream.consumers.values()
        ):
            raise Refused(400, 10100, "filtered consumer not unique on workqueue stream")
        else:
            stream.consumers[name] = MemoryConsumer(self._server, stream, config)
        return stream.consumers[name].info()

    def _consumer_info(self, which: str, _asked: Json) -> Json:
        return self._consumer(which).info()

    def _delete_consumer(self, which: str, _asked: Json) -> Json:
        consumer = self._consumer(which)
        consumer.end(409, "Consumer Deleted")
        stream, _, name = which.partition(".")
        del self._stream(stream).consumers[name]
        return {"success": True}

    def _pull(self, which: str, message: Message) -> bool:
        try:
            consumer = self._consumer(which)
        except Refused:
            return False
        if message.reply is not None:
            consumer.pull(message.reply, msgspec.json.decode(message.body or b"{}"))
        return True

    def _acknowledge(self, message: Message) -> bool:
        _, _, stream_name, name, _, sequence, *_ = message.subject.split(".")
        stream = self.streams.get(stream_name)
        consumer = None if stream is None else stream.consumers.get(name)
        if consumer is None:
            return False
        consumer.acknowledge(int(sequence), message.body)
        if message.reply is not None:
            self._server.hand_out(message.reply, Message(subject=message.reply))
        return True

    def _direct_get(self, which: str, message: Message) -> bool:
        name, _, subject = which.partition(".")
        stream = self.streams.get(name)
        if stream is None or not stream.config["allow_direct"] or message.reply is None:
            return False
        if not subject:
            stream.batch(message.reply, msgspec.json.decode(message.body))
            return True
        if (kept := stream.last_of(subject)) is not None:
            stream.direct(message.reply, kept)
        else:
            headers = {"Status": "404", "Description": "Message Not Found"}
            self._server.hand_out(message.reply, Message(subject=message.reply, headers=headers))
        return True


def _overlap(one: str, other: str) -> bool:
    """Whether some subject matches both patterns."""
    ones, others = one.split("."), other.split(".")
    for first, second in zip(ones, others, strict=False):
        if ">" in (first, second):
            return True
        if first != second and "*" not in (first, second):
            return False
    return len(ones) == len(others)
