"""The log tells the story of each request, and of its text at level `trace` alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from support import log_records
from support.worker_rig import running_worker, subject_of
from trio.testing import MockClock

from trio_worker.ports import Message
from trio_worker.simulated.engine import Faults

ONE_SLOT = "worker.continuous_batching.max_batch_size=1"


@contextmanager
def logged(level: str) -> Iterator[list[tuple[str, str, str | None]]]:
    """Level, text and request of each line from this level on."""
    lines: list[tuple[str, str, str | None]] = []
    with log_records.logged(level) as records:
        yield lines
    lines += [
        (each["level"].name, each["message"], each["extra"].get("request_id")) for each in records
    ]


def about(lines: list[tuple[str, str, str | None]], request_id: str) -> list[str]:
    return [f"{level} {text}" for level, text, of in lines if of == request_id]


def without_a_request(lines: list[tuple[str, str, str | None]]) -> list[str]:
    return [f"{level} {text}" for level, text, of in lines if of is None]


async def test_each_step_of_a_request_has_a_line_at_debug(autojump_clock: MockClock) -> None:
    """One that loses its engine on the way, and then its slot to an urgent one."""
    with logged("DEBUG") as lines:
        async with running_worker(ONE_SLOT) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: rig.ask(
                    prompt="a b c", max_tokens=50, request_id="one", priority="low", stream=True
                )
            )
            await trio.sleep(0.3)
            rig.engine.crash()
            await trio.sleep(0.7)
            await rig.ask(prompt="now", max_tokens=3, request_id="two", priority="high")
    story = [re.sub(r"\d+ ms", "N ms", line) for line in about(lines, "one")]
    assert story == [
        "DEBUG Request admitted: model smollm2-135m-instruct, priority 2, depth 1",
        "DEBUG Request queued: 3 prompt tokens, up to 50 more",
        "DEBUG First token after N ms",
        "DEBUG Resumes after 14 tokens",
        "DEBUG Preempted for priority with 24 tokens",
        "DEBUG Resumes after 24 tokens",
        "DEBUG Request ended: ok at stage decode after N ms with 50 tokens",
    ]
    others = without_a_request(lines)
    assert [line for line in others if line.split()[1] in {"Batch", "Batcher", "Engine"}] == [
        "DEBUG Batcher loop started",
        "DEBUG Batch takes one (size): 1 running, 0 queued",
        "WARNING Engine lost (crash: the simulated engine was lost in a turn) with one aboard",
        "DEBUG Batch takes two (running): 1 running, 1 queued",
        "DEBUG Batch completed two: 0 running",
        "DEBUG Batch takes one (size): 1 running, 0 queued",
        "DEBUG Batch completed one: 0 running",
        "DEBUG Batcher loop stopped",
    ]


@pytest.mark.parametrize(
    ("fields", "end"),
    [({}, "depth 1"), ({"caller": "a"}, "depth 1, caller a"), ({"user": "b"}, "depth 1, caller b")],
)
async def test_who_asks_stands_where_the_request_begins(
    autojump_clock: MockClock, fields: dict[str, object], end: str
) -> None:
    with logged("DEBUG") as lines:
        async with running_worker() as rig:
            await rig.ask(prompt="x", max_tokens=1, request_id="one", **fields)
    assert about(lines, "one")[0] == (
        f"DEBUG Request admitted: model smollm2-135m-instruct, priority 0, {end}"
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"prompt": "broken", "max_tokens": 5},
            (
                "ERROR Request ended: ENGINE_FAILED at stage prefill after 20 ms with 0 tokens: "
                "a word that cannot be computed"
            ),
        ),
        (
            {"prompt": "x", "max_tokens": 50, "timeout_ms": 100},
            (
                "INFO Request ended: REQUEST_TIMEOUT at stage decode after 100 ms with 4 tokens: "
                "the deadline of 0.1 s passed at stage decode"
            ),
        ),
        (
            {"prompt": "x", "temperature": 3},
            "DEBUG Request refused: INVALID_REQUEST: temperature: Expected `float` <= 2.0",
        ),
    ],
)
async def test_a_request_that_fails_says_why(
    autojump_clock: MockClock, fields: dict[str, object], line: str
) -> None:
    faults = Faults(failing_words=frozenset({"broken"}))
    with logged("DEBUG") as lines:
        async with running_worker(faults=faults) as rig:
            await rig.ask(request_id="one", **fields)
    assert about(lines, "one")[-1] == line


async def test_a_sequence_that_fails_leaves_the_batch_like_any_other(
    autojump_clock: MockClock,
) -> None:
    with logged("DEBUG") as lines:
        async with running_worker(faults=Faults(failing_words=frozenset({"broken"}))) as rig:
            await rig.ask(request_id="one", prompt="broken", max_tokens=5)
    assert "DEBUG Batch completed one: 0 running" in without_a_request(lines)


async def test_a_cancelled_request_says_so(autojump_clock: MockClock) -> None:
    with logged("DEBUG") as lines:
        async with running_worker() as rig, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=500, request_id="one"))
            await trio.sleep(1)
            rig.caller.publish(Message(subject=subject_of("one"), body=b"cancel"))
    assert about(lines, "one")[-1].endswith(" tokens: the request was cancelled")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("level", ["TRACE", "DEBUG"])
async def test_prompts_and_answers_are_logged_at_trace_and_at_no_other_level(
    autojump_clock: MockClock, level: str, stream: object
) -> None:
    with logged(level) as lines:
        async with running_worker() as rig:
            await rig.ask(prompt="plain secret", max_tokens=2, request_id="one", stream=stream)
            answer = await rig.ask(
                messages=[{"role": "user", "content": "whispered secret"}],
                max_tokens=3,
                request_id="two",
                stream=stream,
            )
    text = "\n".join(text for _, text, _ in lines)
    if level == "TRACE":
        assert about(lines, "one").count("TRACE Prompt: 'plain secret'") == 1
        (prompt,) = (line for line in about(lines, "two") if line.startswith("TRACE Prompt: "))
        assert "whispered secret" in prompt
        assert about(lines, "two")[-1] == f"TRACE Answer: {answer.text!r}"
    else:
        assert "secret" not in text
        assert answer.text.split()[0] not in text


async def test_who_comes_back_after_an_urgent_request_says_so(autojump_clock: MockClock) -> None:
    with logged("DEBUG") as lines:
        async with running_worker(ONE_SLOT) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: rig.ask(prompt="x", max_tokens=50, request_id="one", priority="low")
            )
            await trio.sleep(0.3)
            await rig.ask(prompt="now", max_tokens=3, priority="high")
    told = [line for line in about(lines, "one") if "tokens" in line][1:3]
    assert [line.partition(" with ")[0].partition(" after ")[0] for line in told] == [
        "DEBUG Preempted for priority",
        "DEBUG Resumes",
    ]


async def test_an_engine_lost_with_nobody_aboard_says_so(autojump_clock: MockClock) -> None:
    with logged("WARNING") as lines:
        async with (
            running_worker(
                "worker.simulated.turn_ms=1000", "worker.simulated.prefill_ms_per_token=0"
            ) as rig,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=500, request_id="one"))
            await trio.sleep(4.3)
            rig.caller.publish(Message(subject=subject_of("one"), body=b"cancel"))
            await trio.sleep(0.3)
            rig.engine.crash()
            await trio.sleep(5)
    assert [text for _, text, _ in lines if text.startswith("Engine lost")] == [
        "Engine lost (crash: the simulated engine was lost in a turn) with nobody aboard"
    ]


async def test_each_step_of_degradation_says_when_it_begins_and_ends(
    autojump_clock: MockClock,
) -> None:
    mb = 2**20
    with logged("INFO") as lines:
        async with running_worker("worker.resource_limits.check_interval_ms=100") as rig:
            for used in (8200, 8800, 8800, 8200, 100):
                rig.probe.used = used * mb
                await trio.sleep(1)
                await rig.ask(prompt="x", max_tokens=2)
    assert [line for line in without_a_request(lines) if "Degradation" in line] == [
        "WARNING Degradation begins: trim_caches",
        "WARNING Degradation begins: hold_low",
        "INFO Degradation ends: hold_low",
        "INFO Degradation ends: trim_caches",
    ]
