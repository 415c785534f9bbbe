"""One worker and what it passes on, with a peer in the hands of the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio
from support.fleet_rig import MODEL, Peer, peer_of
from support.worker_rig import MB, Rig, decode, running_worker
from trio.testing import MockClock

from trio_worker.flow.hand_on import SETTLE_S, UNPUBLISHED_BYTES_MAX
from trio_worker.flow.passed_on import KEPT_S
from trio_worker.ports import Message
from trio_worker.stages.intake import INTAKE_BUFFER
from trio_worker.wire import native

ONE_SLOT = (
    "worker.continuous_batching.max_batch_size=1",
    "worker.continuous_batching.preempt=false",
    "worker.request_queue.max_depth=2",
)


class Caller:
    """Sends requests to the group as bytes, and keeps what it is answered."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.answers: dict[str, list[Message]] = {}

    async def send(
        self,
        name: str,
        *,
        subject: str = "inference",
        headers: Mapping[str, str] | None = None,
        reply: str | None = None,
        **fields: Any,
    ) -> None:
        """Send one, named by its id, and give it a moment."""
        inbox = self.rig.caller.new_inbox()
        self.answers[name] = []
        await self.rig.caller.subscribe(inbox, self.answers[name].append)
        body = msgspec.json.encode({"prompt": "x", "request_id": name, **fields})
        headers = {**(headers or {})}
        if headers:
            headers.setdefault("Reply-To", inbox)
        self.rig.caller.publish(
            Message(subject=subject, body=body, reply=reply or inbox, headers=headers)
        )
        await trio.sleep(0.01)

    def codes(self, name: str) -> list[str]:
        """Of the terminal messages."""
        return [
            "ok" if each.headers["Terminal"] == "done" else decode(each)["error"]["code"]
            for each in self.answers[name]
            if "Terminal" in each.headers
        ]


async def fill(caller: Caller, count: int = 1, **fields: Any) -> None:
    """Keep the worker's slot, and places of its queue, for minutes."""
    for number in range(count):
        await caller.send(
            f"long{number}",
            subject="inference.w1",
            **{"max_tokens": 4000, "timeout_ms": 600_000, **fields},
        )


def handed_on(rig: Rig) -> dict[str, int]:
    return {reason: count for reason, count in rig.snapshot().fleet.handed_on.items() if count}


def names(peer: Peer) -> list[str]:
    return [decode(message)["request_id"] for message in peer.received]


async def test_what_is_passed_on_is_the_message_as_it_came(autojump_clock: MockClock) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller)
        await caller.send("a", headers={"Trace": "t", "Reply-To": "elsewhere", "Route": "x"})
        (message,) = peer.received
        (inbox,) = {
            each._pattern
            for each in rig.server._subscriptions
            if each.broker is rig.caller and each._sink.__self__ is caller.answers["a"]  # type: ignore[attr-defined]
        }
        assert decode(message) == {"prompt": "x", "request_id": "a"}
        assert message.headers == {"Trace": "t", "Reply-To": inbox, "Route": "w1"}
        assert message.reply is not None
        assert message.reply.startswith("inference.w1.fwd.")
        assert caller.answers["a"] == []
        assert handed_on(rig) == {"no_slot": 1}
        await caller.send("b", headers={"Route": "w1", "Reply-To": inbox}, reply=message.reply)
        assert names(peer) == ["a"], "a request that comes by the group is no worker's word"


async def test_a_request_that_was_passed_on_is_answered_to_whoever_asked(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        caller = Caller(rig)
        hop = {"Route": "w9", "Caller": "shop"}
        forwarded = "inference.w9.fwd.1"
        await caller.send(
            "a", subject="inference.w1", reply=forwarded, headers=hop, caller="forged"
        )
        assert [
            each.request.caller for each in rig.observed.parts.admission.in_flight.values()
        ] == ["shop"]
        await trio.sleep(10)
        assert caller.codes("a") == ["ok"]
        assert rig.snapshot().fleet.taken_over == 1
        # Where the answer goes is checked as for any request.
        bad = {**hop, "Reply-To": "orders.new"}
        await caller.send("b", subject="inference.w1", reply=forwarded, headers=bad)
        assert rig.snapshot().requests.dropped == 1


async def test_what_nobody_takes_comes_back_and_is_served(autojump_clock: MockClock) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig, listens=False):
        caller = Caller(rig)
        await fill(caller, max_tokens=50)
        await caller.send("a", max_tokens=5)
        assert rig.snapshot().fleet.returned == 1
        assert [member.id for member in rig.observed.fleet()] == ["w1"]
        await trio.sleep(10)
        assert caller.codes("a") == ["ok"]


async def test_what_comes_back_may_have_been_cancelled(autojump_clock: MockClock) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig, listens=False):
        caller = Caller(rig)
        await fill(caller, max_tokens=50)
        rig.server.delay_s = 0.1
        await caller.send("a")
        await trio.sleep(0.15)
        assert handed_on(rig) == {"no_slot": 1}
        rig.caller.publish(Message(subject="inference.cancel", body=native.cancel_by_id("a")))
        await trio.sleep(1)
        assert caller.codes("a") == ["CANCELLED"]


async def test_what_is_not_heard_of_for_a_second_has_been_taken(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller)
        await caller.send("a")
        (message,) = peer.received
        assert message.reply is not None
        await trio.sleep(KEPT_S + 1.1)
        late = Message(subject=message.reply, headers={"Status": "503"})
        rig.caller.publish(late)
        await trio.sleep(0.1)
        assert rig.snapshot().fleet.returned == 0
        assert rig.snapshot().requests.in_flight == 1


async def test_what_is_no_word_of_the_server_changes_nothing(autojump_clock: MockClock) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller)
        await caller.send("a")
        (message,) = peer.received
        assert message.reply is not None
        for subject, headers in (
            (message.reply, {}),
            (message.reply, {"Status": "404"}),
            ("inference.w1.fwd.999", {"Status": "503"}),
            ("inference.w1.fwd.x", {"Status": "503"}),
        ):
            rig.caller.publish(Message(subject=subject, headers=headers))
        await trio.sleep(0.1)
        assert rig.snapshot().fleet.returned == 0
        assert rig.snapshot().requests.dropped == 0


async def test_a_cancel_message_is_sent_after_a_request_once(autojump_clock: MockClock) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        cancels: list[Message] = []
        await fill(caller)
        await caller.send("a")
        await peer.broker.subscribe("inference.cancel", cancels.append)
        for _ in range(3):
            rig.caller.publish(Message(subject="inference.cancel", body=native.cancel_by_id("a")))
            await trio.sleep(0.1)
        assert [native.cancelled_id(each.body) for each in cancels] == ["a"] * 4


async def test_one_with_critical_memory_passes_on_what_it_would_refuse(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.resource_limits.check_interval_ms=100") as rig:
        rig.probe.used = 20_000 * MB
        await trio.sleep(1)
        async with peer_of(rig, in_flight=9) as peer:
            caller = Caller(rig)
            # It has left the group, but what was under way may still come.
            await caller.send(
                "a", subject="inference.w1", reply="inference.w9.fwd.1", headers={"Route": "w9"}
            )
            assert names(peer) == ["a"]
            assert peer.received[0].headers["Route"] == "w9,w1"
            assert handed_on(rig) == {"no_room": 1}
            await caller.send("b", subject="inference.w1")
            assert caller.codes("b") == ["RESOURCE_LIMIT_EXCEEDED"]


async def test_one_for_several_choices_goes_where_they_have_places(
    autojump_clock: MockClock,
) -> None:
    """One place is left, and the other worker is busier: for one choice it would stay."""
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig, in_flight=9) as peer:
        caller = Caller(rig)
        await fill(caller)
        await trio.sleep(0.1)
        await fill(caller)
        await caller.send("one-more", subject="inference.w1")
        await caller.send("two", n=2)
        assert names(peer) == ["two"]


async def test_more_messages_than_can_be_read_are_passed_on(autojump_clock: MockClock) -> None:
    """A burst that outruns intake: what its buffer does not hold goes to where there is room."""
    count = INTAKE_BUFFER + 50
    async with (
        running_worker("worker.request_queue.max_depth=1000") as rig,
        peer_of(rig, slots=1000) as peer,
    ):
        inbox = rig.caller.new_inbox()
        got: list[Message] = []
        await rig.caller.subscribe(inbox, got.append)
        for number in range(count):
            body = msgspec.json.encode({"prompt": "x", "request_id": f"r{number}"})
            rig.caller.publish(Message(subject="inference", body=body, reply=inbox))
        await trio.sleep(0.05)
        assert [each for each in got if each.headers["Terminal"] == "error"] == []
        assert len(peer.received) >= 50
        assert len(set(names(peer))) == len(peer.received)


@pytest.mark.parametrize(
    "changes", [{"connected": False}, {"unpublished_bytes": UNPUBLISHED_BYTES_MAX + 1}]
)
async def test_while_the_server_does_not_hear_us_nothing_is_passed_on(
    autojump_clock: MockClock, changes: dict[str, Any]
) -> None:
    """What waits in the outbox would come back when nobody remembers it."""
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller)
        real = rig.broker.statistics
        rig.broker.statistics = lambda: replace(real(), **changes)  # type: ignore[method-assign]
        await caller.send("a")
        rig.broker.statistics = real  # type: ignore[method-assign]
        assert names(peer) == []
        assert rig.snapshot().requests.in_flight == 2
        await caller.send("b")
        assert names(peer) == ["b"]


async def test_one_for_another_model_is_refused_where_it_comes_to(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller)
        await caller.send("a", model="other")
        assert caller.codes("a") == ["MODEL_NOT_FOUND"]
        await caller.send("b", model=MODEL)
        assert names(peer) == ["b"]


async def test_one_that_would_be_too_large_with_what_is_said_of_it_stays(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*ONE_SLOT, max_payload=4000) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller)
        room = 4000 - len(msgspec.json.encode({"prompt": "", "request_id": "a"}))
        await caller.send("a", prompt="x" * room)
        assert peer.received == []
        assert rig.snapshot().requests.in_flight == 2


# --- the drain --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_drain_passes_on_what_waits_and_its_answer_goes_on(
    autojump_clock: MockClock,
    stream: bool,  # noqa: FBT001
) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await caller.send("a", subject="inference", max_tokens=100, stream=True)
        peer.beat(in_flight=5)
        await trio.sleep(0.05)
        await caller.send("b", stream=stream, timeout_ms=20_000, messages=HELLO, prompt=None)
        assert peer.received == []
        # A streaming caller has heard that it is admitted, and that it is alive.
        await trio.sleep(1)
        peer.beat(in_flight=5)
        await trio.sleep(0.05)
        sent = len(caller.answers["b"])
        assert sent == (1 if stream else 0)
        rig.stop()
        await rig.finished.wait()
        assert caller.codes("a") == ["ok"], "what runs goes on here"
        assert caller.codes("b") == []
        (message,) = peer.received
        assert message.headers["Route"] == "w1"
        assert message.headers["Request-Id"] == "b"
        assert message.headers["Sequence"] == str(sent)
        assert 17_000 < int(message.headers["Left-Ms"]) < 20_000
        outcomes = [outcome for outcome, _ in rig.observed.parts.counters.metrics.requests.values]
        assert sorted(outcomes) == ["handed_on", "ok"]


async def test_what_arrives_during_a_drain_goes_to_anybody_else(
    autojump_clock: MockClock,
) -> None:
    """Also to one that says that it is full: that is old news, and a refusal here is none."""
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig, accepting=False, in_flight=9) as peer:
        caller = Caller(rig)
        rig.server.delay_s = 0.1
        await caller.send("a")
        rig.stop()
        await rig.finished.wait()
        await trio.sleep(1)
        assert names(peer) == ["a"]
        assert handed_on(rig) == {"draining": 1}
        assert caller.answers["a"] == []


HELLO = [{"role": "user", "content": "hello"}]


async def test_an_answer_that_goes_on_here_goes_on_where_it_was(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        caller = Caller(rig)
        hop = {"Route": "w9", "Request-Id": "mine", "Sequence": "2", "Left-Ms": "5000"}
        await caller.send(
            "other",
            subject="inference.w1",
            reply="inference.w9.fwd.1",
            headers=hop,
            stream=True,
            messages=HELLO,
            prompt=None,
            max_tokens=3,
            timeout_ms=60_000,
        )
        (sequence,) = rig.observed.parts.admission.in_flight.values()
        assert sequence.request_id == "mine"
        assert sequence.request.timeout_s == 5.0
        await trio.sleep(1)
        got = caller.answers["other"]
        assert [int(each.headers["Sequence"]) for each in got] == list(range(2, 2 + len(got)))
        assert {each.reply for each in got} == {"inference.w1.ctl.mine"}
        said = [decode(each)["choices"][0]["delta"] for each in got]
        assert [delta for delta in said if "role" in delta] == []
        assert caller.codes("other") == ["ok"]


async def test_who_is_asked_itself_answers_for_itself_in_a_drain(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig) as peer:
        caller = Caller(rig)
        await fill(caller, 2, max_tokens=100)
        await trio.sleep(0.2)
        rig.stop()
        await rig.finished.wait()
        assert caller.codes("long0") == ["ok"]
        assert caller.codes("long1") == ["WORKER_DRAINING"]
        assert peer.received == []


@pytest.mark.parametrize("signals", [1, 2])
async def test_what_comes_back_at_the_very_end_is_answered(
    autojump_clock: MockClock, signals: int
) -> None:
    """The peer dies while the drain passes on: the server's word is waited for."""
    async with running_worker(*ONE_SLOT) as rig, peer_of(rig, in_flight=5) as peer:
        caller = Caller(rig)
        rig.server.delay_s = 0.01
        await caller.send("a", max_tokens=100)
        await caller.send("b", stream=True)
        await trio.sleep(0.2)
        assert peer.subscription is not None
        await peer.subscription.drain()
        peer.beat(in_flight=5)
        await trio.sleep(0.05)
        began_at = trio.current_time()
        for _ in range(signals):
            rig.stop()
        await rig.finished.wait()
        assert trio.current_time() - began_at < 2 + SETTLE_S
        await trio.sleep(1)
        assert caller.codes("a") == ["ok" if signals == 1 else "WORKER_DRAINING"]
        assert caller.codes("b") == ["WORKER_DRAINING"]
        numbers = [int(each.headers["Sequence"]) for each in caller.answers["b"]]
        assert numbers == list(range(len(numbers)))
        assert rig.snapshot().fleet.returned == 1


async def test_without_anybody_else_a_drain_answers(autojump_clock: MockClock) -> None:
    async with running_worker(*ONE_SLOT) as rig:
        caller = Caller(rig)
        await caller.send("a", max_tokens=100)
        await caller.send("b")
        rig.stop()
        await rig.finished.wait()
        assert caller.codes("b") == ["WORKER_DRAINING"]
