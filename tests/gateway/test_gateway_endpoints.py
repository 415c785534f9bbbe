"""A gateway before a whole worker, as a client sees it."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from support.gateway_rig import (
    CHAT,
    COMPLETIONS,
    Gateway,
    events,
    open_gateway,
    say,
    send,
    text_of,
)
from support.http_calls import Heard, calling
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker.errors import (
    SHUTTING_DOWN,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    WorkerDraining,
    WorkerError,
)
from trio_worker.gateway.forward import AT_ONCE, SILENT_S, SLACK_S
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryServer
from trio_worker.simulated.engine import Faults
from trio_worker.wire import native, subjects

MODEL = "smollm2-135m-instruct"
ONE_SLOT = "worker.continuous_batching.max_batch_size=1"


# --- answers --------------------------------------------------------------------------------


async def test_a_stream_is_the_workers_chunks_and_done(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        heard = await gateway.ask(say("hello there", max_tokens=4, stream=True))
        whole = await gateway.ask(say("hello there", max_tokens=4))
        told = await rig.ask(
            messages=[{"role": "user", "content": "hello there"}], max_tokens=4, seed=5
        )
    assert heard.status == 200
    assert heard.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert heard.headers["x-worker-id"] == "w1"
    *chunks, last, done = events(heard.body)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert last["choices"][0]["finish_reason"] == "length"
    assert "usage" not in last, "nobody has asked for it"
    assert last["id"] == f"chatcmpl-{heard.headers['x-request-id']}"
    answer = json.loads(whole.body)
    assert answer["choices"][0]["message"]["content"] == text_of(chunks) == told.text
    assert answer["usage"]["completion_tokens"] == 4
    assert whole.headers["content-type"] == "application/json"


async def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        body = say("hi", max_tokens=3, stream=True, stream_options={"include_usage": True})
        chunks = events((await gateway.ask(body)).body)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == 3


async def test_completions_answer_a_prompt(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        body = {"prompt": "once", "max_tokens": 3, "stream": True, "logprobs": 2}
        heard = await gateway.ask(body, COMPLETIONS)
    *chunks, _ = events(heard.body)
    assert text_of(chunks)
    assert chunks[1]["object"] == "text_completion"
    assert len(chunks[1]["choices"][0]["logprobs"]["tokens"]) == 1


async def test_who_asks_for_no_number_of_tokens_gets_as_many_as_there_may_be(
    autojump_clock: MockClock,
) -> None:
    limits = ("worker.requests.max_tokens_limit=30", "worker.requests.default_max_tokens=2")
    async with running_worker(*limits) as rig, open_gateway(rig) as gateway:
        for fields in ({}, {"max_tokens": 5000}):
            answer = json.loads((await gateway.ask(say("hi", **fields))).body)
            assert answer["usage"]["completion_tokens"] == 30


async def test_a_caller_who_waits_in_the_queue_is_kept_alive(autojump_clock: MockClock) -> None:
    async with running_worker(ONE_SLOT) as rig, open_gateway(rig) as gateway:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="long", max_tokens=600, timeout_ms=60_000))
            await trio.sleep(0.1)
            heard = await gateway.ask(say("hi", max_tokens=1, stream=True))
    deltas = [each["choices"][0]["delta"] for each in events(heard.body)[:-1]]
    assert deltas[:3] == [{"role": "assistant"}, {}, {}]


def chunk(**choice: Any) -> bytes:
    return json.dumps(
        {"id": "c", "choices": [{"index": 0, **choice}]}, separators=(",", ":")
    ).encode()


def opening(choice: int = 0) -> bytes:
    return chunk(index=choice, delta={"role": "assistant"}, logprobs=None, finish_reason=None)


OPENING = opening()


async def answered_in_a_burst(words: list[str], *, last: bytes, error: WorkerError | None) -> Heard:
    """A streamed answer all of whose messages have come before the first is taken."""
    server = MemoryServer(random=random.Random(0))
    async with open_gateway(server) as gateway:

        def answer(message: Message) -> None:
            assert message.reply is not None
            outlet = gateway.broker.open_outlet(message.reply, headers={})
            said = [OPENING, *(chunk(delta={"content": word}) for word in words)]
            for number, body in enumerate(said):
                outlet.publish(body, native.headers(sequence=number, terminal=False))
            headers = native.headers(sequence=len(said), terminal=True, error=error)
            outlet.publish(last, headers)

        await gateway.broker.subscribe("inference", answer, group=subjects.GROUP)
        return await gateway.ask(say("hi", stream=True))


async def test_what_comes_together_goes_on_in_order_and_ends_with_done(
    autojump_clock: MockClock,
) -> None:
    """More than is taken at once."""
    words = [str(number) for number in range(3 * AT_ONCE)]
    last = chunk(delta={}, finish_reason="stop")
    heard = await answered_in_a_burst(words, last=last, error=None)
    *chunks, done = events(heard.body)
    assert done == "[DONE]"
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert deltas == [{"role": "assistant"}, *({"content": word} for word in words), {}]


async def test_what_came_before_an_error_is_the_callers(autojump_clock: MockClock) -> None:
    error = EngineFailed("it broke")
    heard = await answered_in_a_burst(["a", "b"], last=native.error_body(error, None), error=error)
    *chunks, failed = events(heard.body)
    assert text_of(chunks) == "ab"
    assert failed["error"]["code"] == "engine_failed"


async def test_another_worker_takes_over_behind_an_opening_that_came_with_a_refusal(
    autojump_clock: MockClock,
) -> None:
    """The caller hears one opening."""
    server = MemoryServer(random=random.Random(0))
    attempts: list[Message] = []
    async with open_gateway(server) as gateway:

        def answer(message: Message) -> None:
            assert message.reply is not None
            attempts.append(message)
            outlet = gateway.broker.open_outlet(message.reply, headers={})
            outlet.publish(OPENING, native.headers(sequence=0, terminal=False))
            if len(attempts) == 1:
                error = WorkerDraining(SHUTTING_DOWN)
                headers = native.headers(sequence=1, terminal=True, error=error)
                outlet.publish(native.error_body(error, 1), headers)
                return
            outlet.publish(
                chunk(delta={"content": "a"}), native.headers(sequence=1, terminal=False)
            )
            last = chunk(delta={}, finish_reason="stop")
            outlet.publish(last, native.headers(sequence=2, terminal=True))

        await gateway.broker.subscribe("inference", answer, group=subjects.GROUP)
        heard = await gateway.ask(say("hi", stream=True))
    *chunks, done = events(heard.body)
    assert len(attempts) == 2
    assert done == "[DONE]"
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert deltas == [{"role": "assistant"}, {"content": "a"}, {}]


@pytest.mark.parametrize("stream", [True, False])
async def test_each_choice_is_opened_once_and_ends_by_itself(
    autojump_clock: MockClock, *, stream: bool
) -> None:
    """Also where another worker opens them again; the last message ends none of them."""
    server = MemoryServer(random=random.Random(0))
    attempts: list[Message] = []
    async with open_gateway(server) as gateway:

        def answer(message: Message) -> None:
            assert message.reply is not None
            attempts.append(message)
            outlet = gateway.broker.open_outlet(message.reply, headers={})
            said = [opening(0), opening(1)]
            if len(attempts) > 1:
                said += [
                    chunk(index=1, delta={"content": "b"}),
                    chunk(index=0, delta={"reasoning_content": "Hm"}),
                    chunk(index=1, delta={}, finish_reason="stop"),
                    chunk(index=0, delta={"content": "a"}, finish_reason="length"),
                ]
            for number, body in enumerate(said):
                outlet.publish(body, native.headers(sequence=number, terminal=False))
            if len(attempts) > 1:
                last = json.dumps({"id": "c", "choices": [], "usage": {}}, separators=(",", ":"))
                headers = native.headers(sequence=len(said), terminal=True)
                outlet.publish(last.encode(), headers)
                return
            error = WorkerDraining(SHUTTING_DOWN)
            headers = native.headers(sequence=len(said), terminal=True, error=error)
            outlet.publish(native.error_body(error, 1), headers)

        await gateway.broker.subscribe("inference", answer, group=subjects.GROUP)
        heard = await gateway.ask(say("hi", n=2, stream=stream))
    assert len(attempts) == 2
    if not stream:
        choices = json.loads(heard.body)["choices"]
        assert [each["message"]["content"] for each in choices] == ["a", "b"]
        assert [each["message"].get("reasoning_content") for each in choices] == ["Hm", None]
        assert [each["finish_reason"] for each in choices] == ["length", "stop"]
        return
    *chunks, done = events(heard.body)
    assert done == "[DONE]"
    told = [(each["index"], each["delta"]) for chunk in chunks for each in chunk["choices"]]
    assert told[:2] == [(0, {"role": "assistant"}), (1, {"role": "assistant"})]
    assert len(told) == len(chunks) == 6, "nobody has asked for the usage"


async def test_a_place_in_a_refusal_is_named_as_the_client_names_it(
    autojump_clock: MockClock,
) -> None:
    where = "response_format.json_schema.schema"
    error = InvalidRequest(f"{where}: no", details={"field": where})
    server = MemoryServer(random=random.Random(0))
    async with open_gateway(server) as gateway:

        def refuse(message: Message) -> None:
            assert message.reply is not None
            outlet = gateway.broker.open_outlet(message.reply, headers={})
            headers = native.headers(sequence=0, terminal=True, error=error)
            outlet.publish(native.error_body(error, None), headers)

        await gateway.broker.subscribe("inference", refuse, group=subjects.GROUP)
        heard = await gateway.ask(say("hi", structured_outputs={"json": {}}))
    told = json.loads(heard.body)["error"]
    assert (heard.status, told["param"]) == (400, "structured_outputs.json")
    assert told["message"] == "structured_outputs.json: no"


# --- the end of a call ----------------------------------------------------------------------


async def test_whoever_leaves_is_cancelled_at_the_worker(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        for stream in (True, False):
            async with calling(gateway.api) as caller:
                await send(caller, say("hi", max_tokens=1000, stream=stream))
                await trio.sleep(0.5)
                assert len(rig.engine.residents) == 1
                await caller.stream.aclose()
                await trio.sleep(0.1)
                assert rig.engine.residents == frozenset()
        assert gateway.api.counts.left.total() == 2
        assert gateway.api.counts.running == 0


async def test_what_fails_after_its_beginning_ends_with_an_error_and_not_with_done(
    autojump_clock: MockClock,
) -> None:
    async with (
        running_worker(faults=Faults(failing_words=frozenset({"broken"}))) as rig,
        open_gateway(rig) as gateway,
    ):
        heard = await gateway.ask(say("broken", stream=True, max_tokens=5))
        chunks = events(heard.body)
        assert heard.status == 200
        assert chunks[-1]["error"]["code"] == "engine_failed"
        assert "[DONE]" not in chunks
        assert gateway.api.counts.answers.values["broken",] == 1
        heard = await gateway.ask(say("broken", max_tokens=5))
        assert (heard.status, heard.headers["x-should-retry"]) == (500, "false")


async def test_a_deadline_is_the_callers(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        headers = {"X-Stainless-Read-Timeout": "3"}
        began_at = trio.current_time()
        heard = await gateway.ask(say("hi", max_tokens=2000), headers=headers)
        assert (heard.status, json.loads(heard.body)["error"]["code"]) == (504, "request_timeout")
        assert trio.current_time() - began_at == pytest.approx(2.0, abs=0.1)


# --- no room, nobody there ------------------------------------------------------------------


async def test_where_nobody_listens_it_is_said_after_five_seconds(
    autojump_clock: MockClock,
) -> None:
    server = MemoryServer(random=random.Random(0))
    async with open_gateway(server) as gateway:
        began_at = trio.current_time()
        heard = await gateway.ask(say("hi", stream=True))
        assert heard.status == 503
        assert json.loads(heard.body)["error"]["code"] == "no_worker"
        assert heard.headers["x-should-retry"] == "true"
        assert 4 < trio.current_time() - began_at < 6
        assert (await gateway.get("/readyz")).status == 503
        assert (await gateway.get("/health")).status == 200


async def test_workers_that_are_there_and_full_are_said_to_be_full(
    autojump_clock: MockClock,
) -> None:
    full = (ONE_SLOT, "worker.request_queue.max_depth=1")
    async with running_worker(*full) as rig, open_gateway(rig) as gateway:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(
                    lambda: rig.ask(prompt="long", max_tokens=900, timeout_ms=99_000)
                )
                await trio.sleep(0.1)
            began_at = trio.current_time()
            heard = await gateway.ask(say("hi"))
            assert 4 < trio.current_time() - began_at < 6, "one may have room before"
            nursery.cancel_scope.cancel()
    assert (heard.status, json.loads(heard.body)["error"]["code"]) == (429, "queue_full")
    assert heard.headers["x-should-retry"] == "true"


async def test_without_nats_nobody_waits(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        gateway.broker.disconnect()
        began_at = trio.current_time()
        assert (await gateway.ask(say("hi"))).status == 503
        assert trio.current_time() == began_at
        assert (await gateway.get("/health")).status == 503
        gateway.broker.reconnect()
        assert (await gateway.ask(say("hi", max_tokens=1))).status == 200


@pytest.mark.parametrize("error", [QueueFull("full"), WorkerDraining(SHUTTING_DOWN)])
@pytest.mark.parametrize("attempts", [1, 2, 3])
async def test_another_worker_is_tried_at_once_where_the_first_has_no_room(
    autojump_clock: MockClock, error: WorkerError, attempts: int
) -> None:
    """They all say the same: then it is the caller who hears it, with when to try again."""
    server = MemoryServer(random=random.Random(0))
    asked_at: list[float] = []
    async with open_gateway(server, attempts=attempts) as gateway:

        def refuse(message: Message) -> None:
            asked_at.append(trio.current_time())
            assert message.reply is not None
            outlet = gateway.broker.open_outlet(message.reply, headers={})
            headers = native.headers(sequence=0, terminal=True, error=error)
            outlet.publish(native.error_body(error, 3000), headers)

        await gateway.broker.subscribe("inference", refuse, group=subjects.GROUP)
        began_at = trio.current_time()
        heard = await gateway.ask(say("hi", stream=True))
    assert heard.status == (429 if error.code == "QUEUE_FULL" else 503)
    assert (heard.headers["retry-after"], heard.headers["retry-after-ms"]) == ("3", "3000")
    assert len(asked_at) == attempts
    if attempts > 1:
        assert asked_at[1] == pytest.approx(began_at, abs=0.01)
    if attempts > 2:
        assert asked_at[2] - began_at >= 3


async def test_a_worker_that_falls_silent_before_its_first_token_is_given_up(
    autojump_clock: MockClock,
) -> None:
    """Somebody takes the request and is never heard of again; then a worker comes."""
    server = MemoryServer(random=random.Random(0))
    taken: list[Any] = []
    async with open_gateway(server) as gateway:
        dead = await gateway.broker.subscribe("inference", taken.append, group=subjects.GROUP)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                heard = await gateway.ask(say("hi", stream=True))
                assert heard.status == 503

            began_at = trio.current_time()
            nursery.start_soon(ask)
            await trio.sleep(1)
            await dead.drain()
        assert len(taken) == 1
        assert trio.current_time() - began_at == pytest.approx(SILENT_S + 5, abs=1)


@pytest.mark.parametrize(
    ("asked", "code", "after_s"),
    [({}, "internal", SILENT_S), ({"timeout_ms": 5000}, "request_timeout", 6.0)],
)
async def test_a_stream_that_falls_silent_in_the_middle_ends_with_an_error(
    autojump_clock: MockClock, asked: dict[str, Any], code: str, after_s: float
) -> None:
    """Not while something comes now and then; and the worker, if it lives, is told."""
    server = MemoryServer(random=random.Random(0))
    cancelled: list[Message] = []
    async with open_gateway(server) as gateway, trio.open_nursery() as nursery:

        async def tell(reply: str) -> None:
            outlet = gateway.broker.open_outlet(reply, reply="ctl.1", headers={})
            outlet.publish(OPENING, native.headers(sequence=0, terminal=False))
            for number in range(1, 6):
                if not asked:
                    await trio.sleep(0.9 * SILENT_S)
                body = chunk(delta={"content": "a"})
                outlet.publish(body, native.headers(sequence=number, terminal=False))

        def answer(message: Message) -> None:
            assert message.reply is not None
            nursery.start_soon(tell, message.reply)

        await gateway.broker.subscribe("inference", answer, group=subjects.GROUP)
        await gateway.broker.subscribe("ctl.1", cancelled.append)
        began_at = trio.current_time()
        with trio.fail_after(1000):
            heard = await gateway.ask(say("hi", stream=True, **asked))
    *chunks, failed = events(heard.body)
    assert text_of(chunks) == "aaaaa"
    assert failed["error"]["code"] == code
    talked_s = 0.0 if asked else 5 * 0.9 * SILENT_S
    lasted_s = trio.current_time() - began_at - talked_s
    assert after_s <= lasted_s <= after_s + SLACK_S + 0.1
    assert len(cancelled) == 1


# --- who may ask, and what --------------------------------------------------------------------


def keys_file(folder: Path, *lines: str) -> str:
    path = folder / "keys"
    digest = hashlib.sha256(b"secret").hexdigest()
    path.write_text("\n".join(line.format(digest) for line in lines))
    return str(path)


async def test_only_who_has_a_key_is_served_and_no_more_at_a_time_than_it_may(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    path = keys_file(tmp_path, "anna {} low 1")
    async with running_worker() as rig, open_gateway(rig, keys_file=path) as gateway:
        heard = await gateway.ask(say("hi"))
        assert (heard.status, heard.headers["www-authenticate"]) == (401, "Bearer")
        assert (await gateway.get("/v1/models")).status == 401
        assert (await gateway.get("/health")).status == 200
        mine = {"Authorization": "Bearer secret"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: gateway.ask(say("long", max_tokens=50), headers=mine))
            await trio.sleep(0.2)
            (running,) = rig.observed.in_flight()
            assert running.priority == "low"
            heard = await gateway.ask(say("hi"), headers=mine)
            assert (heard.status, heard.headers["x-should-retry"]) == (429, "true")
        assert (await gateway.ask(say("hi", max_tokens=1), headers=mine)).status == 200
        # The file changes.
        keys_file(tmp_path, "# nobody yet", "anna {} high")
        await trio.sleep(2)
        assert (await gateway.ask(say("hi", max_tokens=1), headers=mine)).status == 200


@pytest.mark.parametrize(
    ("method_path", "headers", "body", "status", "code"),
    [
        (CHAT, {"Content-Type": "text/plain"}, say("hi"), 415, "unsupported_media_type"),
        (CHAT, {"Host": "evil.example"}, say("hi"), 403, "host_not_allowed"),
        (CHAT, {}, say("hi", model="other"), 404, "model_not_found"),
        (CHAT, {}, say("hi", tools=[{"type": "function"}]), 400, "invalid_request"),
        ("/v1/responses", {}, say("hi"), 404, "unknown_path"),
        (CHAT, {}, None, 405, "method_not_allowed"),
        ("/v1/models/other", {}, None, 404, "model_not_found"),
    ],
)
async def test_what_is_refused_has_its_status_and_its_reason(
    autojump_clock: MockClock,
    method_path: str,
    headers: dict[str, str],
    body: object,
    status: int,
    code: str,
) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        heard = (
            await gateway.get(method_path, headers)
            if body is None
            else await gateway.ask(body, method_path, headers)
        )
        assert heard.status == status
        assert json.loads(heard.body)["error"]["code"] == code
        assert rig.snapshot().requests.in_flight == 0


async def test_models_are_those_that_workers_serve(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        (model,) = json.loads((await gateway.get("/v1/models")).body)["data"]
        assert model["max_model_len"] == 8192
        one = await gateway.get(f"/v1/models/{model['id']}")
        assert json.loads(one.body) == model
        assert (await gateway.get("/readyz")).status == 200
        rig.stop()
        await trio.sleep(10)
        assert json.loads((await gateway.get("/v1/models")).body)["data"] == []
        assert (await gateway.get("/readyz")).status == 503


async def test_a_page_of_a_listed_origin_may_ask_and_another_may_not(
    autojump_clock: MockClock,
) -> None:
    origins = ("https://chat.example",)
    async with running_worker() as rig, open_gateway(rig, cors_origins=origins) as gateway:
        allowed = "access-control-allow-origin"
        heard = await gateway.ask(say("hi", max_tokens=1, stream=True), headers=_from(origins[0]))
        assert heard.headers[allowed] == origins[0]
        heard = await gateway.ask(say("hi", max_tokens=1), headers=_from("https://evil.example"))
        assert allowed not in heard.headers
        async with calling(gateway.api) as caller:
            await caller.send(f"OPTIONS {CHAT} HTTP/1.1\nHost: localhost\nOrigin: {origins[0]}\n\n")
            preflight = await caller.hear("OPTIONS")
        assert (preflight.status, preflight.headers[allowed]) == (204, origins[0])


def _from(origin: str) -> dict[str, str]:
    return {"Origin": origin}


async def test_the_page_and_the_metrics_are_there(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        page = await gateway.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        await gateway.ask(say("hi", max_tokens=1), headers={"X-Stainless-Retry-Count": "1"})
        metrics = (await gateway.get("/metrics")).body.decode()
    assert 'trio_worker_gateway_answers_total{status="200"} 1.0' in metrics
    assert 'trio_worker_gateway_retried_total{retries="1"} 1.0' in metrics


async def test_nothing_is_left_of_many_calls(autojump_clock: MockClock) -> None:
    async with running_worker() as rig, open_gateway(rig) as gateway:
        before = len(rig.server._subscriptions)
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(_ask, gateway, number)
        assert len(rig.server._subscriptions) == before
        assert not gateway.api.forward._inboxes._open


async def _ask(gateway: Gateway, number: int) -> None:
    heard = await gateway.ask(say(f"number {number}", max_tokens=3, stream=bool(number % 2)))
    assert heard.status in (200, 429)
