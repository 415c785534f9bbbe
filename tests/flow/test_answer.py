"""One caller's answer: tokens are put in by one task while another waits for the end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from support.factories import make_request, make_sequence
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_worker.core.sequence import Ending, Sequence
from trio_worker.errors import EngineFailed, PayloadTooLarge
from trio_worker.flow.answer import KEEP_ALIVE_S, Answer
from trio_worker.protocol.turn import FinishReason, Output, RequestId, SequenceFailure
from trio_worker.wire.native import AnswerWriter

R = RequestId("r")


class Reply:
    """What a reply stream is asked to send."""

    def __init__(self, *, too_large: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.backlogged = False
        self._too_large = too_large

    def send(self, body: bytes) -> None:
        if self._too_large and b"long" in body:
            raise PayloadTooLarge("it does not fit")
        self.bodies.append(body)

    def texts(self) -> list[str]:
        return [msgspec.json.decode(each)["choices"][0]["text"] for each in self.bodies]


def open_answer(*, stream: bool = True, **reply: Any) -> tuple[Answer, Reply, Sequence]:
    sequence = make_sequence()
    sequence.request = make_request(stream=stream)
    sent = Reply(**reply)
    writer = AnswerWriter(request_id=R, model="m", created=0, chat=False)
    answer = Answer(sequence, sent, writer, worker_id="w1", priority="normal")  # type: ignore[arg-type]
    return answer, sent, sequence


def output(text: str, finish: FinishReason | None = None) -> Output:
    return Output(request_id=R, token=1, text=text, finish=finish)


async def test_a_token_is_a_message_when_it_has_been_taken_and_the_last_one_ends_the_wait() -> None:
    answer, sent, _ = open_answer()
    answer.take(output("one "))
    assert sent.texts() == ["one "]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer.wait_end)
        await wait_all_tasks_blocked()
        answer.take(output("two", FinishReason.LENGTH))
        assert sent.texts() == ["one ", "two"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sequence_that_failed_is_told_to_who_waits(*, stream: bool) -> None:
    answer, _, _ = open_answer(stream=stream)
    answer.take(SequenceFailure(request_id=R, message="NaN"))
    with pytest.raises(EngineFailed, match="NaN"):
        await answer.wait_end()


async def test_what_cannot_be_sent_is_told_to_who_waits_and_not_to_who_puts_it_in() -> None:
    answer, sent, _ = open_answer(too_large=True)
    answer.take(output("long"))
    answer.take(output("after it"))
    answer.take(output("the end", FinishReason.STOP))
    assert sent.bodies == [], "a gap in the text would go unnoticed"
    with pytest.raises(PayloadTooLarge):
        await answer.wait_end()


async def test_a_caller_who_takes_nothing_is_given_up() -> None:
    answer, sent, sequence = open_answer()
    sent.backlogged = True
    answer.take(output("one"))
    assert sequence.ending is Ending.BACKLOG


async def test_each_token_moves_the_next_keep_alive_on(autojump_clock: MockClock) -> None:
    answer, sent, _ = open_answer()

    async def tokens() -> None:
        for _ in range(3):
            await trio.sleep(KEEP_ALIVE_S - 1)
            answer.take(output("token"))
        await trio.sleep(2.5 * KEEP_ALIVE_S)
        answer.take(output("", FinishReason.STOP))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tokens)
        await answer.wait_end()
    assert sent.texts() == ["token"] * 3 + ["", ""]
