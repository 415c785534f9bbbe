"""One request's own task: what it checks, what it says at each end, and what it counts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import trio
from support.metric_values import counter_of, histogram_of
from support.worker_rig import Reply, Rig, running_worker, subject_of
from trio.testing import MockClock

from trio_worker.core.request import Request
from trio_worker.monitoring.metrics import (
    CANCELLATIONS,
    PROMPT_TOKENS,
    REQUEST_SECONDS,
    REQUESTS,
    RESUMED,
    Description,
)
from trio_worker.ports import Message, Turn
from trio_worker.protocol.prompt import Form, Prompt
from trio_worker.protocol.turn import Work
from trio_worker.simulated.engine import Faults, SimulatedEngine
from trio_worker.stages import respond

MB = 2**20


async def ask(rig: Rig, words: int, **fields: Any) -> Reply:
    return await rig.ask(prompt=" ".join("x" * words), **fields)


@pytest.mark.parametrize(
    ("words", "asked", "tokens"),
    [(19, 1, 1), (15, 5, 5), (10, None, 10), (19, None, 1), (4, None, 16), (2, None, 16)],
)
async def test_prompt_and_answer_fill_the_context_to_its_last_token(
    autojump_clock: MockClock, words: int, asked: int | None, tokens: int
) -> None:
    async with running_worker("worker.requests.default_max_tokens=16", context_length=20) as rig:
        reply = await ask(rig, words, max_tokens=asked)
        assert (reply.code, reply.usage["completion_tokens"]) == ("ok", tokens)


@pytest.mark.parametrize(
    ("words", "asked", "named"), [(20, None, 1), (20, 1, 1), (15, 6, 6), (30, 5, 5)]
)
async def test_one_token_more_than_the_context_holds_is_refused_with_the_numbers(
    autojump_clock: MockClock, words: int, asked: int | None, named: int
) -> None:
    async with running_worker(context_length=20) as rig:
        reply = await ask(rig, words, max_tokens=asked)
        assert reply.error is not None
        assert reply.code == "CONTEXT_LENGTH_EXCEEDED"
        assert reply.error.details == {
            "prompt_tokens": words,
            "max_tokens": named,
            "context_length": 20,
        }
        assert reply.error.message == (
            f"the prompt has {words} tokens and max_tokens is {named}; "
            "the model's context holds 20 together"
        )


@pytest.mark.parametrize(
    ("words", "asked", "tokens"),
    [
        (15, 5, 5),
        (15, 6, 5),
        (19, 100_000, 1),
        (15, None, 5),
        (4, 13, 12),
        (4, 11, 11),
        (4, None, 12),
    ],
)
async def test_what_may_be_fitted_is_cut_down_to_what_the_limit_and_the_context_leave(
    autojump_clock: MockClock, words: int, asked: int | None, tokens: int
) -> None:
    options = (
        "worker.requests.default_max_tokens=2",
        "worker.requests.max_tokens_limit=12",
    )
    async with running_worker(*options, context_length=20) as rig:
        reply = await ask(rig, words, max_tokens=asked, fit_max_tokens=True)
        assert (reply.code, reply.usage["completion_tokens"]) == ("ok", tokens)


@pytest.mark.parametrize("asked", [None, 5])
async def test_a_prompt_that_leaves_no_room_is_refused_whatever_may_be_fitted(
    autojump_clock: MockClock, asked: int | None
) -> None:
    async with running_worker(context_length=20) as rig:
        reply = await ask(rig, 20, max_tokens=asked, fit_max_tokens=True)
        assert reply.error is not None
        assert reply.code == "CONTEXT_LENGTH_EXCEEDED"
        assert reply.error.details == {
            "prompt_tokens": 20,
            "max_tokens": 1,
            "context_length": 20,
        }


async def test_what_would_never_fit_into_memory_is_refused_with_the_numbers(
    autojump_clock: MockClock,
) -> None:
    """256 tokens are 1 MB of this engine's cache; beside 100 MB there are 20 more."""
    async with running_worker(
        "worker.resource_limits.max_memory_mb=110",
        "worker.resource_limits.critical_memory_mb=120",
        "worker.requests.max_tokens_limit=100000",
        context_length=100_000,
    ) as rig:
        reply = await ask(rig, 2, max_tokens=20 * 256 - 1)
        assert reply.error is not None
        assert (reply.code, reply.error.retryable) == ("RESOURCE_LIMIT_EXCEEDED", False)
        assert reply.error.details == {
            "need_mb": 21.0,
            "room_mb": 20.0,
            "prompt_tokens": 2,
            "max_tokens": 5119,
        }
        assert "may need 21.0 MB of cache, and 20.0 MB is all" in reply.error.message
        fits = await ask(rig, 1, max_tokens=20 * 256 - 1, timeout_ms=1000)
        assert fits.error is not None
        assert fits.error.details["stage"] == "decode"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_says_where_it_passed_and_what_there_was(
    autojump_clock: MockClock, stream: object
) -> None:
    async with running_worker() as rig:
        whole = await ask(rig, 1, max_tokens=50, seed=1)
        reply = await ask(rig, 1, max_tokens=500, seed=1, timeout_ms=250, stream=stream)
        assert reply.error is not None
        assert reply.error.message == "the deadline of 0.25 s passed at stage decode"
        assert reply.error.retry_after_ms == 1000
        details = dict(reply.error.details)
        text = details.pop("text", None)
        assert details == {"stage": "decode", "tokens": 12, "timeout_ms": 250}
        said = "".join(f"{word} " for word in whole.text.split()[:12])
        assert text == (None if stream else said)
        assert (reply.text if stream else said) == said


async def test_the_note_says_where_the_time_went(autojump_clock: MockClock) -> None:
    """A turn takes 20 ms, each token of a prompt 0.05 ms; one slot, and four tokens before it."""
    async with running_worker("worker.continuous_batching.max_batch_size=1") as rig:
        replies: list[Reply] = []

        async def keep(**fields: Any) -> None:
            replies.append(await ask(rig, 20, **fields))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: keep(max_tokens=4, seed=7))
            await trio.sleep(0.01)
            nursery.start_soon(lambda: keep(max_tokens=3, seed=8, priority="low", stream=True))
    first, second = (dict(reply.worker) for reply in replies)
    assert first.pop("request_id") != second.pop("request_id")
    assert first == {
        "id": "w1",
        "seed": 7,
        "queue_ms": pytest.approx(0.0, abs=0.01),
        "prefill_ms": pytest.approx(21.0, abs=0.01),
        "decode_ms": pytest.approx(60.0, abs=0.01),
        "priority": "high",
        "resumed": 0,
        "degraded": [],
    }
    assert second["queue_ms"] == pytest.approx(71.0, abs=0.01)
    assert (second["prefill_ms"], second["decode_ms"]) == (
        pytest.approx(20.05, abs=0.01),  # nineteen of the tokens were kept
        pytest.approx(40.0, abs=0.01),
    )
    assert (second["priority"], second["seed"]) == ("low", 8)
    assert replies[0].chunks[0].body["created"] == 1_700_000_000
    assert replies[0].chunks[0].body["model"] == "smollm2-135m-instruct"
    assert replies[1].usage == {
        "prompt_tokens": 20,
        "completion_tokens": 3,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 19},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_a_keep_alive_comes_five_seconds_after_the_last_message_whatever_that_was(
    autojump_clock: MockClock,
) -> None:
    """While the engine is down, in the queue, and between two tokens; a whole answer needs none."""
    async with running_worker(restart_s=12.0) as rig:
        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            replies: list[Reply] = []

            async def keep(**fields: Any) -> None:
                replies.append(await ask(rig, 1, max_tokens=20, timeout_ms=600_000, **fields))

            rig.engine.crash()
            nursery.start_soon(lambda: keep(stream=True))
            nursery.start_soon(lambda: keep(stream=False))
            await trio.sleep(12.3)
            rig.engine.crash()
        streamed, whole = sorted(replies, key=lambda reply: -len(reply.chunks))
        assert len(whole.chunks) == 1
        quiet = [
            round(at - began_at, 2)
            for at, chunk in zip(streamed.times, streamed.chunks, strict=True)
            if not chunk.text and chunk.finish_reason is None
        ]
        last_token_at = max(
            round(at - began_at, 2)
            for at, chunk in zip(streamed.times, streamed.chunks, strict=True)
            if chunk.text and at - began_at < 13
        )
        assert quiet == [0.0, 5.0, 10.0, *(round(last_token_at + each, 2) for each in (5, 10))]


def counts(rig: Rig, description: Description) -> dict[tuple[str, ...], int]:
    values = counter_of(rig.observed, description).values
    return {labels: count for labels, count in values.items() if count}


async def test_each_end_is_counted_once_with_who_brought_it_about_and_where(
    autojump_clock: MockClock,
) -> None:
    faults = Faults(failing_words=frozenset({"broken"}))
    async with (
        running_worker("worker.continuous_batching.max_batch_size=1", faults=faults) as rig,
        trio.open_nursery() as nursery,
    ):
        await rig.ask(prompt="a b c", max_tokens=4)
        await rig.ask(prompt="broken", max_tokens=4)
        nursery.start_soon(lambda: rig.ask(prompt="d", max_tokens=500, request_id="one"))
        await trio.sleep(0.1)
        nursery.start_soon(lambda: rig.ask(prompt="e", max_tokens=500, request_id="two"))
        await trio.sleep(1)
        for name in ("two", "one"):
            rig.caller.publish(Message(subject=subject_of(name), body=b"cancel"))
            await trio.sleep(1)
        assert counts(rig, CANCELLATIONS) == {
            ("cancelled", "queued"): 1,
            ("cancelled", "decode"): 1,
        }
        assert counts(rig, REQUESTS) == {
            ("ok", "high"): 1,
            ("ENGINE_FAILED", "high"): 1,
            ("CANCELLED", "high"): 2,
        }
        # "two" never came into the batch.
        assert counts(rig, PROMPT_TOKENS) == {(): 3 + 1 + 1}
        assert counts(rig, RESUMED) == {}
        took = histogram_of(rig.observed, REQUEST_SECONDS)
        assert {labels: sum(column) for labels, column in took.counts.items()} == {
            ("ok",): 1,
            ("ENGINE_FAILED",): 1,
            ("CANCELLED",): 2,
        }
        assert took.sums["ok",] == pytest.approx(0.08, abs=0.001)
        assert took.sums["CANCELLED",] == pytest.approx(1.0 + 2.1, abs=0.01)


async def test_a_fault_on_the_way_is_answered_internal_and_stays_with_its_request(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        with mock.patch.object(respond, "_fit", side_effect=RuntimeError("planted")):
            reply = await ask(rig, 1, max_tokens=5)
        assert reply.error is not None
        assert (reply.code, reply.error.retryable) == ("INTERNAL", True)
        assert reply.error.message == "the worker failed on this request; its log says why"
        assert (await ask(rig, 1, max_tokens=5)).code == "ok"
        assert rig.snapshot().requests.in_flight == 0


async def test_only_whole_answers_say_how_long_service_takes(autojump_clock: MockClock) -> None:
    """Eight are enough to estimate by; a cancel or a deadline says nothing."""
    faults = Faults(failing_words=frozenset({"broken"}))
    async with running_worker(faults=faults) as rig:
        rate = rig.observed.parts.admission.rate
        for _ in range(9):
            await rig.ask(prompt="broken", max_tokens=4)
            await rig.ask(prompt="x", max_tokens=400, timeout_ms=50)
        assert rate.mean_service_s is None
        for _ in range(8):
            await rig.ask(prompt="x", max_tokens=5)
        assert rate.mean_service_s == pytest.approx(0.1, abs=0.001)


async def test_the_form_of_a_prompt_goes_with_each_admission_and_its_notes_are_told(
    autojump_clock: MockClock,
) -> None:
    form = Form(finds_reasoning=True, max_reasoning_tokens=5)
    prompt = Prompt(tokens=(1, 2, 3), form=form, notes=("general_tool_prompt",))
    begun: list[Work] = []
    begin = SimulatedEngine.begin

    async def tokenise(_self: SimulatedEngine, _request: Request) -> Prompt:
        await trio.lowlevel.checkpoint()
        return prompt

    def watched(self: SimulatedEngine, work: Work) -> Turn:
        begun.append(work)
        return begin(self, work)

    with (
        mock.patch.object(SimulatedEngine, "tokenise", tokenise),
        mock.patch.object(SimulatedEngine, "begin", watched),
    ):
        async with running_worker() as rig:
            reply = await ask(rig, 1, max_tokens=2, n=2)
    admits = [admit for work in begun for admit in work.admit]
    assert [(each.prompt, each.form) for each in admits] == [((1, 2, 3), form)] * 2
    assert reply.worker["degraded"] == ["general_tool_prompt"]
