"""What a worker says is what OpenAI's own client takes for an answer, and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ValidationError
from support.worker_rig import running_worker
from trio.testing import MockClock

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
    (choice,) = body["choices"]
    if kind == "text_completion" and choice["finish_reason"] is None:
        # A chunk has the type of the whole there, which has ended.
        body = {**body, "choices": [{**choice, "finish_reason": "stop"}]}
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
