"""OpenAI's own client before a whole worker, whose simulated engine keeps to what is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import openai
import pytest
import trio
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel, Field
from support.clients_rig import KEY, MODEL, PATIENCE_S, open_front

pytestmark = [
    pytest.mark.nats,
    # On Trio it leaves what it reads with to the garbage collector: it stops at `[DONE]`.
    pytest.mark.filterwarnings(
        r"ignore:Async generator .(openai|httpx2|httpcore2)\.:ResourceWarning"
    ),
]

SAY: list[Any] = [{"role": "user", "content": "hello"}]


class Address(BaseModel):
    city: Annotated[str, Field(max_length=20)]
    zip: Annotated[int, Field(ge=1000, le=99999)]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    mood: Literal["happy", "sad"]
    addresses: Annotated[list[Address], Field(min_length=1, max_length=2)]


class Weather(BaseModel):
    """Look out of the window."""

    city: Annotated[str, Field(max_length=20)]
    days: Annotated[int, Field(ge=1, le=7)]


@asynccontextmanager
async def open_client() -> AsyncIterator[AsyncOpenAI]:
    async with open_front() as front:
        with trio.fail_after(PATIENCE_S):
            async with AsyncOpenAI(base_url=front.base_url, api_key=KEY, max_retries=0) as client:
                yield client


async def test_every_choice_parses_as_the_model_that_was_asked_for() -> None:
    async with open_client() as client:
        answer = await client.chat.completions.parse(
            model=MODEL, messages=SAY, response_format=Person, n=3, seed=1
        )
    people = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(person, Person) for person in people)
    assert len({repr(person) for person in people}) == 3
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


async def test_a_tool_that_must_be_called_is_and_its_result_is_answered() -> None:
    tools = [pydantic_function_tool(Weather)]
    async with open_client() as client:
        asked = await client.chat.completions.parse(
            model=MODEL, messages=SAY, tools=tools, tool_choice="required", seed=1
        )
        message = asked.choices[0].message
        assert asked.choices[0].finish_reason == "tool_calls"
        assert message.tool_calls
        for call in message.tool_calls:
            assert isinstance(call.function.parsed_arguments, Weather)
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
            for call in message.tool_calls
        ]
        conversation: Any = [*SAY, message, *results]
        answer = await client.chat.completions.create(
            model=MODEL, messages=conversation, tools=tools, max_tokens=5
        )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


async def test_a_streamed_call_comes_in_pieces_that_parse_together() -> None:
    named: Any = {"type": "function", "function": {"name": "Weather"}}
    async with (
        open_client() as client,
        client.chat.completions.stream(
            model=MODEL,
            messages=SAY,
            tools=[pydantic_function_tool(Weather)],
            tool_choice=named,
            seed=3,
        ) as stream,
    ):
        pieces = [
            event.arguments_delta
            async for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        final = await stream.get_final_completion()
    assert len([piece for piece in pieces if piece]) > 1
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, Weather)
    assert "".join(pieces) == calls[0].function.arguments
    assert final.choices[0].finish_reason == "tool_calls"


async def test_what_is_reasoned_is_kept_apart_and_counted() -> None:
    async with open_client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=SAY, max_tokens=40, reasoning_effort="high"
        )
        plain = await client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=40)
    message: Any = answer.choices[0].message
    assert message.reasoning_content
    assert "think" not in (message.content or "") + message.reasoning_content
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    reasoned = answer.usage.completion_tokens_details.reasoning_tokens
    assert reasoned == len(message.reasoning_content.split()) + 2
    assert getattr(plain.choices[0].message, "reasoning_content", None) is None


async def test_a_schema_that_cannot_be_had_is_refused_with_what_is_wrong_in_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    async with open_client() as client:
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            await client.chat.completions.create(model=MODEL, messages=SAY, response_format=wanted)
    assert caught.value.param == "response_format"
