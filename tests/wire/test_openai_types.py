"""What a worker says is what OpenAI's own client takes for an answer, and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel, ValidationError
from support.whole_choices import whole_choice
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker.protocol.prompt import CallArguments, CallBegun, Piece, Reasoning
from trio_worker.protocol.turn import FinishReason, RequestId
from trio_worker.wire import native

Answer: TypeAlias = ChatCompletion | ChatCompletionChunk | Completion

OURS = ["worker"]
"""The one field that OpenAI's answers have not."""
TYPES: dict[str, type[Answer]] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
}


def read_strictly(body: dict[str, Any]) -> Answer:
    """As OpenAI's client would read it if it checked; raises `ValidationError`."""
    kind = body["object"]
    if kind == "text_completion":
        # A chunk has the type of the whole there, which has ended.
        choices = [
            {**each, "finish_reason": each["finish_reason"] or "stop"} for each in body["choices"]
        ]
        body = {**body, "choices": choices}
    return TYPES[kind].model_validate_json(msgspec.json.encode(body), strict=True)


def stray_fields(value: object, path: str = "") -> Iterator[str]:
    """The fields that no type knows, by their paths."""
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name}".lstrip(".") for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from stray_fields(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from stray_fields(each, f"{path}[{index}]")


ASKED = [
    {"prompt": "x y"},
    {"prompt": "x y", "logprobs": True},
    {"prompt": "x y", "logprobs": 0},
    {"prompt": "x y", "logprobs": 3},
    {"messages": [{"role": "user", "content": "x y"}]},
    {"messages": [{"role": "user", "content": "x y"}], "logprobs": True},
    {"messages": [{"role": "user", "content": "x y"}], "logprobs": True, "top_logprobs": 3},
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", ASKED)
async def test_every_message_of_an_answer_is_of_openais_types(
    autojump_clock: MockClock, *, asked: dict[str, Any], stream: bool
) -> None:
    # Slow enough for keep-alive chunks.
    async with running_worker("worker.simulated.turn_ms=6000") as rig:
        first = await rig.ask(**asked, max_tokens=3, seed=1, stream=stream, timeout_ms=600_000)
        word = first.text.split()[1]
        second = await rig.ask(
            **asked, max_tokens=3, seed=1, stop=word, stream=stream, timeout_ms=600_000
        )
    for reply, finish in ((first, "length"), (second, "stop")):
        *parts, last = read = [read_strictly(dict(chunk.body)) for chunk in reply.chunks]
        assert [list(stray_fields(each)) for each in parts] == [[]] * len(parts)
        assert list(stray_fields(last)) == OURS
        assert bool(parts) == stream
        told: list[Any] = [each.choices[0].logprobs for each in read]
        assert any(told) == ("logprobs" in asked)
        assert last.usage is not None
        assert last.usage.prompt_tokens == 2
        assert last.choices[0].finish_reason == finish


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", [ASKED[0], ASKED[3], ASKED[4], ASKED[6]])
async def test_every_message_of_several_choices_is_of_openais_types(
    autojump_clock: MockClock, *, asked: dict[str, Any], stream: bool
) -> None:
    async with running_worker() as rig:
        reply = await rig.ask(**asked, n=3, max_tokens=2, seed=1, stream=stream)
    *parts, last = read = [read_strictly(dict(chunk.body)) for chunk in reply.chunks]
    assert [list(stray_fields(each)) for each in parts] == [[]] * len(parts)
    assert list(stray_fields(last)) == OURS
    assert {choice.index for each in read for choice in each.choices} == {0, 1, 2}
    assert (len(last.choices), bool(parts)) == ((0, True) if stream else (3, False))


USAGE = native.Usage.of(prompt=3, completion=4, cached=2, reasoning=1)
NOTE = native.WorkerNote(
    id="w1",
    request_id="r",
    seed=1,
    queue_ms=0.5,
    prefill_ms=1.0,
    decode_ms=2.0,
    priority="high",
    resumed=0,
    degraded=(),
)
TURNS: list[list[Piece]] = [
    [Reasoning(text="hm")],
    [CallBegun(index=0, name="f"), CallArguments(index=0, text='{"a":')],
    [CallArguments(index=0, text="1"), CallArguments(index=0, text="}")],
    [CallBegun(index=1, name="g")],
    [CallArguments(index=1, text="{}")],
]


def calling() -> Iterator[dict[str, Any]]:
    """What a stream says of reasoning and calls, and what the whole answer does."""
    writer = native.AnswerWriter(request_id=RequestId("r"), model="m", created=5, chat=True)
    beside = [piece for turn in TURNS for piece in turn]
    whole = whole_choice([""], finish=FinishReason.TOOL_CALLS, beside=beside)
    bodies = [
        writer.opening(),
        *(writer.chunk("", (), turn) for turn in TURNS),
        writer.ending(FinishReason.TOOL_CALLS),
        writer.summary(USAGE, NOTE),
        writer.whole([whole], USAGE, NOTE),
    ]
    yield from map(msgspec.json.decode, bodies)


def test_calls_are_of_openais_types_and_reasoning_is_beside_them() -> None:
    read = list(map(read_strictly, calling()))
    strays = {each.rpartition(".")[2] for body in read for each in stray_fields(body)}
    assert strays == {"worker", "reasoning_content"}
    called = read[-1].choices[0]
    assert isinstance(called, Choice)
    assert [each.type for each in called.message.tool_calls or ()] == ["function", "function"]


def test_openais_client_puts_the_parts_together_to_the_whole() -> None:
    *chunks, whole = calling()
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    (choice,) = state.get_final_completion().choices
    expected = whole["choices"][0]["message"]
    told = [
        (call.id, call.type, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls or ()
    ]
    assert told == [
        (call["id"], call["type"], *call["function"].values()) for call in expected["tool_calls"]
    ]
    assert choice.message.to_dict()["reasoning_content"] == expected["reasoning_content"] == "hm"
    assert choice.finish_reason == "tool_calls"


def a_chat() -> dict[str, Any]:
    message = {"role": "assistant", "content": "hi", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-r",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [choice],
    }


def test_a_field_that_is_not_openais_is_found_wherever_it_is() -> None:
    body = a_chat()
    assert list(stray_fields(read_strictly(body))) == []
    body["more"] = 1
    body["choices"][0]["more"] = 1
    body["choices"][0]["message"]["more"] = None
    found = list(stray_fields(read_strictly(body)))
    assert found == ["more", "choices[0].more", "choices[0].message.more"]


@pytest.mark.parametrize(
    ("name", "value"), [("created", "5"), ("created", 5.5), ("id", None), ("model", 1)]
)
def test_a_field_of_another_type_is_not_taken(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        read_strictly({**a_chat(), name: value})
