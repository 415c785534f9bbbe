"""The bodies of an answer, to the byte: what they hold is OpenAI's."""

from __future__ import annotations

import msgspec
import pytest

from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob
from trio_worker.wire import native

USAGE = native.Usage.of(prompt=3, completion=4, cached=2)
NOTE = native.WorkerNote(
    id="w1",
    request_id="r",
    seed=1,
    queue_ms=0.5,
    prefill_ms=1.0,
    decode_ms=2.0,
    priority="high",
    resumed=5,
    degraded=("cap_tokens",),
)
TAIL = (
    '"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,'
    '"prompt_tokens_details":{"cached_tokens":2}},'
    '"worker":{"id":"w1","request_id":"r","seed":1,"queue_ms":0.5,"prefill_ms":1.0,'
    '"decode_ms":2.0,"priority":"high","resumed":5,"degraded":["cap_tokens"]}'
)
LOGPROB = TokenLogprob(token="hi", logprob=-0.5, top=(("hi", -0.5), ("ho", -1.5)))
LOGPROB_JSON = (
    '{"content":[{"token":"hi","logprob":-0.5,"top_logprobs":'
    '[{"token":"hi","logprob":-0.5},{"token":"ho","logprob":-1.5}]}]}'
)


def bodies(*, chat: bool) -> list[str]:
    writer = native.AnswerWriter(request_id=RequestId("r"), model="m", created=5, chat=chat)
    return [
        body.decode()
        for body in (
            writer.opening(),
            writer.keep_alive(),
            writer.chunk("hi"),
            writer.chunk("hi", (LOGPROB,)),
            writer.closing(FinishReason.LENGTH, USAGE, NOTE),
            writer.whole("hi ho", None, FinishReason.STOP, USAGE, NOTE),
            writer.whole("hi", (LOGPROB,), FinishReason.STOP, USAGE, NOTE),
        )
    ]


def body_of(kind: str, id_: str, choice: str, *, tail: str = "") -> str:
    rest = f",{tail}" if tail else ""
    return (
        f'{{"id":"{id_}-r","object":"{kind}","created":5,"model":"m",'
        f'"choices":[{{"index":0,{choice}}}]{rest}}}'
    )


def test_an_answer_to_messages_looks_as_openais() -> None:
    def chunk(delta: str, logprobs: str = "null", finish: str = "null", tail: str = "") -> str:
        choice = f'"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}'
        return body_of("chat.completion.chunk", "chatcmpl", choice, tail=tail)

    def whole(text: str, logprobs: str) -> str:
        message = f'{{"role":"assistant","content":"{text}"}}'
        choice = f'"message":{message},"logprobs":{logprobs},"finish_reason":"stop"'
        return body_of("chat.completion", "chatcmpl", choice, tail=TAIL)

    assert bodies(chat=True) == [
        chunk('{"role":"assistant"}'),
        chunk("{}"),
        chunk('{"content":"hi"}'),
        chunk('{"content":"hi"}', LOGPROB_JSON),
        chunk("{}", finish='"length"', tail=TAIL),
        whole("hi ho", "null"),
        whole("hi", LOGPROB_JSON),
    ]


def test_an_answer_to_a_prompt_looks_as_openais() -> None:
    def part(text: str, logprobs: str = "null", finish: str = "null", tail: str = "") -> str:
        choice = f'"text":"{text}","logprobs":{logprobs},"finish_reason":{finish}'
        return body_of("text_completion", "cmpl", choice, tail=tail)

    assert bodies(chat=False) == [
        part(""),
        part(""),
        part("hi"),
        part("hi", LOGPROB_JSON),
        part("", finish='"length"', tail=TAIL),
        part("hi ho", finish='"stop"', tail=TAIL),
        part("hi", LOGPROB_JSON, '"stop"', TAIL),
    ]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("model", ["m", 'a "quoted" one', "\\u0000", '"\0"'])
@pytest.mark.parametrize("text", ["", "hi", 'she said "no"\n', "\0", "\\u0000", "ÄÖ 🙂 \u2028"])
def test_whatever_the_text_a_chunk_is_as_one_without_but_for_it(
    *, chat: bool, model: str, text: str
) -> None:
    writer = native.AnswerWriter(request_id=RequestId("r"), model=model, created=5, chat=chat)
    chunk = msgspec.json.decode(writer.chunk(text))
    expected = msgspec.json.decode(writer.chunk(text, ()))
    expected["choices"][0]["logprobs"] = None
    assert chunk == expected
    assert chunk["model"] == model
