"""One caller's answer: tokens are put in by one task while another waits for the end."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
import trio
from support.factories import Scope, make_request
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_worker.core.sequence import Ending, Sequence, sequences_of
from trio_worker.errors import EngineFailed, InvalidRequest, PayloadTooLarge
from trio_worker.flow.answer import KEEP_ALIVE_S, Answer
from trio_worker.protocol.prompt import CallArguments, CallBegun, Reasoning
from trio_worker.protocol.turn import FinishReason, Output, RequestId, Sampling, SequenceFailure
from trio_worker.wire.native import AnswerWriter

R = RequestId("r")


class Reply:
    """What a reply stream is asked to send."""

    def __init__(self, *, too_large: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.last: bytes | None = None
        self.backlogged = False
        self._too_large = too_large

    def send(self, body: bytes) -> None:
        assert self.last is None
        if self._too_large and b"long" in body:
            raise PayloadTooLarge("it does not fit")
        self.bodies.append(body)

    def finish(self, body: bytes) -> None:
        assert self.last is None
        self.last = body

    def texts(self) -> list[str]:
        return [each["text"] for each in self.choices()]

    def choices(self) -> list[Any]:
        """Of each message that is not the last."""
        return [choice for each in self.bodies for choice in msgspec.json.decode(each)["choices"]]


def open_answer(
    *, stream: bool = True, chat: bool = False, too_large: bool = False, **request: Any
) -> tuple[Answer, Reply, Sequence]:
    sequence = sequences_of(
        make_request(stream=stream, **request),
        subject="inference",
        reply_subject="_INBOX.x",
        arrivals=itertools.count(),
        arrived_at=0.0,
        aging_s=None,
        scope=Scope(),
    )
    for row in sequence.rows:
        row.prompt = (1, 2, 3)
        row.batched_at = row.first_token_at = row.last_token_at = 0.0
    sent = Reply(too_large=too_large)
    choices = len(sequence.rows)
    writer = AnswerWriter(request_id=R, model="m", created=0, chat=chat, choices=choices)
    answer = Answer(sequence, sent, writer, worker_id="w1", priority="normal")  # type: ignore[arg-type]
    return answer, sent, sequence


def output(text: str, finish: FinishReason | None = None, **more: Any) -> Output:
    return Output(request_id=R, token=1, text=text, finish=finish, **more)


async def test_a_token_is_a_message_when_it_has_been_taken_and_the_last_one_ends_the_wait() -> None:
    answer, sent, _ = open_answer()
    answer.choices[0].take(output("one "))
    assert sent.texts() == ["one "]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer.wait_end)
        await wait_all_tasks_blocked()
        answer.choices[0].take(output("two", FinishReason.LENGTH))
        assert sent.texts() == ["one ", "two"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sequence_that_failed_is_told_to_who_waits(*, stream: bool) -> None:
    answer, _, _ = open_answer(stream=stream)
    answer.choices[0].take(SequenceFailure(request_id=R, message="NaN"))
    with pytest.raises(EngineFailed, match="NaN"):
        await answer.wait_end()


async def test_one_that_failed_for_what_was_asked_for_is_the_askers_fault() -> None:
    answer, _, _ = open_answer(stream=True)
    failure = SequenceFailure(request_id=R, message="it is too complex", is_askers_fault=True)
    answer.choices[0].take(failure)
    with pytest.raises(InvalidRequest, match="too complex"):
        await answer.wait_end()


async def test_what_cannot_be_sent_is_told_to_who_waits_and_not_to_who_puts_it_in() -> None:
    answer, sent, _ = open_answer(too_large=True)
    answer.choices[0].take(output("long"))
    answer.choices[0].take(output("after it"))
    answer.choices[0].take(output("the end", FinishReason.STOP))
    assert sent.bodies == [], "a gap in the text would go unnoticed"
    with pytest.raises(PayloadTooLarge):
        await answer.wait_end()


async def test_a_caller_who_takes_nothing_is_given_up() -> None:
    answer, sent, sequence = open_answer()
    sent.backlogged = True
    answer.choices[0].take(output("one"))
    assert sequence.ending is Ending.BACKLOG


async def test_each_token_moves_the_next_keep_alive_on(autojump_clock: MockClock) -> None:
    answer, sent, _ = open_answer()

    async def tokens() -> None:
        for _ in range(3):
            await trio.sleep(KEEP_ALIVE_S - 1)
            answer.choices[0].take(output("token"))
        await trio.sleep(2.5 * KEEP_ALIVE_S)
        answer.choices[0].take(output("", FinishReason.STOP))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tokens)
        await answer.wait_end()
    assert sent.texts() == ["token"] * 3 + ["", ""]


THINKING = output("", beside=(Reasoning(text="hm"),), is_reasoning=True)
CALLING = [
    output("", beside=(CallBegun(index=0, name="f"), CallArguments(index=0, text="{"))),
    output("", FinishReason.TOOL_CALLS, beside=(CallArguments(index=0, text="}"),)),
]


def hand_out(answer: Answer, sequence: Sequence, outputs: list[Output]) -> None:
    for each in outputs:
        sequence.produced.append(each.token)
        answer.choices[sequence.choice].take(each)


async def test_reasoning_and_calls_are_streamed_as_they_come_and_count_as_what_they_are() -> None:
    answer, sent, sequence = open_answer(chat=True)
    hand_out(answer, sequence, [THINKING, THINKING, output("so"), *CALLING])
    await answer.wait_end()
    answer.close()
    deltas = [each["delta"] for each in sent.choices()]
    assert [[*each] for each in deltas] == [
        *(["reasoning_content"], ["reasoning_content"], ["content"]),
        *(["tool_calls"], ["tool_calls"]),
    ]
    assert sent.last is not None
    last = msgspec.json.decode(sent.last)
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["usage"]["completion_tokens"] == 5
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_a_whole_answer_has_its_reasoning_and_calls_beside_the_text() -> None:
    answer, sent, sequence = open_answer(chat=True, stream=False)
    hand_out(answer, sequence, [THINKING, output("so"), *CALLING])
    assert answer.text == "so", "a deadline shows the content alone"
    await answer.wait_end()
    answer.close()
    assert (sent.bodies, answer.failure) == ([], None)
    assert sent.last is not None
    message = msgspec.json.decode(sent.last)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("so", "hm")
    assert [each["function"] for each in message["tool_calls"]] == [
        {"name": "f", "arguments": "{}"}
    ]


@pytest.mark.parametrize("include_usage", [True, False])
async def test_the_usage_has_a_message_of_its_own_where_it_is_asked_for(
    *, include_usage: bool
) -> None:
    answer, sent, sequence = open_answer(include_usage=include_usage)
    hand_out(answer, sequence, [output("one"), output("", FinishReason.STOP)])
    answer.close()
    assert sent.last is not None
    last = msgspec.json.decode(sent.last)
    assert last["usage"]["total_tokens"] == 5
    finishes = [each["finish_reason"] for each in sent.choices()]
    if include_usage:
        assert (finishes, last["choices"]) == ([None, "stop"], [])
    else:
        assert finishes == [None]
        assert last["choices"][0]["finish_reason"] == "stop"


async def test_the_answer_ends_with_its_last_choice_and_each_says_by_itself_that_it_has(
    autojump_clock: MockClock,
) -> None:
    answer, sent, sequence = open_answer(choices=3)
    first, second, third = sequence.rows
    answer.open()
    hand_out(answer, second, [output("b"), output("", FinishReason.STOP)])
    hand_out(answer, first, [output("a", FinishReason.LENGTH)])
    with trio.move_on_after(KEEP_ALIVE_S + 1):
        await answer.wait_end()
        pytest.fail("one of them goes on")
    hand_out(answer, third, [output("c", FinishReason.STOP)])
    await answer.wait_end()
    answer.close()
    told = [(each["index"], each["text"], each["finish_reason"]) for each in sent.choices()]
    assert told == [
        *((0, "", None), (1, "", None), (2, "", None)),
        *((1, "b", None), (1, "", "stop")),
        *((0, "a", None), (0, "", "length")),
        (2, "", None),  # a sign of life, of the one that lives
        *((2, "c", None), (2, "", "stop")),
    ]
    assert sent.last is not None
    last = msgspec.json.decode(sent.last)
    assert last["choices"] == []
    usage = last["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 4, 7)


async def test_whole_choices_are_in_their_order_whichever_ends_first() -> None:
    answer, sent, sequence = open_answer(stream=False, choices=2)
    first, second = sequence.rows
    hand_out(answer, second, [output("b", FinishReason.STOP)])
    hand_out(answer, first, [output("a", FinishReason.LENGTH)])
    await answer.wait_end()
    answer.close()
    assert sent.last is not None
    told = msgspec.json.decode(sent.last)["choices"]
    assert [(each["index"], each["text"], each["finish_reason"]) for each in told] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]


async def test_a_choice_that_fails_fails_the_answer_and_the_others_say_no_more() -> None:
    answer, sent, sequence = open_answer(choices=2)
    hand_out(answer, sequence, [output("a")])
    answer.choices[1].take(SequenceFailure(request_id=R, message="NaN"))
    hand_out(answer, sequence, [output("b", FinishReason.STOP)])
    assert sent.texts() == ["a"]
    with pytest.raises(EngineFailed, match="NaN"):
        await answer.wait_end()


async def test_what_the_note_says_of_several_choices_is_of_the_request() -> None:
    answer, sent, sequence = open_answer(stream=False, choices=2, sampling=Sampling(seed=7))
    first, second = sequence.rows
    first.batched_at, first.first_token_at, first.last_token_at = 1.0, 3.0, 4.0
    second.batched_at, second.first_token_at, second.last_token_at = 2.0, 2.5, 9.0
    first.degraded, second.degraded = ["general_tool_prompt", "cap_tokens"], ["cap_tokens"]
    first.resumed, second.resumed = 1, 2
    for row in sequence.rows:
        hand_out(answer, row, [output("x", FinishReason.STOP)])
    answer.close()
    assert sent.last is not None
    assert msgspec.json.decode(sent.last)["worker"] == {
        "id": "w1",
        "request_id": "r",
        "seed": 7,
        "queue_ms": 1000.0,
        "prefill_ms": 1500.0,
        "decode_ms": 6500.0,
        "priority": "normal",
        "resumed": 2,
        "degraded": ["general_tool_prompt", "cap_tokens"],
    }
