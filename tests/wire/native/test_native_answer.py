"""The bodies of an answer, to the byte: what they hold is OpenAI's."""

from __future__ import annotations

from typing import Any

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
OF_A_MESSAGE = (
    '{"content":[{"token":"hi","logprob":-0.5,"bytes":[104,105],"top_logprobs":'
    '[{"token":"hi","logprob":-0.5,"bytes":[104,105]},'
    '{"token":"ho","logprob":-1.5,"bytes":[104,111]}]}],"refusal":null}'
)
OF_A_TEXT = (
    '{"tokens":["hi"],"token_logprobs":[-0.5],'
    '"top_logprobs":[{"hi":-0.5,"ho":-1.5}],"text_offset":[0]}'
)


def writer_of(*, chat: bool, model: str = "m") -> native.AnswerWriter:
    return native.AnswerWriter(request_id=RequestId("r"), model=model, created=5, chat=chat)


def bodies(*, chat: bool) -> list[str]:
    writer = writer_of(chat=chat)
    return [
        body.decode()
        for body in (
            writer.opening(),
            writer.keep_alive(),
            writer.chunk("hi"),
            writer.chunk("hi", (LOGPROB,)),
            writer.closing(FinishReason.LENGTH, USAGE, NOTE),
            writer.whole(["hi", " ho"], None, FinishReason.STOP, USAGE, NOTE),
            writer_of(chat=chat).whole(["hi"], [LOGPROB], FinishReason.STOP, USAGE, NOTE),
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
        message = f'{{"role":"assistant","content":"{text}","refusal":null}}'
        choice = f'"message":{message},"logprobs":{logprobs},"finish_reason":"stop"'
        return body_of("chat.completion", "chatcmpl", choice, tail=TAIL)

    assert bodies(chat=True) == [
        chunk('{"role":"assistant"}'),
        chunk("{}"),
        chunk('{"content":"hi"}'),
        chunk('{"content":"hi"}', OF_A_MESSAGE),
        chunk("{}", finish='"length"', tail=TAIL),
        whole("hi ho", "null"),
        whole("hi", OF_A_MESSAGE),
    ]


def test_an_answer_to_a_prompt_looks_as_openais() -> None:
    def part(text: str, logprobs: str = "null", finish: str = "null", tail: str = "") -> str:
        choice = f'"text":"{text}","logprobs":{logprobs},"finish_reason":{finish}'
        return body_of("text_completion", "cmpl", choice, tail=tail)

    assert bodies(chat=False) == [
        part(""),
        part(""),
        part("hi"),
        part("hi", OF_A_TEXT),
        part("", finish='"length"', tail=TAIL),
        part("hi ho", finish='"stop"', tail=TAIL),
        part("hi", OF_A_TEXT, '"stop"', TAIL),
    ]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("model", ["m", 'a "quoted" one', "\\u0000", '"\0"'])
@pytest.mark.parametrize("text", ["", "hi", 'she said "no"\n', "\0", "\\u0000", "ÄÖ 🙂 \u2028"])
def test_whatever_the_text_a_chunk_is_as_one_without_but_for_it(
    *, chat: bool, model: str, text: str
) -> None:
    writer = writer_of(chat=chat, model=model)
    chunk = msgspec.json.decode(writer.chunk(text))
    expected = msgspec.json.decode(writer.chunk(text, (LOGPROB,)))
    expected["choices"][0]["logprobs"] = None
    assert chunk == expected
    assert chunk["model"] == model


def logprob(token: str, *top: tuple[str, float], value: float = -0.5) -> TokenLogprob:
    return TokenLogprob(token=token, logprob=value, top=top)


def logprobs_in(body: bytes) -> Any:
    return msgspec.json.decode(body)["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    ("token", "utf8"),
    [
        ("a", [97]),
        ("\u00e9", [0xC3, 0xA9]),
        (" \U0001f642", [32, 0xF0, 0x9F, 0x99, 0x82]),
        ("", []),
        ("\ufffd", None),
        ("a\ufffd", None),
    ],
)
def test_the_bytes_of_a_token_are_told_where_it_is_whole_characters(
    token: str, utf8: list[int] | None
) -> None:
    """A part of a character is shown as U+FFFD, whatever its bytes were."""
    told = logprobs_in(writer_of(chat=True).chunk("", (logprob("b", (token, -0.7)),)))["content"][0]
    assert (told["bytes"], told["top_logprobs"][0]["bytes"]) == ([98], utf8)
    told = logprobs_in(writer_of(chat=True).chunk("", (logprob(token),)))["content"][0]
    assert told["bytes"] == utf8


PARTS = [
    ("I ", logprob("I ")),
    ("", logprob("\ufffd")),
    ("\U0001f642", logprob("\ufffd")),
    ("", logprob(" E")),
    (" Ex", logprob("x")),
    ("", logprob("<|end|>")),
]
"""A character of two tokens, and one that was held back while a stop string might have begun."""
PLACES = [0, 2, 2, 3, 3, 6]


def test_each_token_of_a_text_has_the_number_of_characters_said_before_it() -> None:
    texts, logprobs = zip(*PARTS, strict=True)
    whole = writer_of(chat=False).whole(texts, logprobs, FinishReason.STOP, USAGE, NOTE)
    assert logprobs_in(whole) == {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [-0.5] * 6,
        "top_logprobs": None,
        "text_offset": PLACES,
    }


def test_the_chunks_of_a_text_say_together_what_the_whole_says() -> None:
    writer = writer_of(chat=False)
    chunks = [logprobs_in(writer.chunk(text, (of,))) for text, of in PARTS]
    assert [each["text_offset"] for each in chunks] == [[place] for place in PLACES]
    assert [each["tokens"] for each in chunks] == [[of.token] for _, of in PARTS]


def test_the_alternatives_of_a_text_are_named_by_it_with_the_token_that_was_chosen() -> None:
    """Two parts of characters look alike: then it is the likelier of them."""
    likely = logprob("z", ("a", -0.1), ("\ufffd", -0.2), ("\ufffd", -0.3), value=-4.0)
    told = logprobs_in(writer_of(chat=False).chunk("z", (likely,)))
    assert list(told["top_logprobs"][0].items()) == [("a", -0.1), ("\ufffd", -0.2), ("z", -4.0)]
