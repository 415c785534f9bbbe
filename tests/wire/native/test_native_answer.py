"""The bodies of an answer, to the byte: what they hold is OpenAI's."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from support.whole_choices import whole_choice

from trio_worker.protocol.prompt import CallArguments, CallBegun, Piece, Reasoning
from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob
from trio_worker.wire import native

USAGE = native.Usage.of(prompt=3, completion=4, cached=2, reasoning=1)
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
    '"prompt_tokens_details":{"cached_tokens":2},'
    '"completion_tokens_details":{"reasoning_tokens":1}},'
    '"worker":{"id":"w1","request_id":"r","seed":1,"queue_ms":0.5,"prefill_ms":1.0,'
    '"decode_ms":2.0,"priority":"high","resumed":5,"degraded":["cap_tokens"]}'
)
CALLED = FinishReason.TOOL_CALLS
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
            writer.whole([whole_choice(["hi", " ho"])], USAGE, NOTE),
            writer_of(chat=chat).whole(
                [whole_choice(["hi"], [LOGPROB])], USAGE, NOTE, with_logprobs=True
            ),
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
    whole = writer_of(chat=False).whole(
        [whole_choice(texts, logprobs)], USAGE, NOTE, with_logprobs=True
    )
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


# --- reasoning and calls --------------------------------------------------------------------

THOUGHT = Reasoning(text="hm")
BEGUN, REST = CallBegun(index=0, name="f"), CallArguments(index=0, text='{"a":')
SECOND = CallBegun(index=1, name="g", id="own-1")


def choice_in(body: bytes) -> Any:
    (choice,) = msgspec.json.decode(body)["choices"]
    return choice


def delta_of(text: str, *beside: Piece, choice: int = 0) -> Any:
    writer = native.AnswerWriter(
        request_id=RequestId("r"), model="m", created=5, chat=True, choices=2
    )
    written = choice_in(writer.chunk(text, (), beside, choice=choice))
    assert (written["index"], written["logprobs"], written["finish_reason"]) == (choice, None, None)
    return written["delta"]


def test_one_delta_carries_all_that_one_token_adds() -> None:
    assert delta_of("", THOUGHT, Reasoning(text=" hm")) == {"reasoning_content": "hm hm"}
    assert delta_of("hi", THOUGHT) == {"content": "hi", "reasoning_content": "hm"}
    assert delta_of("", REST, CallArguments(index=0, text="1}")) == {
        "tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]
    }


def test_the_first_part_of_a_call_names_it_and_each_call_has_one_entry_in_a_delta() -> None:
    """Clients put the entries of a chunk where their indices say, and take two of one for two."""
    (begun,) = delta_of("", BEGUN)["tool_calls"]
    assert begun.pop("id").startswith("call_")
    assert begun == {"index": 0, "type": "function", "function": {"name": "f", "arguments": ""}}
    (first, second) = delta_of("", REST, SECOND, CallArguments(index=1, text="{"))["tool_calls"]
    assert first == {"index": 0, "function": {"arguments": '{"a":'}}
    assert second == {
        "index": 1,
        "id": "own-1",
        "type": "function",
        "function": {"name": "g", "arguments": "{"},
    }


def test_the_id_of_a_call_is_the_models_or_follows_from_where_it_is() -> None:
    def id_of(piece: CallBegun, request_id: str = "r", choice: int = 0) -> str:
        writer = native.AnswerWriter(
            request_id=RequestId(request_id), model="m", created=5, chat=True, choices=2
        )
        body = writer.chunk("", (), (piece,), choice=choice)
        return str(choice_in(body)["delta"]["tool_calls"][0]["id"])

    ids = [
        id_of(BEGUN),
        id_of(BEGUN, "s"),
        id_of(BEGUN, choice=1),
        id_of(CallBegun(index=1, name="f")),
    ]
    assert len(set(ids)) == 4
    assert all(re.fullmatch("call_[0-9a-f]{24}", each) for each in ids)
    assert id_of(CallBegun(index=0, name="other")) == ids[0], "asked again, it is the same"
    assert id_of(SECOND) == "own-1"


def test_a_whole_message_has_what_its_chunks_have_said() -> None:
    end = CallArguments(index=0, text="1}")
    beside: list[Piece] = [THOUGHT, BEGUN, REST, end, Reasoning(text="!"), SECOND]
    writer = writer_of(chat=True)
    message = choice_in(
        writer.whole([whole_choice(["", ""], finish=CALLED, beside=beside)], USAGE, NOTE)
    )
    assert message["finish_reason"] == "tool_calls"
    calls = message["message"].pop("tool_calls")
    assert message["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "hm!",
    }
    (begun,) = choice_in(writer.chunk("", (), (BEGUN,)))["delta"]["tool_calls"]
    assert calls == [
        {
            "id": begun["id"],
            "type": "function",
            "function": {"name": "f", "arguments": '{"a":1}'},
        },
        {"id": "own-1", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]


@pytest.mark.parametrize(
    ("texts", "beside", "content"),
    [([""], [], ""), ([""], [THOUGHT], ""), ([""], [BEGUN], None), (["hi"], [BEGUN], "hi")],
)
def test_content_is_null_where_there_are_calls_in_its_place(
    texts: list[str], beside: list[Piece], content: str | None
) -> None:
    whole = whole_choice(texts, [LOGPROB], beside=beside)
    body = writer_of(chat=True).whole([whole], USAGE, NOTE, with_logprobs=True)
    written = choice_in(body)
    assert written["message"]["content"] == content
    assert (written["logprobs"] is None) == (content is None)


# --- several choices ------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_each_choice_is_told_by_its_index(*, chat: bool) -> None:
    writer = native.AnswerWriter(
        request_id=RequestId("r"), model="m", created=5, chat=chat, choices=3
    )
    for choice in range(3):
        for body in (
            writer.opening(choice),
            writer.keep_alive(choice),
            writer.chunk("hi", choice=choice),
            writer.chunk("hi", (LOGPROB,), choice=choice),
            writer.ending(FinishReason.STOP, choice=choice),
        ):
            assert choice_in(body)["index"] == choice
    whole = writer.whole([whole_choice(["a"]), whole_choice(["b"])], USAGE, NOTE)
    told = msgspec.json.decode(whole)["choices"]
    texts = [each["message"]["content"] if chat else each["text"] for each in told]
    assert ([each["index"] for each in told], texts) == ([0, 1], ["a", "b"])


def test_the_places_of_tokens_are_counted_in_each_choice_by_itself() -> None:
    writer = native.AnswerWriter(
        request_id=RequestId("r"), model="m", created=5, chat=False, choices=2
    )
    said = [(0, "abc"), (1, "d"), (0, "e"), (1, "f")]
    offsets = [
        logprobs_in(writer.chunk(text, (LOGPROB,), choice=choice))["text_offset"]
        for choice, text in said
    ]
    assert offsets == [[0], [0], [3], [1]]


@pytest.mark.parametrize("chat", [True, False])
def test_a_summary_has_the_usage_and_no_choice(*, chat: bool) -> None:
    body = msgspec.json.decode(writer_of(chat=chat).summary(USAGE, NOTE))
    assert body["choices"] == []
    assert body["object"] == ("chat.completion.chunk" if chat else "text_completion")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    assert body["worker"]["request_id"] == "r"


@pytest.mark.parametrize("chat", [True, False])
def test_only_a_sign_of_life_is_silent(*, chat: bool) -> None:
    writer = writer_of(chat=chat)
    assert all(map(native.is_silent, (writer.opening(), writer.keep_alive())))
    said = [
        writer.chunk("hi"),
        writer.chunk('"delta":{},"logprobs":null,"finish_reason":null'),
        writer.chunk("", (LOGPROB,)),
        writer.ending(FinishReason.STOP),
        writer.summary(USAGE, NOTE),
    ]
    if chat:
        said += [writer.chunk("", (), (each,)) for each in (THOUGHT, BEGUN, REST)]
    assert not any(map(native.is_silent, said))
