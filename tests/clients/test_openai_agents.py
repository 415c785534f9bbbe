"""What agents need, by OpenAI's own client for Python: tools, given forms, reasoning."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import openai
import pytest
import trio
from openai import AsyncOpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from support.openai_types import check, checked
from support.peers import in_asyncio
from support.written_answers import (
    MODEL,
    Script,
    Tokens,
    WrittenWorker,
    call,
    ended,
    open_written,
    text,
    thought,
)

from trio_worker.core.request import Request
from trio_worker.protocol.prompt import Choice, JsonSchema, Message, Regex, ToolCall, ToolUse
from trio_worker.protocol.turn import FinishReason

pytestmark = [
    # On Trio it leaves what it reads with to the garbage collector: it stops at `[DONE]`.
    pytest.mark.filterwarnings(
        r"ignore:Async generator .(openai|httpx2|httpcore2)\.:ResourceWarning"
    ),
]

PATIENCE_S = 20

Work: TypeAlias = Callable[[AsyncOpenAI, WrittenWorker], Awaitable[None]]
Run: TypeAlias = Callable[..., Awaitable[None]]


async def on_trio(script: Script, work: Work) -> None:
    async with open_written(script) as (root, worker):
        with trio.fail_after(PATIENCE_S):
            async with AsyncOpenAI(base_url=f"{root}/v1", api_key="any", max_retries=0) as client:
                await work(client, worker)


async def on_asyncio(script: Script, work: Work) -> None:
    async with open_written(script) as (root, worker):

        async def main() -> None:
            async with AsyncOpenAI(base_url=f"{root}/v1", api_key="any", max_retries=0) as client:
                await work(client, worker)

        await in_asyncio(main, within_s=PATIENCE_S)


both_loops = pytest.mark.parametrize("run", [on_trio, on_asyncio])


def always(*choices: Tokens) -> Script:
    return lambda _: choices


def say(words: str) -> list[Any]:
    return [{"role": "user", "content": words}]


class Weather(BaseModel):
    """Look out of the window."""

    city: str
    days: int


class Answer(BaseModel):
    number: int
    why: str


LOOK = pydantic_function_tool(Weather, name="look")
PLAIN_TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
BERLIN = call(0, "look", '{"city": "Ber', 'lin", ', '"days": 2}')
ANSWER = text('{"number"', ": 7, ", '"why": "so"}')


# --- answers in a given form ------------------------------------------------------------------


@both_loops
async def test_an_answer_is_parsed_as_the_model_that_was_asked_for(run: Run) -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        whole = await client.chat.completions.parse(
            model=MODEL, messages=say("hi"), response_format=Answer
        )
        assert whole.choices[0].message.parsed == Answer(number=7, why="so")
        assert whole.choices[0].finish_reason == "stop"
        constraint = worker.asked[0].wanted.constraint
        assert isinstance(constraint, JsonSchema)
        schema = json.loads(constraint.schema)
        assert schema["required"] == ["number", "why"]
        assert schema["additionalProperties"] is False

    await run(always(ANSWER), work)


async def test_a_stream_in_a_given_form_is_parsed_at_its_end() -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        async with client.chat.completions.stream(
            model=MODEL, messages=say("hi"), response_format=Answer
        ) as stream:
            events = [event async for event in stream]
        done = [event for event in events if event.type == "content.done"]
        assert [event.parsed for event in done] == [Answer(number=7, why="so")]
        assert sum(event.type == "content.delta" for event in events) == len(ANSWER)

    await on_trio(always(ANSWER), work)


async def test_an_answer_that_was_cut_off_is_never_taken_for_a_whole_one() -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(
                model=MODEL, messages=say("hi"), response_format=Answer
            )

    await on_trio(always(ended(text('{"number"'), FinishReason.LENGTH)), work)


async def test_other_forms_are_asked_for_beside_openais_fields() -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        for extra in (
            {"grammar": {"regex": "a+"}},
            {"structured_outputs": {"regex": "a+"}},
            {"guided_choice": ["a", "b"]},
        ):
            await client.chat.completions.create(model=MODEL, messages=say("hi"), extra_body=extra)
            await client.completions.create(model=MODEL, prompt="hi", extra_body=extra)
        assert [request.wanted.constraint for request in worker.asked] == [
            *[Regex(pattern="a+")] * 4,
            *[Choice(options=("a", "b"))] * 2,
        ]

    await on_trio(always(text("a")), work)


# --- tools --------------------------------------------------------------------------------


@both_loops
async def test_calls_come_whole_and_are_parsed(run: Run) -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=say("hi"), tools=[LOOK]
        )
        check(ChatCompletion, raw.text)
        message = raw.parse().choices[0].message
        assert (message.content, raw.parse().choices[0].finish_reason) == (None, "tool_calls")

        parsed = await client.chat.completions.parse(
            model=MODEL, messages=say("hi"), tools=[LOOK], parallel_tool_calls=False
        )
        told: Any = parsed.choices[0].message
        (called,) = told.tool_calls
        assert called.function.parsed_arguments == Weather(city="Berlin", days=2)
        assert called.id.startswith("call_")
        assert [request.wanted.parallel_calls for request in worker.asked] == [True, False]
        (tool,) = worker.asked[0].wanted.tools
        assert (tool.name, tool.strict) == ("look", True)

    await run(always(BERLIN), work)


@both_loops
async def test_calls_are_streamed_name_first_and_then_their_arguments(run: Run) -> None:
    said = [*text("Let", " me"), *BERLIN, *call(1, "look", '{"city": "Rome", "days": 1}')]

    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        chunks = [
            checked(chunk)
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=say("hi"), tools=[LOOK], stream=True
            )
        ]
        deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
        assert [bool(each.id) for each in deltas] == [True, False, False, False, True, False]
        assert [each.function.name for each in deltas if each.id and each.function] == [
            "look",
            "look",
        ]
        async with client.chat.completions.stream(
            model=MODEL, messages=say("hi"), tools=[LOOK]
        ) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_completion()
        kinds = [event.type for event in events]
        assert kinds.count("tool_calls.function.arguments.done") == 2
        assert "tool_calls.function.arguments.delta" in kinds
        message = final.choices[0].message
        assert message.content == "Let me"
        assert [each.function.parsed_arguments for each in message.tool_calls or ()] == [
            Weather(city="Berlin", days=2),
            Weather(city="Rome", days=1),
        ]

    await run(always(said), work)


@both_loops
@pytest.mark.parametrize("how", ["create", "parse", "stream"])
async def test_a_conversation_goes_on_with_what_was_called_and_what_came_of_it(
    run: Run, how: str
) -> None:
    """The message as the client has it is sent back, with all that it has added to it."""

    def script(request: Request) -> list[Tokens]:
        has_result = any(message.role == "tool" for message in request.messages)
        return [text("Sun") if has_result else [*thought("Hm"), *BERLIN]]

    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        messages = say("How is it?")
        ask: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": [LOOK]}
        if how == "stream":
            async with client.chat.completions.stream(**ask) as stream:
                async for _ in stream:
                    pass
                first: Any = await stream.get_final_completion()
        else:
            first = await getattr(client.chat.completions, how)(**ask)
        message: Any = first.choices[0].message
        (called,) = message.tool_calls
        part = {"type": "text", "text": "sunny"}
        messages += [message, {"role": "tool", "tool_call_id": called.id, "content": [part]}]
        second = await client.chat.completions.create(model=MODEL, messages=messages, tools=[LOOK])
        assert second.choices[0].message.content == "Sun"
        told = ToolCall(id=called.id, name="look", arguments=called.function.arguments)
        assert worker.asked[1].messages[1:] == (
            Message(role="assistant", content="", reasoning="Hm", tool_calls=(told,)),
            Message(role="tool", content="sunny", tool_call_id=called.id),
        )

    await run(script, work)


# The client's own message about what it sends.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
async def test_an_answer_that_was_parsed_is_sent_back_as_it_is() -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        ask: dict[str, Any] = {"model": MODEL, "response_format": Answer}
        first = await client.chat.completions.parse(messages=say("hi"), **ask)
        messages = [*say("hi"), first.choices[0].message, *say("and then?")]
        await client.chat.completions.parse(messages=messages, **ask)
        assert worker.asked[1].messages[1].content == "".join(each.text for each in ANSWER)

    await on_trio(always(ANSWER), work)


@pytest.mark.parametrize(
    ("choice", "use", "allowed"),
    [
        ("auto", ToolUse.AUTO, ()),
        ("required", ToolUse.REQUIRED, ()),
        ({"type": "function", "function": {"name": "look"}}, ToolUse.REQUIRED, ("look",)),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "look"}}],
                },
            },
            ToolUse.REQUIRED,
            ("look",),
        ),
    ],
    ids=["auto", "required", "named", "allowed"],
)
async def test_which_tools_are_to_be_called(
    choice: Any, use: ToolUse, allowed: tuple[str, ...]
) -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        await client.chat.completions.create(
            model=MODEL, messages=say("hi"), tools=[LOOK], tool_choice=choice
        )
        (request,) = worker.asked
        assert (request.wanted.tool_use, request.wanted.allowed_tools) == (use, allowed)

    await on_trio(always(BERLIN), work)


# --- several answers, reasoning ---------------------------------------------------------------


@both_loops
async def test_several_answers_to_one_question(run: Run) -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        ask: dict[str, Any] = {"model": MODEL, "messages": say("hi"), "n": 2}
        raw = await client.chat.completions.with_raw_response.create(**ask)
        check(ChatCompletion, raw.text)
        whole = raw.parse()
        assert [each.index for each in whole.choices] == [0, 1]
        assert [each.message.content for each in whole.choices] == ["one two", "three"]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3

        usage_too: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [
            checked(chunk)
            async for chunk in await client.chat.completions.create(**ask, **usage_too)
        ]
        said = ["", ""]
        for chunk in chunks[:-1]:
            for each in chunk.choices:
                said[each.index] += each.delta.content or ""
        assert said == ["one two", "three"]
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        without = [
            chunk async for chunk in await client.chat.completions.create(**ask, stream=True)
        ]
        assert len(without) == len(chunks) - 1
        assert all(chunk.choices for chunk in without)

        async with client.chat.completions.stream(**ask) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert [each.message.content for each in final.choices] == ["one two", "three"]
        texts = await client.completions.create(model=MODEL, prompt="hi", n=2)
        assert [each.text for each in texts.choices] == ["one two", "three"]

    await run(always(text("one", " two"), text("three")), work)


@both_loops
async def test_what_a_model_thinks_comes_beside_what_it_says(run: Run) -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        ask: dict[str, Any] = {"model": MODEL, "messages": say("hi"), "reasoning_effort": "low"}
        extra = {"max_reasoning_tokens": 9, "chat_template_kwargs": {"deep": True}}
        whole = checked(await client.chat.completions.create(**ask, extra_body=extra))
        message: Any = whole.choices[0].message
        assert (message.content, message.reasoning_content) == ("Yes", "Hm, well")
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert whole.usage.completion_tokens_details.reasoning_tokens == 2
        wanted = worker.asked[0].wanted
        assert wanted.max_reasoning_tokens == 9
        assert json.loads(wanted.template_variables) == {"reasoning_effort": "low", "deep": True}

        chunks: Any = [
            checked(chunk)
            async for chunk in await client.chat.completions.create(**ask, stream=True)
        ]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
        assert [each for each in thoughts if each] == ["Hm,", " well"]
        assert [delta.content for delta in deltas if delta.content] == ["Yes"]

    await run(always([*thought("Hm,", " well"), *text("Yes")]), work)


# --- refusals -----------------------------------------------------------------------------------

RESULT = {"role": "tool", "tool_call_id": "1", "content": "a"}
BAD_NAME: Any = {"type": "function", "function": {"name": "a b"}}
STRICT = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}, "strict": True}
LOOSE = {"name": "n", "strict": True, "schema": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "auto"}, "tool_choice", "only allowed when 'tools' are specified"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "only allowed when 'tools' are"),
        ({"tools": [PLAIN_TOOL, BAD_NAME]}, "tools[1].function.name", "does not match pattern"),
        (
            {"tools": [PLAIN_TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
            "not found in 'tools' parameter",
        ),
        (
            {"tools": [{"type": "function", "function": STRICT}]},
            "tools[0].function.parameters",
            "additionalProperties",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": LOOSE}},
            "response_format",
            "additionalProperties",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "Supported values are"),
        ({"messages": [*say("hi"), RESULT]}, "messages[1].role", "must be a response to"),
        ({"n": 9}, "n", "n: "),
        ({"extra_body": {"guided_choice": []}}, "guided_choice", "guided_choice: "),
        ({"extra_body": {"guided_json": "{"}}, "guided_json", "expected a JSON Schema"),
        (
            {"extra_body": {"structured_outputs": {"grammar": "x"}}},
            "structured_outputs.grammar",
            "Lark",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "the old form of tools"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_is_refused_with_its_place(
    fields: dict[str, Any], param: str, words: str
) -> None:
    async def work(client: AsyncOpenAI, worker: WrittenWorker) -> None:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    **{"model": MODEL, "messages": say("hi"), "stream": stream, **fields}
                )
            assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
            assert words in caught.value.message
        assert worker.asked == []

    await on_trio(always(text("a")), work)
