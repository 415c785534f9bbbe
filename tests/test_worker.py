"""The whole worker on the mock clock: what a caller sees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from support.worker_rig import WORKER_ID, Reply, Rig, decode, running_worker, subject_of
from trio.testing import MockClock
from trio_util import AsyncValue

from trio_worker.errors import WorkerFault
from trio_worker.ports import Message
from trio_worker.simulated.engine import Faults
from trio_worker.simulated.service_manager import MemoryServiceManager
from trio_worker.simulated.speech import answer_tokens, word


async def ask_all(rig: Rig, requests: list[dict[str, object]]) -> list[Reply]:
    """Ask at the same time; the replies in the order of the requests."""
    replies: dict[int, Reply] = {}

    async def one(index: int, request: dict[str, object]) -> None:
        replies[index] = await rig.ask(**request)

    async with trio.open_nursery() as nursery:
        for index, request in enumerate(requests):
            nursery.start_soon(one, index, request)
    return [replies[index] for index in range(len(requests))]


# --- answers ------------------------------------------------------------------------------


async def test_a_buffered_request_gets_one_message_with_usage_and_a_note(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        reply = await rig.ask(prompt="one two three", max_tokens=4, seed=7)
    assert reply.code == "ok"
    (chunk,) = reply.chunks
    assert chunk.body["object"] == "text_completion"
    assert chunk.finish_reason == "length"
    assert len(reply.text.split()) == 4
    assert reply.usage["prompt_tokens"] == 3
    assert reply.usage["completion_tokens"] == 4
    assert reply.usage["total_tokens"] == 7
    assert reply.worker["id"] == WORKER_ID
    assert reply.worker["seed"] == 7
    assert reply.worker["priority"] == "high"
    assert reply.worker["resumed"] == 0
    assert chunk.headers["Terminal"] == "done"
    assert chunk.headers["Sequence"] == "0"


async def test_a_chat_request_gets_a_chat_completion(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        reply = await rig.ask(messages=[{"role": "user", "content": "hello there"}], max_tokens=2)
    (chunk,) = reply.chunks
    assert chunk.body["object"] == "chat.completion"
    assert chunk.body["choices"][0]["message"]["role"] == "assistant"
    assert chunk.body["created"] == 1_700_000_000


async def test_a_stream_opens_at_admission_numbers_its_chunks_and_says_the_same(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        buffered = await rig.ask(prompt="a b", max_tokens=5, seed=3)
        streamed = await rig.ask(prompt="a b", max_tokens=5, seed=3, stream=True)
        chat = await rig.ask(
            messages=[{"role": "user", "content": "a b"}], max_tokens=5, seed=3, stream=True
        )
    assert streamed.text == buffered.text == chat.text
    sequences = [int(chunk.headers["Sequence"]) for chunk in streamed.chunks]
    assert sequences == list(range(7)), "an opening chunk, five tokens, a closing chunk"
    assert [chunk.headers.get("Terminal") for chunk in streamed.chunks] == [None] * 6 + ["done"]
    assert chat.chunks[0].body["choices"][0]["delta"] == {"role": "assistant"}
    assert chat.chunks[-1].body["choices"][0]["finish_reason"] == "length"
    assert streamed.usage == buffered.usage


async def test_an_answer_is_a_function_of_prompt_and_seed_and_a_drawn_seed_reproduces_it(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        first = await rig.ask(prompt="x y z", max_tokens=6)
        seed = first.worker["seed"]
        again = await rig.ask(prompt="x y z", max_tokens=6, seed=seed)
        other = await rig.ask(prompt="x y z", max_tokens=6, seed=seed + 1)
    assert first.text == again.text
    assert first.text != other.text


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        whole = await rig.ask(prompt="p", max_tokens=8, seed=1)
        stop = whole.text.split()[3]
        cut = await rig.ask(prompt="p", max_tokens=8, seed=1, stop=[stop])
        streamed = await rig.ask(prompt="p", max_tokens=8, seed=1, stop=stop, stream=True)
    expected = whole.text[: whole.text.index(stop)]
    assert cut.text == streamed.text == expected
    assert cut.chunks[-1].finish_reason == "stop"
    assert cut.usage["completion_tokens"] == 4


async def test_logprobs_come_only_when_asked_for(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        plain = await rig.ask(prompt="p", max_tokens=2)
        asked = await rig.ask(prompt="p", max_tokens=2, logprobs=True, top_logprobs=2)
        messages = [{"role": "user", "content": "p"}]
        chat = await rig.ask(messages=messages, max_tokens=2, logprobs=True, top_logprobs=2)
    assert plain.chunks[0].body["choices"][0]["logprobs"] is None
    logprobs = asked.chunks[0].body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 2
    assert len(logprobs["top_logprobs"][0]) == 2
    content = chat.chunks[0].body["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    assert len(content[0]["top_logprobs"]) == 2


async def test_a_streamed_text_says_the_same_of_its_tokens_as_a_whole_one(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        plain = await rig.ask(prompt="p", max_tokens=8, seed=1)
        # It might begin with the fourth word, which is held back until the fifth.
        stop = f"{plain.text.split()[3]} !"
        asked = {"max_tokens": 8, "seed": 1, "logprobs": 2, "stop": stop}
        whole = await rig.ask(prompt="p", **asked)
        streamed = await rig.ask(prompt="p", **asked, stream=True)
    expected = whole.chunks[0].body["choices"][0]["logprobs"]
    chunks = streamed.chunks[1:-1]
    for name, values in expected.items():
        assert [chunk.body["choices"][0]["logprobs"][name] for chunk in chunks] == [
            [value] for value in values
        ]
    said = [chunk.text for chunk in chunks]
    assert expected["text_offset"] == [len("".join(said[:index])) for index in range(8)]
    assert said[3] == "", "nothing was held back"
    assert streamed.text == whole.text == plain.text


async def test_without_max_tokens_the_default_or_what_fits_holds(autojump_clock: MockClock) -> None:
    async with running_worker("worker.requests.default_max_tokens=20", context_length=30) as rig:
        default = await rig.ask(prompt="a b c")
        fitting = await rig.ask(prompt=" ".join(["w"] * 25))
    assert default.usage["completion_tokens"] == 20
    assert fitting.usage["completion_tokens"] == 5


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b"[1]", "an array"),
        (b'{"prompt": "x", "temprature": 1}', "temperature"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 99999}', "4096"),
        (b'{"prompt": "x", "max_tokens": 1, "maxTokens": 2}', "maxTokens"),
        (b'{"prompt": "x", "temperature": "hot"}', "temperature"),
        (b'{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}', "both"),
        (b"{}", "neither"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', "messages[0].role"),
        (b'{"prompt": "x", "priority": 3}', "priority"),
        (b'{"prompt": "x", "priority": "urgent"}', "priority"),
        (b'{"prompt": "x", "request_id": "a.b"}', "request_id"),
        (b'{"prompt": "x", "timeout_ms": 600001}', "600000"),
        (b'{"prompt": "x", "top_logprobs": 2}', "logprobs"),
        (b'{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias"),
        (b'{"prompt": "x", "stop": [""]}', "stop"),
        (b'{"prompt": "x", "seed": 9007199254740992}', "seed"),
    ],
)
async def test_what_is_no_request_gets_one_invalid_request_that_says_why(
    autojump_clock: MockClock, body: bytes, named: str
) -> None:
    async with running_worker() as rig:
        (message,) = await rig.raw(body)
        error = decode(message)["error"]
        assert error["code"] == "INVALID_REQUEST"
        assert named in error["message"]
        assert error["retryable"] is False
        assert error["retry_after_ms"] is None
        assert message.headers["Nats-Service-Error-Code"] == "400"
        assert message.headers["Terminal"] == "error"
        assert (await rig.ask(prompt="still here", max_tokens=1)).code == "ok"


async def test_a_bias_beyond_the_vocabulary_is_the_callers_fault_and_nobody_is_alarmed(
    autojump_clock: MockClock,
) -> None:
    """The engine says how large the vocabulary is, so a request waits until it is loaded."""
    async with running_worker("worker.simulated.vocabulary=500", load_s=2.0) as rig:
        last = await rig.ask(prompt="x", max_tokens=1, logit_bias={"499": 5})
        beyond = await rig.ask(prompt="x", max_tokens=1, logit_bias={"3": 1, "500": 5})
        assert rig.snapshot().requests.by_outcome == {"ok": 1, "INVALID_REQUEST": 1}
        assert rig.snapshot().tokens.prompt == 1, "the second never came to the engine"
    assert last.code == "ok"
    assert beyond.error is not None
    assert beyond.error.message == "logit_bias: 500 is no token of this model, which has 0 to 499"
    assert beyond.error.details == {"field": "logit_bias", "vocabulary_size": 500}


async def test_what_the_template_refuses_is_named_by_its_field(autojump_clock: MockClock) -> None:
    messages = [{"role": "user", "content": "x"}]
    async with running_worker(faults=Faults(refuse_tokenise=1.0)) as rig:
        replies = await ask_all(rig, [{"prompt": "x"}, {"messages": messages, "stream": True}])
    assert [reply.code for reply in replies] == ["INVALID_REQUEST"] * 2
    assert [reply.error and reply.error.details for reply in replies] == [
        {"field": "prompt"},
        {"field": "messages"},
    ]


async def test_nulls_count_as_absent_and_other_spellings_are_understood(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        (message,) = await rig.raw(
            msgspec.json.encode(
                {"prompt": "x", "messages": None, "maxTokens": 2, "requestId": "r-1", "topP": 0.5}
            )
        )
    assert message.headers["Request-Id"] == "r-1"
    assert decode(message)["usage"]["completion_tokens"] == 2


async def test_another_model_is_not_found_and_ours_is(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        assert (await rig.ask(prompt="x", model="gpt-4", max_tokens=1)).code == "MODEL_NOT_FOUND"
        name = "smollm2-135m-instruct"
        assert (await rig.ask(prompt="x", model=name, max_tokens=1)).code == "ok"


async def test_a_request_id_in_flight_is_refused_and_free_again_afterwards(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        replies = await ask_all(
            rig, [{"prompt": "x", "max_tokens": 3, "request_id": "same"} for _ in range(2)]
        )
        assert sorted(reply.code for reply in replies) == ["DUPLICATE_REQUEST", "ok"]
        again = await rig.ask(prompt="x", max_tokens=3, request_id="same")
    assert again.code == "ok"


async def test_a_prompt_over_the_context_names_both_numbers(autojump_clock: MockClock) -> None:
    async with running_worker(context_length=10) as rig:
        reply = await rig.ask(prompt="a b c d", max_tokens=7)
    assert reply.code == "CONTEXT_LENGTH_EXCEEDED"
    assert reply.error is not None
    assert reply.error.details == {"prompt_tokens": 4, "max_tokens": 7, "context_length": 10}


async def test_a_body_over_the_limit_is_refused_unread(autojump_clock: MockClock) -> None:
    async with running_worker("worker.requests.max_prompt_bytes=100") as rig:
        (message,) = await rig.raw(b"x" * 101)
    assert decode(message)["error"]["code"] == "PAYLOAD_TOO_LARGE"


async def test_an_answer_over_the_servers_limit_becomes_an_error(autojump_clock: MockClock) -> None:
    async with running_worker(max_payload=3000) as rig:
        reply = await rig.ask(prompt="x", max_tokens=1000)
        assert reply.code == "PAYLOAD_TOO_LARGE"
        streamed = await rig.ask(prompt="x", max_tokens=1000, stream=True)
    assert len(streamed.text.split()) == 1000


async def test_a_reply_subject_that_is_not_permitted_is_never_published_to(
    autojump_clock: MockClock,
) -> None:
    seen: list[Message] = []
    async with running_worker() as rig:
        for subject in ("orders.new", "_INBOX", "_INBOX.>", "worker.w1.ping.x"):
            await rig.caller.subscribe(subject, seen.append)
            rig.caller.publish(
                Message(subject="inference.w1", body=b'{"prompt": "x"}', reply=subject)
            )
        rig.caller.publish(Message(subject="inference.w1", body=b'{"prompt": "x"}'))
        await trio.sleep(5)
        assert rig.snapshot().requests.dropped == 5
        assert rig.snapshot().batch.turns == 0
    assert seen == []


# --- queue, batch, priority ---------------------------------------------------------------


async def test_concurrent_requests_decode_in_one_batch(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        replies = await ask_all(rig, [{"prompt": "x", "max_tokens": 20}] * 8)
        snapshot = rig.snapshot()
    assert all(reply.code == "ok" for reply in replies)
    assert rig.engine.largest_batch == 8
    assert snapshot.batch.max_batch_seen == 8
    assert snapshot.requests.completed == 8


async def test_a_late_request_joins_the_running_batch_at_the_next_turn(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="long", max_tokens=100))
            await trio.sleep(1)
            began = trio.current_time()
            late = await rig.ask(prompt="late", max_tokens=2, stream=True)
            took = trio.current_time() - began
        assert rig.snapshot().batch.by_trigger["running"] == 1
    assert late.code == "ok"
    assert took < 0.2


async def test_with_batching_off_requests_run_one_at_a_time(autojump_clock: MockClock) -> None:
    async with running_worker("worker.continuous_batching.enabled=false") as rig:
        await ask_all(rig, [{"prompt": "x", "max_tokens": 5}] * 4)
    assert rig.engine.largest_batch == 1


async def test_urgent_requests_overtake_waiting_ones(autojump_clock: MockClock) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.continuous_batching.preempt=false"
    ) as rig:
        order: list[str] = []

        async def one(name: str, priority: str) -> None:
            await rig.ask(prompt=name, max_tokens=10, priority=priority)
            order.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "running", "low")
            await trio.sleep(0.05)
            for name, priority in [("l1", "low"), ("m1", "medium"), ("l2", "low"), ("h1", "high")]:
                nursery.start_soon(one, name, priority)
                await trio.sleep(0.01)
    assert order == ["running", "h1", "m1", "l1", "l2"]


async def test_waiting_is_worth_a_level_so_the_least_urgent_is_not_starved(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.request_queue.aging_ms=100"
    ) as rig:
        order: list[str] = []

        async def one(name: str, priority: str) -> None:
            await rig.ask(prompt=name, max_tokens=10, priority=priority)
            order.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "running", "high")
            await trio.sleep(0.01)
            nursery.start_soon(one, "low", "low")
            for index in range(6):
                await trio.sleep(0.05)
                nursery.start_soon(one, f"high{index}", "high")
        assert rig.snapshot().queue.promotions > 0
    overtaken_by = [name for name in order[: order.index("low")] if name != "running"]
    assert set(overtaken_by) <= {"high0", "high1", "high2", "high3"}, "arrived within 200 ms"


async def test_a_full_queue_refuses_and_says_when_to_come_back(autojump_clock: MockClock) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.request_queue.max_depth=2"
    ) as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=50))

            nursery.start_soon(one)
            await trio.sleep(0.1)
            for _ in range(3):
                nursery.start_soon(one)
                await trio.sleep(0.01)
    assert sorted(reply.code for reply in replies) == ["QUEUE_FULL", "ok", "ok", "ok"]
    (refused,) = (reply.error for reply in replies if reply.error)
    assert refused.details == {"depth": 2, "max_depth": 2}
    assert refused.retryable
    assert refused.retry_after_ms == 1000


async def test_without_rejection_a_full_queue_lets_wait_for_a_place(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1",
        "worker.request_queue.max_depth=2",
        "worker.request_queue.reject_when_full=false",
    ) as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one(timeout_ms: int = 30_000) -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=20, timeout_ms=timeout_ms))

            nursery.start_soon(one)
            await trio.sleep(0.1)
            nursery.start_soon(one)
            nursery.start_soon(one)
            await trio.sleep(0.01)
            nursery.start_soon(one, 100)
            await trio.sleep(0.01)
            assert rig.snapshot().queue.waiting_for_place == 1
            nursery.start_soon(one)
            await trio.sleep(0.01)
            nursery.start_soon(one)
    codes = [reply.code for reply in replies]
    assert codes.count("ok") == 4
    assert codes.count("QUEUE_FULL") == 1
    assert codes.count("REQUEST_TIMEOUT") == 1, "its deadline holds while it waits for a place"


async def test_with_the_queue_off_nobody_waits(autojump_clock: MockClock) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=2", "worker.request_queue.enabled=false"
    ) as rig:
        replies = await ask_all(rig, [{"prompt": "x", "max_tokens": 5}] * 4)
    assert sorted(reply.code for reply in replies) == ["QUEUE_FULL", "QUEUE_FULL", "ok", "ok"]


async def test_an_idle_engine_waits_for_company_as_configured(autojump_clock: MockClock) -> None:
    options = (
        "worker.continuous_batching.min_batch_size=3",
        "worker.continuous_batching.batch_timeout_ms=500",
        "worker.continuous_batching.adaptive_timeout=false",
    )
    async with running_worker(*options) as rig:
        alone = await rig.ask(prompt="x", max_tokens=1)
        assert 500 <= alone.worker["queue_ms"] < 600
        trio_of_them = await ask_all(rig, [{"prompt": "x", "max_tokens": 1}] * 3)
        assert all(reply.worker["queue_ms"] < 100 for reply in trio_of_them)
        assert rig.snapshot().batch.by_trigger == {"timeout": 1, "size": 1}


async def test_adaptive_waiting_gives_up_when_arrivals_are_rare(autojump_clock: MockClock) -> None:
    options = (
        "worker.continuous_batching.min_batch_size=3",
        "worker.continuous_batching.batch_timeout_ms=500",
    )
    async with running_worker(*options) as rig:
        await rig.ask(prompt="x", max_tokens=1)
        await trio.sleep(60)
        second = await rig.ask(prompt="x", max_tokens=1)
        assert second.worker["queue_ms"] < 50
        assert rig.snapshot().batch.by_trigger["single"] == 1


# --- deadlines, cancels, callers gone -----------------------------------------------------


async def test_a_deadline_ends_a_running_request_and_hands_over_the_text_so_far(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        reply = await rig.ask(prompt="x", max_tokens=1000, timeout_ms=1000, seed=5)
        assert reply.times[-1] == pytest.approx(1.0, abs=0.05)
        after = await rig.ask(prompt="x", max_tokens=1)
        assert after.code == "ok"
        assert rig.engine.residents == frozenset()
    assert reply.code == "REQUEST_TIMEOUT"
    assert reply.error is not None
    assert reply.error.details["stage"] == "decode"
    produced = reply.error.details["tokens"]
    assert isinstance(produced, int)
    assert len(str(reply.error.details["text"]).split()) == produced > 10


async def test_a_deadline_covers_the_time_in_the_queue(autojump_clock: MockClock) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=1") as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=200))
            await trio.sleep(0.1)
            reply = await rig.ask(prompt="y", max_tokens=1, timeout_ms=500)
            assert reply.times[-1] == pytest.approx(0.6, abs=0.05)
    assert reply.error is not None
    assert reply.error.details["stage"] == "queued"


@pytest.mark.parametrize("how", ["control", "broadcast", "leaving"])
async def test_a_cancelled_request_frees_its_slot_at_the_next_turn(
    autojump_clock: MockClock, how: str
) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=1") as rig:
        replies: list[Reply] = []
        async with trio.open_nursery() as nursery:
            caller = trio.CancelScope()

            async def victim() -> None:
                with caller:
                    replies.append(
                        await rig.ask(prompt="x", max_tokens=1000, request_id="v", stream=True)
                    )

            nursery.start_soon(victim)
            await trio.sleep(1.0)
            if how == "control":
                rig.caller.publish(Message(subject=subject_of("v"), body=b"cancel"))
            elif how == "broadcast":
                rig.caller.publish(Message(subject="inference.cancel", body=b'{"request_id": "v"}'))
            else:
                caller.cancel()
            began = trio.current_time()
            following = await rig.ask(prompt="y", max_tokens=1)
            assert trio.current_time() - began < 0.2
        assert rig.snapshot().requests.by_outcome == {"CANCELLED": 1, "ok": 1}
    assert following.code == "ok"
    if how != "leaving":
        assert replies[0].code == "CANCELLED"


async def test_a_cancel_message_with_a_reply_subject_is_answered(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        answers: list[Message] = []
        inbox = rig.caller.new_inbox()
        await rig.caller.subscribe(inbox, answers.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=1000, request_id="v"))
            await trio.sleep(0.5)
            for request_id in ("v", "unknown"):
                rig.caller.publish(
                    Message(subject=subject_of(request_id), body=b"cancel", reply=inbox)
                )
    assert [decode(answer) for answer in answers] == [
        {"request_id": "v", "cancelled": True},
        {"request_id": "unknown", "cancelled": False},
    ]


async def test_a_caller_that_vanishes_is_noticed_by_the_servers_word(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        inbox = rig.caller.new_inbox()
        got: list[Message] = []
        subscription = await rig.caller.subscribe(inbox, got.append)
        body = b'{"prompt": "x", "max_tokens": 1000, "stream": true}'
        rig.caller.publish(Message(subject="inference.w1", body=body, reply=inbox))
        await trio.sleep(0.5)
        await subscription.drain()
        await trio.sleep(0.1)
        assert rig.snapshot().requests.in_flight == 0
        assert rig.engine.residents <= {got[0].headers["Request-Id"]}
        assert rig.snapshot().requests.by_outcome == {"CANCELLED": 1}
    assert got


async def test_the_absence_of_an_earlier_caller_does_not_end_a_request_of_the_same_id(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=50, request_id="again"))

            nursery.start_soon(one)
            await trio.sleep(0.1)
            late = {"Status": "503", "Nats-Subject": "_INBOX.somebody-else"}
            rig.caller.publish(Message(subject=subject_of("again"), headers=late))
    assert replies[0].code == "ok"


async def test_a_silent_wait_is_filled_with_numbered_keep_alive_chunks(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=1") as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=800))
            await trio.sleep(0.1)
            reply = await rig.ask(prompt="y", max_tokens=2, stream=True, timeout_ms=60_000)
    texts = [chunk.text for chunk in reply.chunks]
    assert texts.count("") == 1 + 3 + 1, "opening, three keep-alives in 16 s, closing"
    gaps = [b - a for a, b in zip(reply.times, reply.times[1:], strict=False)]
    assert max(gaps) <= 5.01


# --- the engine is lost -------------------------------------------------------------------


async def test_a_crash_costs_a_pause_and_no_token(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        undisturbed = await rig.ask(prompt="x", max_tokens=50, seed=1)
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=50, seed=1, stream=True))

            for _ in range(3):
                nursery.start_soon(one)
            await trio.sleep(0.5)
            rig.engine.crash()
            await trio.testing.wait_all_tasks_blocked()
            assert not rig.observed.readiness().ok
            assert "engine" in rig.observed.readiness().reason
    assert [reply.text for reply in replies] == [undisturbed.text] * 3
    assert [reply.worker["resumed"] for reply in replies] == [1, 1, 1]
    assert rig.engine.restarts == 1


async def test_requests_that_arrive_while_the_engine_is_down_wait_under_their_deadlines(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(restart_s=3.0) as rig:
        rig.engine.crash()
        replies = await ask_all(
            rig,
            [
                {"prompt": "x", "max_tokens": 1, "timeout_ms": 1000},
                {"prompt": "x", "max_tokens": 1, "timeout_ms": 10_000},
            ],
        )
    assert [reply.code for reply in replies] == ["REQUEST_TIMEOUT", "ok"]


async def test_only_the_request_that_brings_the_engine_down_fails(
    autojump_clock: MockClock,
) -> None:
    faults = Faults(deadly_words=frozenset({"poison"}))
    async with running_worker(faults=faults) as rig:
        requests: list[dict[str, object]] = [
            {"prompt": f"harmless {index}", "max_tokens": 40, "seed": index} for index in range(5)
        ]
        requests.insert(2, {"prompt": "poison", "max_tokens": 40})
        replies = await ask_all(rig, requests)
        assert [reply.code for reply in replies].count("ENGINE_FAILED") == 1
        assert replies[2].code == "ENGINE_FAILED"
        tokens = (await rig.ask(prompt="harmless 0", max_tokens=40, seed=0)).text
    assert replies[0].text == tokens
    assert rig.engine.restarts <= 8


async def test_a_failing_sequence_fails_alone_and_without_a_restart(
    autojump_clock: MockClock,
) -> None:
    faults = Faults(failing_words=frozenset({"broken"}))
    async with running_worker(faults=faults) as rig:
        replies = await ask_all(
            rig, [{"prompt": "fine", "max_tokens": 5}, {"prompt": "broken", "max_tokens": 5}]
        )
    assert [reply.code for reply in replies] == ["ok", "ENGINE_FAILED"]
    assert rig.engine.restarts == 0


async def test_when_the_restart_budget_is_spent_everyone_is_answered_and_the_worker_fails(
    autojump_clock: MockClock,
) -> None:
    replies: list[Reply] = []
    with pytest.raises(WorkerFault):
        async with running_worker(max_restarts=0) as rig:

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=500))

            async with trio.open_nursery() as nursery:
                for _ in range(12):
                    nursery.start_soon(one)
                await trio.sleep(0.5)
                # The caller outlives the worker in reality; here one nursery holds both.
                with trio.CancelScope(shield=True):
                    rig.engine.crash()
                    await rig.finished.wait()
                    await trio.sleep(1)
    assert [reply.code for reply in replies] == ["WORKER_DRAINING"] * 12


# --- memory -------------------------------------------------------------------------------


async def test_over_the_critical_limit_requests_are_refused_until_memory_has_come_back(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.resource_limits.check_interval_ms=100") as rig:
        rig.probe.used = 10_300 * 2**20
        await trio.sleep(0.2)
        refused = await rig.ask(prompt="x", max_tokens=1)
        assert not rig.observed.readiness().ok
        assert rig.snapshot().resources.pressure == "critical"
        rig.probe.used = 100 * 2**20
        await trio.sleep(0.2)
        assert (await rig.ask(prompt="x", max_tokens=1)).code == "ok"
    assert refused.code == "RESOURCE_LIMIT_EXCEEDED"
    assert refused.error is not None
    assert refused.error.message == "Worker at capacity (memory: 10300 MB)"


# --- NATS is away -------------------------------------------------------------------------


async def test_an_answer_waits_for_the_connection_to_come_back(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=50, stream=True))

            nursery.start_soon(one)
            await trio.sleep(0.3)
            rig.broker.disconnect()
            await trio.sleep(3)
            rig.broker.reconnect()
    assert replies[0].code == "ok"
    assert len(replies[0].text.split()) == 50


async def test_an_answer_that_piles_up_is_cut_down_to_its_terminal_message(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.simulated.turn_ms=1") as rig:
        inbox = rig.caller.new_inbox()
        got: list[Message] = []
        await rig.caller.subscribe(inbox, got.append)
        body = b'{"prompt": "x", "max_tokens": 4000, "stream": true, "timeout_ms": 600000}'
        rig.caller.publish(Message(subject="inference.w1", body=body, reply=inbox))
        await trio.sleep(0.01)
        rig.broker.disconnect()
        await trio.sleep(10)
        assert rig.snapshot().requests.in_flight == 0
        assert rig.broker.statistics().unpublished_bytes < 3000
        rig.broker.reconnect()
        await trio.sleep(1)
    assert [message.headers.get("Terminal") for message in got].count("error") == 1
    assert decode(got[-1])["error"]["code"] == "CANCELLED"


async def test_a_connection_lost_for_good_ends_the_worker(autojump_clock: MockClock) -> None:
    with pytest.raises(WorkerFault):
        async with running_worker() as rig:
            rig.broker.close_for_good("authorization revoked")
            await rig.finished.wait()


# --- the queue group ----------------------------------------------------------------------


async def test_a_nearly_full_worker_leaves_the_queue_group_and_comes_back(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        "worker.continuous_batching.max_batch_size=1", "worker.request_queue.max_depth=4"
    ) as rig:

        def grouped() -> bool:
            return any(each.group == "trio-workers" for each in rig.server._subscriptions)

        assert grouped()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=20))
            await trio.sleep(0.2)
            assert not grouped()
            assert rig.observed.readiness().reason.startswith("queue")
        await trio.sleep(0.1)
        assert grouped()


@pytest.mark.parametrize("subject", ["inference", "inference.model.smollm2-135m-instruct"])
async def test_the_shared_subjects_are_served(autojump_clock: MockClock, subject: str) -> None:
    async with running_worker() as rig:
        (message,) = await rig.raw(b'{"prompt": "x", "max_tokens": 1}', subject=subject)
    assert message.headers["Terminal"] == "done"


# --- stopping -----------------------------------------------------------------------------


async def test_a_drain_answers_the_waiting_and_lets_the_running_finish(
    autojump_clock: MockClock,
) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=2") as rig:
        replies: list[Reply] = []

        async def one() -> None:
            replies.append(await rig.ask(prompt="x", max_tokens=100))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
            await trio.sleep(0.5)
            rig.stop()
            await trio.sleep(0.6)
            assert [reply.code for reply in replies] == ["WORKER_DRAINING"] * 3
            assert rig.observed.readiness().reason.startswith("draining")
        await rig.finished.wait()
    assert [reply.code for reply in replies] == ["WORKER_DRAINING"] * 3 + ["ok"] * 2


async def test_at_the_drains_deadline_the_rest_is_answered_too(autojump_clock: MockClock) -> None:
    async with running_worker("worker.drain_timeout_ms=1000") as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=1000))

            nursery.start_soon(one)
            await trio.sleep(0.5)
            rig.stop()
            began = trio.current_time()
            await rig.finished.wait()
            assert 1.0 <= trio.current_time() - began < 2.0
    assert replies[0].code == "WORKER_DRAINING"


async def test_a_drain_says_how_far_it_has_come(autojump_clock: MockClock) -> None:
    told: list[tuple[object, ...]] = []

    async with running_worker(
        "worker.continuous_batching.max_batch_size=2", on_progress=lambda *step: told.append(step)
    ) as rig:
        async with trio.open_nursery() as nursery:
            for max_tokens in (50, 100, 20, 20, 20):  # the first two run
                nursery.start_soon(lambda many=max_tokens: rig.ask(prompt="x", max_tokens=many))  # type: ignore[misc]
                await trio.sleep(0.1)
            assert told == []
            rig.stop()
            await rig.finished.wait()
    assert set(told) >= {("draining", done, 5, "requests") for done in (0, 3, 4, 5)}
    assert told == sorted(told)
    assert len(told) == len(set(told))


async def test_a_drain_of_nothing_has_no_progress(autojump_clock: MockClock) -> None:
    told: list[tuple[object, ...]] = []
    async with running_worker(on_progress=lambda *step: told.append(step)) as rig:
        rig.stop()
        await rig.finished.wait()
    assert told == []


async def test_a_second_stop_does_not_wait(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def one() -> None:
                replies.append(await rig.ask(prompt="x", max_tokens=1000))

            nursery.start_soon(one)
            await trio.sleep(0.5)
            rig.stop()
            await trio.sleep(0.1)
            began = trio.current_time()
            rig.stop()
            await rig.finished.wait()
            assert trio.current_time() - began < 0.5
    assert replies[0].code == "WORKER_DRAINING"


async def test_a_stop_while_the_model_loads_ends_the_worker_at_once(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(load_s=100.0, wait_ready=False) as rig:
        await trio.sleep(5)
        began = trio.current_time()
        rig.stop()
        await rig.finished.wait()
        assert trio.current_time() - began < 1.0


async def test_the_gateway_drains_with_the_worker_which_waits_for_it_and_lives_meanwhile(
    autojump_clock: MockClock,
) -> None:
    """It may have answers of other workers under way, and uses this one's nats-server."""
    told = MemoryServiceManager()
    course: list[str] = []

    @asynccontextmanager
    async def open_gateway(stops: AsyncValue[int]) -> AsyncIterator[None]:
        async def drain() -> None:
            await stops.wait_value(1)
            course.append(f"drains at {trio.current_time() - began:.0f}")
            await trio.sleep(20)
            course.append("has drained")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            yield

    overrides = ("worker.drain_timeout_ms=1000", "gateway.drain_timeout_ms=25000")
    async with running_worker(*overrides, open_gateway=open_gateway, service_manager=told) as rig:
        began = trio.current_time()
        rig.stop()
        await trio.sleep(19)
        assert course == ["drains at 0"]
        assert rig.observed.liveness().ok
        assert rig.broker.statistics().connected
        await rig.finished.wait()
        assert course == ["drains at 0", "has drained"]
        assert trio.current_time() - began == pytest.approx(20, abs=1)
    extended = [each.at - began for each in told.notices if each.stopping and each.extend_timeout_s]
    assert max(extended) > 15, "systemd knows that it takes longer than the worker's own drain"


async def test_a_request_that_arrives_in_the_drain_is_told_so(autojump_clock: MockClock) -> None:
    """What is on its way when the stop comes, and what comes after the subscriptions have ended."""
    async with running_worker() as rig:
        got: dict[str, list[Message]] = {"in time": [], "late": []}
        inboxes = {name: rig.caller.new_inbox() for name in got}
        for name, messages in got.items():
            await rig.caller.subscribe(inboxes[name], messages.append)

        def send(name: str) -> None:
            body = b'{"prompt": "x"}'
            rig.caller.publish(Message(subject="inference.w1", body=body, reply=inboxes[name]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=200))
            await trio.sleep(0.5)
            rig.server.delay_s = 0.1
            send("in time")
            await trio.sleep(0.05)
            rig.stop()
            await trio.sleep(2)
            assert not rig.finished.is_set(), "one request is still running"
            rig.server.delay_s = 0
            send("late")
            await rig.finished.wait()
    (told,) = got["in time"]
    error = decode(told)["error"]
    assert (error["code"], error["retryable"]) == ("WORKER_DRAINING", True)
    assert told.reply is None, "there is no request that a control subject could be about"
    (status,) = got["late"]
    assert status.headers == {"Status": "503", "Nats-Subject": "inference.w1"}


# --- the simulated engine's promise -------------------------------------------------------


def test_the_simulated_answer_depends_on_prompt_and_seed_only() -> None:
    assert answer_tokens((1, 2), 3, 5, 1000) == answer_tokens((1, 2), 3, 9, 1000)[:5]
    assert word(103) == "debago"
