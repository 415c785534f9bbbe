"""Gateways before several workers, of which some go: every request comes to a true end."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from support.gateway_rig import COMPLETIONS, Gateway, events, open_gateway, say, text_of
from support.http_calls import Heard
from support.worker_rig import Rig, running_worker
from trio.testing import MockClock

from trio_worker.gateway.forward import SILENT_S
from trio_worker.ports import Message
from trio_worker.protocol.turn import FinishReason, RequestId
from trio_worker.simulated.broker import MemoryServer
from trio_worker.wire import native, subjects

CALLS = 64
TOKENS = 120
DEADLINE_S = 90


@dataclass(frozen=True, slots=True)
class Fleet:
    server: MemoryServer
    workers: list[Rig]
    gateways: list[Gateway]

    def interest(self) -> Counter[str]:
        """How much each connection listens to."""
        return Counter(each.broker._name for each in self.server._subscriptions)

    def assert_nothing_is_left(self) -> None:
        for gateway in self.gateways:
            assert not gateway.api.forward._inboxes._open
            assert gateway.api.counts.running == 0
        for worker in self.workers:
            assert worker.finished.is_set() or not worker.engine.residents
            assert worker.snapshot().requests.in_flight == 0


@asynccontextmanager
async def running_fleet(*, workers: int, gateways: int) -> AsyncIterator[Fleet]:
    server = MemoryServer(random=random.Random(0))
    async with AsyncExitStack() as stack:
        rigs = [
            await stack.enter_async_context(
                running_worker(
                    "worker.drain_timeout_ms=1000", server=server, worker_id=f"w{number}"
                )
            )
            for number in range(workers)
        ]
        doors = [
            await stack.enter_async_context(open_gateway(server, name=f"gateway-{number}"))
            for number in range(gateways)
        ]
        yield Fleet(server, rigs, doors)


def question(number: int, **fields: Any) -> dict[str, Any]:
    return say(f"question {number}", max_tokens=TOKENS, timeout_ms=1000 * DEADLINE_S, **fields)


def ending_of(heard: Heard, expected: str, *, stream: bool) -> str:
    """How a request has ended; what it was told of its answer has to be true."""
    if heard.status != 200:
        return str(json.loads(heard.body)["error"]["code"])
    if not stream:
        (choice,) = json.loads(heard.body)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "length")
        return "whole"
    said = events(heard.body)
    if said[-1] == "[DONE]":
        assert text_of(said) == expected
        assert said[-2]["choices"][0]["finish_reason"] == "length"
        return "whole"
    error = said.pop()["error"]
    assert expected.startswith(text_of(said))
    assert all(each["choices"][0]["finish_reason"] is None for each in said)
    return str(error["code"])


async def test_of_three_workers_one_is_killed_and_one_drains_under_two_gateways(
    autojump_clock: MockClock,
) -> None:
    endings: Counter[tuple[str, str]] = Counter()
    longest_s = 0.0
    async with running_fleet(workers=3, gateways=2) as fleet:
        killed, draining, staying = fleet.workers
        texts = [(await staying.ask(**question(number))).text for number in range(CALLS)]
        interest = fleet.interest()

        async def call(number: int) -> None:
            nonlocal longest_s
            began_at = trio.current_time()
            stream = number % 2 == 0
            gateway = fleet.gateways[number // 2 % 2]
            heard = await gateway.ask(question(number, stream=stream))
            kind = "stream" if stream else "whole"
            endings[kind, ending_of(heard, texts[number], stream=stream)] += 1
            longest_s = max(longest_s, trio.current_time() - began_at)

        async with trio.open_nursery() as nursery:
            for number in range(CALLS):
                nursery.start_soon(call, number)
            await trio.sleep(0.5)
            assert all(worker.engine.residents for worker in fleet.workers)
            killed.kill()
            await trio.sleep(0.5)
            draining.stop()
        assert fleet.interest() == {
            name: count
            for name, count in interest.items()
            if name not in (f"worker-{killed.worker_id}", f"worker-{draining.worker_id}")
        }
        fleet.assert_nothing_is_left()
    assert longest_s < DEADLINE_S
    assert longest_s > SILENT_S, "what the killed worker had, others were asked for after a while"
    # What nobody had seen any of was asked of another worker.
    assert endings["whole", "whole"] == CALLS / 2
    assert endings["stream", "internal"] > 0
    assert endings["stream", "worker_draining"] > 0
    assert endings["stream", "whole"] > CALLS / 8
    assert sum(endings.values()) == CALLS


# --- workers that lose a word, or come back ---------------------------------------------------


class Scripted:
    """A worker that says what the test tells it to; each request is a new `Attempt`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.attempts: list[Attempt] = []
        self.cancelled: list[str] = []
        self.asked = trio.Event()

    async def listen(self) -> None:
        broker = self._gateway.broker
        await broker.subscribe("inference", self._take, group=subjects.GROUP)
        await broker.subscribe(
            subjects.control("s", "*"), lambda message: self.cancelled.append(message.subject)
        )

    def _take(self, message: Message) -> None:
        self.attempts.append(Attempt(self._gateway, message))
        self.asked.set()
        self.asked = trio.Event()


class Attempt:
    def __init__(self, gateway: Gateway, message: Message) -> None:
        self.fields = json.loads(message.body)
        request_id = RequestId(self.fields["request_id"])
        self.control = subjects.control("s", request_id)
        assert message.reply is not None
        self._outlet = gateway.broker.open_outlet(
            message.reply,
            reply=self.control,
            headers=native.common_headers(request_id=request_id, worker_id="s"),
        )
        self._writer = native.AnswerWriter(
            request_id=request_id, model="m", created=1, chat="messages" in self.fields
        )
        self._sequence = 0

    def lose_a_message(self) -> None:
        self._sequence += 1

    def open(self) -> None:
        self._say(self._writer.opening())

    def say(self, text: str) -> None:
        self._say(self._writer.chunk(text))

    def end(self) -> None:
        usage = native.Usage.of(prompt=1, completion=1, cached=0)
        note = native.WorkerNote(
            id="s",
            request_id="r",
            seed=7,
            queue_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
            priority="medium",
            resumed=0,
            degraded=(),
        )
        self._say(self._writer.closing(FinishReason.STOP, usage, note), terminal=True)

    def _say(self, body: bytes, *, terminal: bool = False) -> None:
        self._outlet.publish(body, native.headers(sequence=self._sequence, terminal=terminal))
        self._sequence += 1


@asynccontextmanager
async def scripted_worker(**config: Any) -> AsyncIterator[tuple[Gateway, Scripted]]:
    async with open_gateway(MemoryServer(random=random.Random(0)), **config) as gateway:
        worker = Scripted(gateway)
        await worker.listen()
        yield gateway, worker
        assert not gateway.api.forward._inboxes._open


def text_said(heard: Heard) -> str:
    (choice,) = json.loads(heard.body)["choices"]
    return str(choice["message"]["content"])


async def test_a_whole_answer_with_a_gap_is_asked_for_again(autojump_clock: MockClock) -> None:
    async with scripted_worker() as (gateway, worker), trio.open_nursery() as nursery:

        async def ask() -> None:
            heard = await gateway.ask(say("hi"))
            assert (heard.status, text_said(heard)) == (200, "new")

        nursery.start_soon(ask)
        await worker.asked.wait()
        old = worker.attempts[0]
        assert old.fields["stream"], "silence tells that a worker is gone"
        old.open()
        old.lose_a_message()
        old.say("old")
        await worker.asked.wait()
        assert worker.cancelled == [old.control]
        new = worker.attempts[1]
        new.open()
        new.say("new")
        new.end()
    assert len(worker.attempts) == 2


async def test_a_whole_answer_with_two_gaps_has_failed(autojump_clock: MockClock) -> None:
    async with scripted_worker() as (gateway, worker), trio.open_nursery() as nursery:

        async def ask() -> None:
            heard = await gateway.ask(say("hi"))
            assert heard.status == 500
            assert "was lost" in json.loads(heard.body)["error"]["message"]

        nursery.start_soon(ask)
        for _ in range(2):
            await worker.asked.wait()
            worker.attempts[-1].lose_a_message()
            worker.attempts[-1].open()
    assert len(worker.attempts) == 2
    assert len(worker.cancelled) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_worker_that_comes_back_is_not_taken_for_its_successor(
    autojump_clock: MockClock, *, stream: bool
) -> None:
    """Its numbers go on where the other one's are by then, and it would end the answer."""
    async with scripted_worker() as (gateway, worker), trio.open_nursery() as nursery:

        async def ask() -> None:
            heard = await gateway.ask(say("hi", stream=stream))
            said = text_of(events(heard.body)) if stream else text_said(heard)
            assert (heard.status, said) == (200, "new answer")

        nursery.start_soon(ask)
        await worker.asked.wait()
        old = worker.attempts[0]
        old.open()
        await worker.asked.wait()
        new = worker.attempts[1]
        new.open()
        old.say("old")
        await trio.sleep(1)
        new.say("new")
        await trio.sleep(1)
        old.end()
        await trio.sleep(1)
        new.say(" answer")
        new.end()


async def test_a_whole_answer_may_be_larger_than_a_message(autojump_clock: MockClock) -> None:
    async with (
        running_worker(max_payload=3000) as rig,
        open_gateway(rig) as gateway,
    ):
        heard = await gateway.ask({"prompt": "hi", "max_tokens": 900, "logprobs": 2}, COMPLETIONS)
        assert heard.status == 200
        (choice,) = json.loads(heard.body)["choices"]
        assert len(heard.body) > 3000
        assert len(choice["logprobs"]["tokens"]) == 900
        assert choice["logprobs"]["text_offset"][-1] < len(choice["text"])


async def test_what_there_was_of_a_whole_answer_at_its_deadline_is_told(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        heard = await gateway.ask(say("hi", max_tokens=2000, timeout_ms=2000))
        told = await rig.ask(**say("hi", max_tokens=2000, timeout_ms=3000, stream=True))
        error = json.loads(heard.body)["error"]
        assert (heard.status, error["stage"]) == (504, "decode")
        assert error["text"]
        assert told.text.startswith(error["text"])
