"""Several choices of one request, on a whole worker: rows of one batch, one answer."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from support.metric_values import counter_of, histogram_of
from support.worker_rig import Reply, Rig, running_worker, subject_of
from trio.testing import MockClock

from trio_worker.monitoring.metrics import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    QUEUE_WAIT,
    REQUESTS,
    TIME_TO_FIRST_TOKEN,
)
from trio_worker.ports import Message
from trio_worker.simulated.engine import Faults

ONE_SLOT = "worker.continuous_batching.max_batch_size=1"


async def alone(rig: Rig, seed: int, **fields: Any) -> str:
    return (await rig.ask(**fields, seed=seed)).text


def texts_of(reply: Reply) -> list[str]:
    """What each choice says, streamed or whole."""
    told: dict[int, str] = {}
    for chunk in reply.chunks:
        for choice in chunk.body["choices"]:
            told[choice["index"]] = told.get(choice["index"], "") + choice["text"]
    return [told[index] for index in sorted(told)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("override", ["worker.continuous_batching.max_batch_size=8", ONE_SLOT])
async def test_each_choice_is_what_its_seed_says_alone(
    autojump_clock: MockClock, override: str, *, stream: bool
) -> None:
    async with running_worker(override) as rig:
        fields = {"prompt": "a b c", "max_tokens": 6, "stream": stream}
        reply = await rig.ask(**fields, seed=7, n=3)
        expected = [await alone(rig, seed, **fields) for seed in (7, 8, 9)]
    assert texts_of(reply) == expected
    assert len(set(expected)) == 3
    usage = reply.usage
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 18)
    assert reply.worker["seed"] == 7
    assert len(reply.chunks) == (1 + 3 * (1 + 6 + 1) if stream else 1)


async def test_choices_decode_together_and_each_ends_when_it_has_ended(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        fields = {"prompt": "a b c", "max_tokens": 20, "stream": True}
        stop = (await alone(rig, 8, **fields)).split()[3]
        reply = await rig.ask(**fields, seed=7, n=2, stop=stop)
        assert rig.engine.largest_batch == 2
    ends = [
        (choice["index"], choice["finish_reason"])
        for chunk in reply.chunks
        for choice in chunk.body["choices"]
        if choice["finish_reason"]
    ]
    assert ends == [(1, "stop"), (0, "length")]
    assert len(texts_of(reply)[1].split()) == 3


async def test_choices_go_on_where_they_were_after_a_crash(autojump_clock: MockClock) -> None:
    fields = {"prompt": "a b c", "max_tokens": 20, "seed": 7, "n": 3, "stream": True}
    async with running_worker() as rig:
        expected = texts_of(await rig.ask(**fields))
    async with running_worker() as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def ask() -> None:
                replies.append(await rig.ask(**fields))

            nursery.start_soon(ask)
            await trio.sleep(0.2)
            rig.engine.crash()
        (reply,) = replies
    assert texts_of(reply) == expected
    assert reply.worker["resumed"] == 1


async def test_a_cancel_ends_all_choices_wherever_they_are(autojump_clock: MockClock) -> None:
    async with running_worker("worker.continuous_batching.max_batch_size=2") as rig:
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def ask() -> None:
                replies.append(await rig.ask(prompt="x", n=4, max_tokens=500, request_id="r"))

            nursery.start_soon(ask)
            await trio.sleep(0.2)
            snapshot = rig.snapshot()
            assert (snapshot.requests.in_flight, snapshot.queue.depth) == (4, 2)
            assert rig.engine.residents == {"r", "r.1"}
            rig.caller.publish(Message(subject="inference.cancel", body=b'{"request_id": "r.1"}'))
            await trio.sleep(0.1)
            assert rig.snapshot().requests.in_flight == 4, "no request has this id"
            rig.caller.publish(Message(subject=subject_of("r"), body=b"cancel"))
        assert [reply.code for reply in replies] == ["CANCELLED"]
        await trio.sleep(0.1)
        snapshot = rig.snapshot()
        assert (snapshot.requests.in_flight, snapshot.queue.depth) == (0, 0)
        assert rig.engine.residents == frozenset()


async def test_a_choice_that_fails_fails_the_request_and_the_others_leave(
    autojump_clock: MockClock,
) -> None:
    faults = Faults(failing_words=frozenset({"broken"}))
    async with running_worker(ONE_SLOT, faults=faults) as rig:
        reply = await rig.ask(prompt="broken", n=3, max_tokens=4)
        assert reply.code == "ENGINE_FAILED"
        assert (await rig.ask(prompt="whole", n=3, max_tokens=4)).code == "ok"


async def test_a_deadline_tells_the_tokens_of_all_and_the_text_of_the_first(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        reply = await rig.ask(prompt="x", n=2, max_tokens=500, seed=1, timeout_ms=250)
        assert reply.error is not None
        details = dict(reply.error.details)
        text = details.pop("text")
        assert details == {"stage": "decode", "tokens": 24, "timeout_ms": 250}
        assert str(text) == await alone(rig, 1, prompt="x", max_tokens=12)


async def test_a_drain_lets_a_request_finish_of_which_one_choice_has_begun(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(ONE_SLOT) as rig:
        replies: dict[str, Reply] = {}

        async def ask(name: str, **fields: Any) -> None:
            replies[name] = await rig.ask(prompt="x", max_tokens=20, **fields)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask("begun", n=2))
            await trio.sleep(0.1)
            nursery.start_soon(lambda: ask("waiting", n=2))
            await trio.sleep(0.1)
            rig.stop()
        assert replies["begun"].code == "ok"
        assert replies["begun"].usage["completion_tokens"] == 40
        assert replies["waiting"].code == "WORKER_DRAINING"


async def test_a_request_is_counted_once_and_the_tokens_of_all_its_choices(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        await rig.ask(prompt="a b c", n=4, max_tokens=5)
        observed = rig.observed
        assert counter_of(observed, REQUESTS).total() == 1
        assert counter_of(observed, PROMPT_TOKENS).total() == 3
        assert counter_of(observed, GENERATED_TOKENS).total() == 20
        for description in (QUEUE_WAIT, TIME_TO_FIRST_TOKEN):
            columns = histogram_of(observed, description).counts.values()
            assert sum(map(sum, columns)) == 1


async def test_places_are_for_choices(autojump_clock: MockClock) -> None:
    async with running_worker(ONE_SLOT, "worker.request_queue.max_depth=4") as rig:
        too_many = await rig.ask(prompt="x", n=5, max_tokens=2)
        assert too_many.error is not None
        assert (too_many.code, too_many.error.details) == (
            "INVALID_REQUEST",
            {"field": "n", "limit": 4},
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", n=3, max_tokens=50))
            await trio.sleep(0.1)
            assert rig.snapshot().queue.depth == 2
            assert (await rig.ask(prompt="x", n=3, max_tokens=2)).code == "QUEUE_FULL"
            assert (await rig.ask(prompt="x", n=2, max_tokens=2)).code == "ok"


async def test_without_rejection_several_choices_wait_until_there_are_places_for_all(
    autojump_clock: MockClock,
) -> None:
    async with running_worker(
        ONE_SLOT, "worker.request_queue.max_depth=3", "worker.request_queue.reject_when_full=false"
    ) as rig:
        replies: list[str] = []

        async def ask(name: str, n: int) -> None:
            reply = await rig.ask(prompt="x", n=n, max_tokens=5)
            replies.append(f"{name}: {reply.code}")

        async with trio.open_nursery() as nursery:
            for name, n in (("first", 3), ("large", 2), ("small", 1)):
                nursery.start_soon(ask, name, n)
                await trio.sleep(0.01)
            assert rig.snapshot().queue.waiting_for_place == 3
    assert replies == ["first: ok", "large: ok", "small: ok"]


async def test_the_usage_of_a_stream_may_come_in_a_message_of_its_own(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        chat = [{"role": "user", "content": "x y"}]
        options = {"include_usage": True}
        reply = await rig.ask(messages=chat, stream=True, stream_options=options, max_tokens=2)
    *_, closing, last = reply.chunks
    assert closing.finish_reason == "length"
    assert "usage" not in closing.body
    assert "Terminal" not in closing.headers
    assert last.body["choices"] == []
    assert last.usage is not None
    assert last.usage["completion_tokens"] == 2
    assert last.headers["Terminal"] == "done"


async def test_what_a_worker_is_set_to_take_is_taken(autojump_clock: MockClock) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    tools = [{"type": "function", "function": {"name": "f"}}]
    grammar = {"lark": 'start: "x"'}
    async with running_worker() as rig:
        assert (await rig.ask(**chat, tools=tools, tool_choice="none")).code == "ok"
        assert (await rig.ask(**chat, grammar=grammar)).code == "INVALID_REQUEST"
    async with running_worker("worker.tools=off") as rig:
        refused = await rig.ask(**chat, tools=tools, tool_choice="none")
        assert refused.error is not None
        assert refused.error.details == {"field": "tools"}
