"""Both clients: what a call decides, then each flavour against a worker that acts as scripted."""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import running_command
from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from support.peers import Reply, in_asyncio, scripted_peer
from support.worker_rig import WORKER_ID, running_worker
from trio.testing import MockClock

from trio_worker import client_asyncio
from trio_worker.calling.attempts import AnswerOf, Call, Chunk, join
from trio_worker.client import Client, open_client
from trio_worker.errors import (
    BY_CODE,
    ErrorCode,
    InternalError,
    MessageLost,
    NoWorker,
    PayloadTooLarge,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    WorkerDraining,
    WorkerError,
)
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker, MemoryServer, open_memory_broker

CONTROL = "inference.w1.ctl.r"


def chunk(sequence: int, text: str = "", *, terminal: bool = False) -> Reply:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    headers = {"Sequence": str(sequence), "Worker-Id": "w1"}
    if terminal:
        headers["Terminal"] = "done"
    return json.dumps({"choices": [choice]}).encode(), headers


def refusal(code: str, *, retry_after_ms: int | None = 1000, sequence: int = 0) -> Reply:
    error = {
        "code": code,
        "message": "no",
        "retryable": BY_CODE[code].retryable,
        "retry_after_ms": retry_after_ms,
        "details": {"depth": 3},
    }
    return (
        json.dumps({"error": error}).encode(),
        {"Sequence": str(sequence), "Terminal": "error"},
    )


# --- what a call decides ------------------------------------------------------------------


class Lowest(random.Random):
    """Draws the lower bound."""

    def uniform(self, a: float, b: float) -> float:
        return min(a, b)


def make_call(
    *,
    rng: random.Random | None = None,
    timeout_ms: int | None = 10_000,
    attempts: int = 3,
    grace_s: float = math.inf,
    worker_id: str | None = "w1",
    **fields: Any,
) -> Call:
    return Call(
        {"prompt": "x", **fields},
        request_id="r",
        worker_id=worker_id,
        timeout_ms=timeout_ms,
        attempts=attempts,
        nobody_listens_grace_s=grace_s,
        rng=rng or random.Random(0),
        now=100.0,
    )


def take(call: Call, reply: Reply, now: float = 100.0) -> Chunk | None:
    return call.take(*reply, CONTROL, now)


def nobody(call: Call, now: float) -> Chunk | None:
    return call.take(b"", {"Status": "503"}, None, now)


def sent(call: Call, now: float = 100.0) -> Any:
    return json.loads(call.body(now))


def test_each_attempt_says_what_is_left_of_the_deadline_and_keeps_the_id() -> None:
    call = make_call()
    assert sent(call, 100.5) == {"prompt": "x", "request_id": "r", "timeout_ms": 9500}
    assert take(call, refusal("QUEUE_FULL"), 102.0) is None
    assert call.resend_at is not None
    assert 103.0 <= call.resend_at <= 103.5
    again = sent(call, 103.2)
    assert again == {"prompt": "x", "request_id": "r", "timeout_ms": 6800}
    assert call.resend_at is None


def test_what_the_caller_says_goes_before_what_the_client_assumes() -> None:
    call = make_call(timeout_ms=10_000, requestId="mine")
    assert call.request_id == "mine"
    assert "request_id" not in sent(call)
    given = Call(
        {"prompt": "x", "timeout_ms": 50, "request_id": None},
        request_id="r",
        worker_id=None,
        timeout_ms=10_000,
        attempts=1,
        nobody_listens_grace_s=5.0,
        rng=random.Random(0),
        now=0.0,
    )
    assert sent(given, 0.0) == {"prompt": "x", "timeout_ms": 50, "request_id": "r"}
    assert given.gives_up_at == pytest.approx(1.05)


@pytest.mark.parametrize("wrong", [True, "soon", 0, -1, 1.5])
def test_a_timeout_that_is_none_is_left_to_the_worker_to_refuse(wrong: object) -> None:
    call = Call(
        {"prompt": "x", "timeout_ms": wrong},
        request_id="r",
        worker_id=None,
        timeout_ms=10_000,
        attempts=1,
        nobody_listens_grace_s=5.0,
        rng=random.Random(0),
        now=0.0,
    )
    assert sent(call, 0.0)["timeout_ms"] == wrong
    assert call.gives_up_at == math.inf


def test_a_request_goes_to_the_worker_the_model_or_anybody() -> None:
    assert make_call(worker_id="w1", model="m").subject == "inference.w1"
    assert make_call(worker_id=None, model="m-1.2").subject == "inference.model.m-1.2"
    assert make_call(worker_id=None).subject == "inference"
    assert make_call(worker_id=None, model="two words").subject == "inference"
    assert make_call(worker_id=None, model=["no", "name"]).subject == "inference"


@pytest.mark.parametrize("code", list(ErrorCode))
def test_an_error_is_retried_if_it_says_so_and_raised_as_its_class_otherwise(code: str) -> None:
    call = make_call(timeout_ms=None)
    sent(call)
    if BY_CODE[code].retryable:
        assert take(call, refusal(code)) is None
        assert call.resend_at is not None
        assert not call.ended
    else:
        with pytest.raises(BY_CODE[code]) as caught:
            take(call, refusal(code, retry_after_ms=None))
        assert caught.value.details == {"depth": 3}
        assert call.ended
    assert call.cancel_message() is None


def test_retrying_ends_with_the_attempts() -> None:
    call = make_call(timeout_ms=None, attempts=2)
    sent(call)
    take(call, refusal("QUEUE_FULL"))
    sent(call)
    with pytest.raises(QueueFull) as caught:
        take(call, refusal("QUEUE_FULL", retry_after_ms=777))
    assert caught.value.retry_after_ms == 777


def test_retrying_ends_where_the_wait_would_pass_the_deadline() -> None:
    call = make_call(timeout_ms=5000)
    sent(call)
    with pytest.raises(WorkerDraining):
        take(call, refusal("WORKER_DRAINING", retry_after_ms=5000))


def test_nothing_is_sent_again_once_text_was_handed_out() -> None:
    call = make_call()
    sent(call)
    assert take(call, chunk(0)) is not None
    assert take(call, chunk(1, "so far")) is not None
    with pytest.raises(WorkerDraining):
        take(call, refusal("WORKER_DRAINING", sequence=2))


def test_an_opening_without_text_stands_in_no_retrys_way_and_numbering_begins_anew() -> None:
    call = make_call()
    sent(call)
    assert take(call, chunk(0)) is not None
    assert take(call, refusal("WORKER_DRAINING", sequence=1)) is None
    sent(call, 102.0)
    assert take(call, chunk(0), 102.0) is not None
    assert take(call, chunk(1, "all", terminal=True), 102.0) is not None
    assert call.ended


def ask_until_nobody_is_there(call: Call, now: float) -> tuple[float, int]:
    """When the call gave up, and how often it had been sent; nobody listens."""
    asked = 0
    while True:
        sent(call, now)
        asked += 1
        try:
            assert nobody(call, now) is None
        except NoWorker:
            return now, asked
        assert call.resend_at is not None
        assert 0.125 <= call.resend_at - now <= 0.375
        now = call.resend_at


@pytest.mark.parametrize(
    ("grace_s", "timeout_ms", "ends_at"),
    [(5.0, 30_000, 105.0), (5.0, None, 105.0), (5.0, 2000, 102.0), (math.inf, 10_000, 110.0)],
)
def test_where_nobody_listens_it_is_asked_for_the_grace_and_no_attempt_is_spent(
    grace_s: float, timeout_ms: int | None, ends_at: float
) -> None:
    call = make_call(attempts=1, grace_s=grace_s, timeout_ms=timeout_ms)
    gave_up_at, asked = ask_until_nobody_is_there(call, 100.0)
    assert ends_at - 0.375 <= gave_up_at < ends_at
    assert 3 * (ends_at - 100) <= asked <= 6 * (ends_at - 100)
    assert call.ended
    assert call.cancel_message() is None


def test_the_grace_and_the_deadline_are_over_when_they_are_reached() -> None:
    for grace_s, timeout_ms in ((0.125, 9000), (9.0, 125)):
        call = make_call(grace_s=grace_s, timeout_ms=timeout_ms, rng=Lowest())
        sent(call)
        with pytest.raises(NoWorker):
            nobody(call, 100.0)
        call = make_call(grace_s=grace_s + 0.01, timeout_ms=timeout_ms + 10, rng=Lowest())
        sent(call)
        assert nobody(call, 100.0) is None
        assert call.resend_at == 100.125


def test_without_a_grace_nobody_is_nobody_at_once() -> None:
    call = make_call(grace_s=0.0)
    sent(call)
    with pytest.raises(NoWorker, match=r"nobody listens on inference.w1 \(asked for 0.0 s\)"):
        nobody(call, 100.0)


def test_the_grace_begins_anew_once_a_worker_has_spoken() -> None:
    call = make_call(grace_s=5.0, timeout_ms=60_000)
    sent(call)
    nobody(call, 100.0)
    sent(call, 104.0)
    assert take(call, chunk(0), 104.0) is not None
    assert take(call, refusal("WORKER_DRAINING", sequence=1), 104.0) is None
    sent(call, 106.0)
    assert 110.6 <= ask_until_nobody_is_there(call, 106.0)[0] < 111.0


@pytest.mark.parametrize("code", ["QUEUE_FULL", "WORKER_DRAINING", "RESOURCE_LIMIT_EXCEEDED"])
def test_where_one_of_a_group_has_no_room_another_is_asked_at_once_and_later_ones_not(
    code: str,
) -> None:
    call = make_call(worker_id=None, attempts=4)
    sent(call)
    assert take(call, refusal(code)) is None
    assert call.resend_at == 100.0
    assert call.control_subject is None
    sent(call)
    assert take(call, refusal(code)) is None
    assert call.resend_at is not None
    assert 101.0 <= call.resend_at <= 101.5


def test_the_try_elsewhere_is_one_of_the_attempts() -> None:
    call = make_call(worker_id=None, attempts=2)
    sent(call)
    take(call, refusal("QUEUE_FULL"))
    sent(call)
    with pytest.raises(QueueFull):
        take(call, refusal("QUEUE_FULL"))


def test_a_retry_elsewhere_is_for_those_without_room_only() -> None:
    for code in ("INTERNAL", "REQUEST_TIMEOUT"):
        call = make_call(worker_id=None)
        sent(call)
        assert take(call, refusal(code)) is None
        assert call.resend_at is not None
        assert call.resend_at >= 101.0
        sent(call, 102.0)
        take(call, refusal("QUEUE_FULL"), 102.0)
        assert call.resend_at == 102.0, "it has not been tried yet"


def test_what_no_worker_can_hold_is_not_tried_elsewhere() -> None:
    call = make_call(worker_id=None)
    sent(call)
    body, headers = refusal("RESOURCE_LIMIT_EXCEEDED", retry_after_ms=None)
    with pytest.raises(BY_CODE["RESOURCE_LIMIT_EXCEEDED"]):
        take(call, (body.replace(b'"retryable": true', b'"retryable": false'), headers))


def test_a_retry_begins_anew_with_all_that_belongs_to_an_attempt() -> None:
    """The numbering, the control subject, and whether a worker has the request."""
    call = make_call(worker_id=None)
    sent(call)
    take(call, chunk(0))
    assert call.cancel_message() == (CONTROL, b"cancel")
    take(call, refusal("WORKER_DRAINING", sequence=1))
    assert call.cancel_message() is None, "between two attempts there is nobody to tell"
    assert not call.ended
    sent(call)
    assert call.cancel_message() == ("inference.cancel", b'{"request_id":"r"}')
    with pytest.raises(MessageLost, match=r"message 0 .* 1 came"):
        take(call, chunk(1))


def test_a_retry_may_be_due_until_the_deadline_and_no_later() -> None:
    for retry_after_ms, wait_ms in ((2000, 2000), (None, 1000)):
        error = refusal("INTERNAL", retry_after_ms=retry_after_ms)
        call = make_call(timeout_ms=wait_ms + 1, rng=Lowest())
        sent(call)
        assert take(call, error) is None
        assert call.resend_at == 100 + wait_ms / 1000
        call = make_call(timeout_ms=wait_ms, rng=Lowest())
        sent(call)
        with pytest.raises(InternalError):
            take(call, error)
    late = make_call(worker_id=None, timeout_ms=1000)
    sent(late)
    with pytest.raises(QueueFull):
        take(late, refusal("QUEUE_FULL"), 101.0)
    assert late.ended


def test_what_is_left_of_a_deadline_is_a_whole_millisecond_at_least() -> None:
    call = make_call(timeout_ms=1000)
    assert [sent(call, now)["timeout_ms"] for now in (100.0, 100.9991, 101.0, 200.0)] == [
        1000,
        1,
        1,
        1,
    ]
    assert call.gives_up_at == 102.0
    assert make_call(timeout_ms=1).gives_up_at == pytest.approx(101.001)
    assert "timeout_ms" not in sent(make_call(timeout_ms=None))


def test_giving_up_says_where_and_after_how_long() -> None:
    call = make_call(timeout_ms=1500)
    sent(call)
    error = call.give_up()
    assert isinstance(error, RequestTimeout)
    assert error.message.startswith("no answer on inference.w1 within 1.5 s, nor a worker's word")
    assert error.details == {"stage": "client"}
    assert call.ended
    assert call.cancel_message() is not None, "it may be at work all the same"


def test_log_probabilities_without_text_are_content_too() -> None:
    call = make_call()
    sent(call)
    choice: dict[str, Any] = {"text": "", "logprobs": {"content": []}, "finish_reason": None}
    take(call, (json.dumps({"choices": [choice]}).encode(), {"Sequence": "0"}))
    with pytest.raises(WorkerDraining):
        take(call, refusal("WORKER_DRAINING", sequence=1))


@pytest.mark.parametrize("sequence", [None, "-1", "1"])
def test_an_answer_begins_with_0(sequence: str | None) -> None:
    call = make_call()
    sent(call)
    body, headers = chunk(0)
    del headers["Sequence"]
    if sequence is not None:
        headers["Sequence"] = sequence
    with pytest.raises(MessageLost, match=rf"message 0 of .* lost; {sequence or -1} came instead"):
        take(call, (body, headers))


def test_a_control_subject_is_kept_where_a_later_message_names_none() -> None:
    call = make_call()
    sent(call)
    take(call, chunk(0))
    call.take(*chunk(1), None, 100.0)
    assert call.control_subject == CONTROL


def test_a_message_has_its_text_wherever_it_is_and_all_that_came_with_it() -> None:
    usage, worker = {"total_tokens": 3}, {"id": "w1"}
    parts: list[dict[str, Any]] = [
        {"delta": {"role": "assistant"}, "finish_reason": None},
        {"delta": {"content": "a"}},
        {"message": {"role": "assistant", "content": "b"}},
        {"text": "c", "finish_reason": "stop"},
    ]
    call, chunks = make_call(), []
    sent(call)
    for index, part in enumerate(parts):
        body = {"choices": [part], **({"usage": usage, "worker": worker} if index == 3 else {})}
        headers = {"Sequence": str(index)}
        came = take(call, (json.dumps(body).encode(), headers))
        assert came is not None
        assert (came.body, came.headers) == (body, headers)
        chunks.append(came)
    assert [each.text for each in chunks] == ["", "a", "b", "c"]
    assert [each.finish_reason for each in chunks] == [None, None, None, "stop"]
    assert [each.usage for each in chunks] == [None, None, None, usage]
    whole = join(chunks)
    assert (whole.text, whole.finish_reason, whole.worker) == ("abc", "stop", worker)


def test_an_error_of_a_code_that_is_not_known_yet_is_an_error_all_the_same() -> None:
    for retryable in (False, True):
        error = {"code": "NEW", "retryable": retryable, "details": None}
        call = make_call(attempts=1)
        sent(call)
        with pytest.raises(InternalError, match="an error without a message") as caught:
            take(call, (json.dumps({"error": error}).encode(), {"Terminal": "error"}))
        assert caught.value.retryable is retryable
        assert caught.value.details == {}
        assert caught.value.retry_after_ms is None


def test_an_answer_tells_of_its_call() -> None:
    call = make_call()
    answer = AnswerOf(call)
    sent(call)
    assert (answer.request_id, answer.control_subject, answer.ended) == ("r", None, False)
    take(call, chunk(0, terminal=True))
    assert (answer.control_subject, answer.ended) == (CONTROL, True)


def test_the_callers_request_is_not_written_to() -> None:
    request: dict[str, Any] = {"prompt": "x", "requestId": None}
    call = make_call(**request)
    assert "requestId" not in sent(call)
    mine = {"prompt": "x"}
    Call(
        mine,
        request_id="r",
        worker_id=None,
        timeout_ms=1000,
        attempts=1,
        nobody_listens_grace_s=5.0,
        rng=random.Random(0),
        now=0.0,
    ).body(0.0)
    assert mine == {"prompt": "x"}


def test_a_gap_is_an_error_and_the_worker_is_still_at_work() -> None:
    call = make_call()
    sent(call)
    take(call, chunk(0, "a"))
    with pytest.raises(MessageLost, match=r"message 1 .* 2 came"):
        take(call, chunk(2, "c"))
    assert call.ended
    assert call.cancel_message() == (CONTROL, b"cancel")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b'{"choices": []}', b'{"choices": 1}', b'{"choices": [3]}']
)
@pytest.mark.parametrize("terminal", ["done", "error"])
def test_what_is_no_answer_is_an_error(body: bytes, terminal: str) -> None:
    call = make_call()
    sent(call)
    with pytest.raises(InternalError, match="no answer"):
        call.take(body, {"Sequence": "0", "Terminal": terminal}, None, 100.0)
    assert call.ended


def test_a_cancel_goes_by_the_id_until_the_control_subject_is_known() -> None:
    call = make_call()
    assert call.cancel_message() is None
    sent(call)
    assert call.cancel_message() == ("inference.cancel", b'{"request_id":"r"}')
    take(call, chunk(0))
    assert call.cancel_message() == (CONTROL, b"cancel")
    take(call, chunk(1, terminal=True))
    assert call.cancel_message() is None


# --- Trio ---------------------------------------------------------------------------------


class ScriptedWorker:
    """Answers the first request with the first script, and so on; silent after the last."""

    def __init__(self, broker: MemoryBroker, scripts: list[list[Reply]]) -> None:
        self._broker = broker
        self._scripts = iter(scripts)
        self.requests: list[tuple[float, Any]] = []
        self.cancels: list[Message] = []

    def take(self, message: Message) -> None:
        self.requests.append((trio.current_time(), json.loads(message.body)))
        for body, headers in next(self._scripts, []):
            assert message.reply is not None
            self._broker.publish(
                Message(subject=message.reply, body=body, headers=headers, reply=CONTROL)
            )

    async def listen(self) -> None:
        await self._broker.subscribe("inference", self.take)
        await self._broker.subscribe(CONTROL, self.cancels.append)
        await self._broker.subscribe("inference.cancel", self.cancels.append)


@asynccontextmanager
async def scripted(
    *scripts: list[Reply], listening: bool = True
) -> AsyncIterator[tuple[ScriptedWorker, Client]]:
    server = MemoryServer(random=random.Random(0))
    async with open_memory_broker(server, name="worker") as far:
        worker = ScriptedWorker(far, list(scripts))
        if listening:
            await worker.listen()
        async with open_memory_broker(server, name="caller") as near:
            yield worker, Client(near, timeout_ms=10_000, attempts=3)


async def test_trio_retries_after_the_time_the_error_names(autojump_clock: MockClock) -> None:
    busy = refusal("INTERNAL", retry_after_ms=2000)
    async with scripted([busy], [busy], [chunk(0, "yes", terminal=True)]) as (worker, client):
        began_at = trio.current_time()
        whole = await client.complete({"prompt": "x"})
    assert whole.text == "yes"
    times = [at - began_at for at, _ in worker.requests]
    assert times[0] == 0
    assert 2 <= times[1] <= 3
    assert 4 <= times[2] <= 6
    assert [request["timeout_ms"] for _, request in worker.requests] == [
        math.ceil(10_000 - 1000 * at) for at in times
    ]
    assert len({request["request_id"] for _, request in worker.requests}) == 1


async def test_trio_gives_up_a_second_after_the_deadline_and_cancels(
    autojump_clock: MockClock,
) -> None:
    async with scripted([chunk(0)]) as (worker, client):
        began_at = trio.current_time()
        with pytest.raises(RequestTimeout) as caught:
            await client.complete({"prompt": "x", "timeout_ms": 3000})
        assert trio.current_time() - began_at == pytest.approx(4)
        await trio.sleep(1)
    assert caught.value.details == {"stage": "client"}
    assert [cancel.body for cancel in worker.cancels] == [b"cancel"]


async def test_trio_asks_another_of_the_group_at_once_when_one_is_full(
    autojump_clock: MockClock,
) -> None:
    """Who takes the second message stands for another member of the group."""
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="workers") as far,
        open_memory_broker(server, name="caller") as near,
    ):
        full = [refusal("QUEUE_FULL", retry_after_ms=60_000)]
        worker = ScriptedWorker(far, [full, [chunk(0, "yes", terminal=True)]])
        await worker.listen()
        began_at = trio.current_time()
        whole = await Client(near).complete({"prompt": "x"})
        assert trio.current_time() == began_at
    assert whole.text == "yes"


async def test_trio_waits_for_a_worker_for_the_grace_or_until_the_deadline(
    autojump_clock: MockClock,
) -> None:
    done = [chunk(0, "late", terminal=True)]
    async with scripted(done, listening=False) as (worker, client):
        began_at = trio.current_time()
        with pytest.raises(NoWorker, match="inference"):
            await client.complete({"prompt": "x", "timeout_ms": 2000})
        assert 1.5 < trio.current_time() - began_at <= 2
        began_at = trio.current_time()
        with pytest.raises(NoWorker, match="inference"):
            await client.complete({"prompt": "x", "timeout_ms": 60_000})
        assert 4.5 < trio.current_time() - began_at <= 5
        impatient = Client(client._broker, timeout_ms=None, nobody_listens_grace_s=0)
        with pytest.raises(NoWorker, match=r"asked for 0\.0 s"):
            await impatient.complete({"prompt": "x"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen_later, worker)
            assert (await client.complete({"prompt": "x"})).text == "late"
    assert not worker.cancels


async def _listen_later(worker: ScriptedWorker) -> None:
    await trio.sleep(3)
    await worker.listen()


async def test_trio_loses_nothing_by_a_cancelled_wait_not_even_a_retry(
    autojump_clock: MockClock,
) -> None:
    async with scripted(
        [refusal("INTERNAL", retry_after_ms=4000)], [chunk(0, "yes", terminal=True)]
    ) as (worker, client):
        async with client.ask({"prompt": "x"}) as answer:
            for _attempt in range(3):
                with trio.move_on_after(1) as scope:
                    await anext(answer)
                assert scope.cancelled_caught
            assert await answer.text() == "yes"
    assert len(worker.requests) == 2


async def test_trio_says_when_the_server_would_not_take_the_request(
    autojump_clock: MockClock,
) -> None:
    async with scripted() as (worker, client):
        with pytest.raises(PayloadTooLarge, match=r"the NATS server takes 1048576$") as caught:
            await client.complete({"prompt": "x" * 2**20})
    assert caught.value.details["limit"] == 2**20
    assert isinstance(caught.value.details["bytes"], int)
    assert caught.value.details["bytes"] > 2**20
    assert not worker.requests


async def test_trio_leaves_nothing_behind_however_an_answer_is_left(
    autojump_clock: MockClock,
) -> None:
    """The end of the answer, an error, and a cancellation, under which leaving still waits."""
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="worker") as far,
        open_memory_broker(server, name="caller") as near,
    ):
        worker = ScriptedWorker(
            far, [[chunk(0, "yes", terminal=True)], [refusal("CANCELLED")], [chunk(0)]]
        )
        await worker.listen()
        client = Client(near)
        await client.complete({"prompt": "x"})
        with pytest.raises(RequestCancelled):
            await client.complete({"prompt": "x"})
        with trio.move_on_after(1) as scope:
            await client.complete({"prompt": "x"})
        assert scope.cancelled_caught
        assert not [each for each in server._subscriptions if each.broker is near]
        assert not near.statistics().unpublished_bytes, "the cancel has been taken"
        await trio.testing.wait_all_tasks_blocked()
        assert [cancel.body for cancel in worker.cancels] == [b"cancel"]


async def test_trio_assumes_half_a_minute_three_attempts_and_any_worker(
    autojump_clock: MockClock,
) -> None:
    busy = [refusal("INTERNAL", retry_after_ms=50)]
    server = MemoryServer(random=random.Random(0))
    async with (
        open_memory_broker(server, name="worker") as far,
        open_memory_broker(server, name="caller") as near,
    ):
        worker = ScriptedWorker(far, [busy] * 9)
        await worker.listen()
        with pytest.raises(InternalError):
            await Client(near).complete({"prompt": "x"})
        with pytest.raises(NoWorker, match=r"inference\.w9"):
            await Client(near).complete({"prompt": "x"}, worker_id="w9")
    assert worker.requests[0][1]["timeout_ms"] == 30_000
    assert len(worker.requests) == 3


async def test_trio_bounds_the_wait_for_a_connection(autojump_clock: MockClock) -> None:
    server = MemoryServer(random=random.Random(0))
    async with open_memory_broker(server, name="caller") as broker:
        broker.disconnect()
        with pytest.raises(RequestTimeout):
            await Client(broker, timeout_ms=2000).complete({"prompt": "x"})
        assert trio.current_time() < 5


async def test_trio_streams_and_completes_and_cancels_at_a_worker(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        request = {"prompt": "a b", "max_tokens": 5, "seed": 3}
        whole = await rig.client.complete(request)
        joined = await rig.client.complete({**request, "stream": True})
        assert joined.text == whole.text
        assert joined.usage == whole.usage
        async with rig.client.ask({**request, "stream": True}) as answer:
            assert (await anext(answer)).text == ""
            assert answer.control_subject == f"inference.{WORKER_ID}.ctl.{answer.request_id}"
            answer.cancel()
            with pytest.raises(RequestCancelled):
                await answer.text()
            assert answer.ended


@pytest.mark.parametrize("stream", [True, False])
async def test_trio_leaving_early_cancels_at_the_worker(
    autojump_clock: MockClock, *, stream: bool
) -> None:
    async with running_worker() as rig:
        with trio.move_on_after(1):
            await rig.client.complete({"prompt": "x", "max_tokens": 500, "stream": stream})
        await trio.sleep(0.2)
        snapshot = rig.snapshot()
        assert snapshot.requests.in_flight == 0
        assert snapshot.requests.by_outcome == {"CANCELLED": 1}


async def test_trio_asks_another_worker_when_one_drains(autojump_clock: MockClock) -> None:
    """The second attempt meets nobody, and the fleet's next worker later."""
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.simulated.turn_ms=100"
    ) as rig:
        client = Client(rig.caller, timeout_ms=60_000)
        answers: list[str] = []

        async def ask() -> None:
            answers.append((await client.complete({"prompt": "x", "max_tokens": 30})).text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            rig.stop()
            await rig.finished.wait()
            assert len(answers) == 1
            successor = ScriptedWorker(rig.caller, [[chunk(0, "from another", terminal=True)]])
            await successor.listen()
    assert answers[1] == "from another"


# --- asyncio ------------------------------------------------------------------------------


@pytest.mark.nats
async def test_asyncio_retries_and_completes(nats_url: str) -> None:
    async def work() -> None:
        busy = refusal("QUEUE_FULL", retry_after_ms=50)
        async with scripted_peer(
            nats_url,
            "retry",
            [busy],
            [busy],
            [chunk(0), chunk(1, "y"), chunk(2, "es", terminal=True)],
        ) as (peer, client):
            whole = await client.complete({"prompt": "x"}, worker_id="retry")
            assert whole.text == "yes"
            assert len(peer.requests) == 3
            assert len({each["request_id"] for each in peer.requests}) == 1
            assert 0 < peer.requests[2]["timeout_ms"] <= 4900

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_raises_what_may_not_be_retried(nats_url: str) -> None:
    async def work() -> None:
        final = refusal("CONTEXT_LENGTH_EXCEEDED", retry_after_ms=None)
        gap = [chunk(0), chunk(2, "c")]
        async with scripted_peer(nats_url, "raise", [final], gap) as (peer, client):
            with pytest.raises(BY_CODE["CONTEXT_LENGTH_EXCEEDED"]):
                await client.complete({"prompt": "x"}, worker_id="raise")
            with pytest.raises(MessageLost):
                await client.complete({"prompt": "x"}, worker_id="raise")
            assert (await peer.cancels.get()).data == b"cancel"
            with pytest.raises(PayloadTooLarge):
                await client.complete({"prompt": "x" * 2**20}, worker_id="raise")
            assert len(peer.requests) == 2

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_is_bounded_by_the_deadline(nats_url: str) -> None:
    async def work() -> None:
        async with scripted_peer(nats_url, "silent", [chunk(0)]) as (peer, client):
            loop = asyncio.get_running_loop()
            began_at = loop.time()
            with pytest.raises(RequestTimeout) as caught:
                await client.complete({"prompt": "x", "timeout_ms": 100}, worker_id="silent")
            assert loop.time() - began_at >= 1.1
            assert caught.value.details == {"stage": "client"}
            assert (await peer.cancels.get()).data == b"cancel"
            with pytest.raises(NoWorker):
                await client.complete({"prompt": "x", "timeout_ms": 600}, worker_id="nobody")

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_waits_for_a_worker(nats_url: str) -> None:
    async def work() -> None:
        done = [chunk(0, "late", terminal=True)]
        async with scripted_peer(nats_url, "late", done, listening=False) as (peer, client):
            asking = asyncio.create_task(client.complete({"prompt": "x"}, worker_id="late"))
            await asyncio.wait({asking}, timeout=0.05)
            await peer.listen()
            assert (await asking).text == "late"
        async with client_asyncio.open_client(
            nats_url, timeout_ms=None, nobody_listens_grace_s=0
        ) as impatient:
            with pytest.raises(NoWorker, match=r"asked for 0\.0 s"):
                await impatient.complete({"prompt": "x"}, worker_id="nobody")

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_loses_nothing_by_a_cancelled_wait(nats_url: str) -> None:
    async def work() -> None:
        busy = refusal("QUEUE_FULL", retry_after_ms=300)
        async with (
            scripted_peer(nats_url, "patience", [busy], [chunk(0, "yes", terminal=True)]) as (
                peer,
                client,
            ),
            client.ask({"prompt": "x"}, worker_id="patience") as answer,
        ):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await anext(answer)
            assert await answer.text() == "yes"
            assert len(peer.requests) == 2

    await in_asyncio(work)


@pytest.mark.nats
async def test_asyncio_streams_completes_and_cancels_at_a_worker(tmp_path: Path) -> None:
    async def work(url: str) -> None:
        request = {"prompt": "a b", "max_tokens": 5, "seed": 3}
        async with client_asyncio.open_client(url, timeout_ms=None) as client:
            whole = await client.complete(request)
            joined = await client.complete({**request, "stream": True})
            assert len(whole.text.split()) == 5
            assert joined.text == whole.text
            assert joined.usage == whole.usage
            with pytest.raises(BY_CODE["INVALID_REQUEST"]):
                await client.complete({"prompt": "x", "max_tokens": 0})
            long = {"prompt": "x", "max_tokens": 4000, "stream": True}
            async with client.ask(long) as answer:
                await anext(answer)
                await answer.cancel()
                with pytest.raises(RequestCancelled):
                    await answer.text()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.complete({**long, "stream": False})
            async with client.ask(long) as answer:
                await anext(answer)

    async with running_command(tmp_path, "--engine", "simulated") as worker:
        await worker.wait_ready()
        await in_asyncio(partial(work, worker.url))
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=3)
        outcomes = (await worker.stats())["requests"]["by_outcome"]
    assert outcomes == {"ok": 2, "INVALID_REQUEST": 1, "CANCELLED": 3}


def test_the_asyncio_flavour_leaves_asyncio_as_it_is() -> None:
    code = (
        "import sys, trio_worker.client_asyncio\n"
        "print([name for name in ('trio', 'trio_asyncio', 'mlx', 'loguru') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.decode().strip() == "[]"


# --- the inbox prefix ---------------------------------------------------------------------


@pytest.mark.nats
async def test_answers_come_below_the_prefix_that_the_worker_permits(tmp_path: Path) -> None:
    async def ask(url: str, prefix: str) -> None:
        async with client_asyncio.open_client(
            url, inbox_prefix=prefix, timeout_ms=500, attempts=1
        ) as client:
            await client.complete({"prompt": "x", "max_tokens": 1})

    async with running_command(
        tmp_path,
        *("--engine", "simulated", "--set", "nats.reply_prefixes=[_INBOX., _INBOX_mine.]"),
    ) as worker:
        await worker.wait_ready()
        async with open_client(worker.url, inbox_prefix="_INBOX_mine") as client:
            assert (await client.complete({"prompt": "x", "max_tokens": 1})).text
        await in_asyncio(partial(ask, worker.url, "_INBOX_mine"))
        async with open_client(worker.url, inbox_prefix="_INBOX_other", timeout_ms=100) as client:
            with pytest.raises(WorkerError) as caught:
                await client.complete({"prompt": "x", "max_tokens": 1})
    assert caught.value.details == {"stage": "client"}
