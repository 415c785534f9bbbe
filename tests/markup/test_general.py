"""Tools told of in general words, for models whose templates know none."""

from __future__ import annotations

import json

from support.recorded_calls import TOOLS

from trio_worker.markup.general import GENERAL_CALLS, told_of_tools
from trio_worker.markup.reader import AnswerReader
from trio_worker.markup.style import Style
from trio_worker.protocol.prompt import CallArguments, CallBegun, Form, Message, ToolCall

USER = Message(role="user", content="Weather?")
SYSTEM = Message(role="system", content="Be brief.")


def result(content: str) -> Message:
    return Message(role="tool", content=content, tool_call_id="c")


def calling(content: str, *calls: tuple[str, str]) -> Message:
    return Message(
        role="assistant",
        content=content,
        reasoning="So.",
        tool_calls=tuple(ToolCall(id="c", name=name, arguments=text) for name, text in calls),
    )


def test_a_system_message_tells_of_the_tools_each_on_a_line() -> None:
    system, user = told_of_tools([USER], TOOLS)
    assert (system.role, user) == ("system", USER)
    inner = system.content.split("<tools>\n")[1].split("\n</tools>")[0]
    told = [json.loads(line) for line in inner.splitlines()]
    assert [each["function"]["name"] for each in told] == ["get_weather", "now"]
    assert all(each["type"] == "function" for each in told)
    assert told[1]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_what_the_system_message_said_comes_first() -> None:
    system, user = told_of_tools([SYSTEM, USER], TOOLS)
    assert system.content.startswith("Be brief.\n\n")
    assert "<tools>" in system.content
    assert user == USER


def test_calls_become_the_text_that_made_them() -> None:
    said = calling("I look.", ("get_weather", '{"city": "Bern"}'), ("now", ""))
    (assistant,) = told_of_tools([said], ())
    assert assistant.tool_calls == ()
    assert assistant.reasoning == "So."
    assert assistant.content == (
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )


def test_results_that_follow_each_other_are_one_turn_of_the_user() -> None:
    turns = told_of_tools([USER, calling("", ("now", "{}")), result("1"), result("2"), USER], ())
    assert [each.role for each in turns] == ["user", "assistant", "user", "user"]
    assert turns[2].content == (
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )


def test_without_tools_nothing_is_told() -> None:
    assert told_of_tools([SYSTEM, USER], ()) == [SYSTEM, USER]


def test_what_is_told_is_what_is_read() -> None:
    """The example in the prompt, with a tool's name in it, is a call."""
    content = told_of_tools([], TOOLS)[0].content
    written = content[content.index("<tool_call>\n") :].replace("<args-json-object>", "{}")
    written = written.replace("<function-name>", '"now"')
    reader = AnswerReader(Style(calls=GENERAL_CALLS), Form(tools=TOOLS))
    pieces = reader.feed(written).pieces
    assert pieces == (CallBegun(index=0, name="now"), CallArguments(index=0, text="{}"))


def test_a_call_that_comes_whole_is_read_too() -> None:
    reader = AnswerReader(Style(calls=GENERAL_CALLS), Form(tools=TOOLS))
    pieces = reader.feed('<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>').pieces
    assert pieces == (CallBegun(index=0, name="now"), CallArguments(index=0, text='{"a": 1}'))
