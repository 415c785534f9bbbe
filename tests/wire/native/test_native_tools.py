"""Tools and which of them are to be called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.wire_requests import ROOMY, read_chat, refusal_of

from trio_worker.protocol.prompt import Tool, ToolUse, Wanted


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [named(each) for each in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


STRICT = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_a_tool_arrives_with_its_schema_as_json() -> None:
    asked = [
        tool("get_time-2"),
        tool("f", description="d", parameters={"properties": {"b": {}, "a": {}}}, strict=False),
        tool("g", parameters=STRICT, strict=True),
    ]
    assert read_chat(tools=asked).wanted.tools == (
        Tool(name="get_time-2"),
        Tool(
            name="f",
            description="d",
            parameters='{"type":"object","properties":{"b":{},"a":{}}}',
        ),
        Tool(
            name="g",
            parameters='{"type":"object","properties":{"a":{"type":"string"}},"required":["a"],'
            '"additionalProperties":false}',
            strict=True,
        ),
    )


F, G = Tool(name="f"), Tool(name="g")


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, Wanted(tools=(F, G))),
        ("auto", Wanted(tools=(F, G))),
        ("none", Wanted()),
        ("required", Wanted(tools=(F, G), tool_use=ToolUse.REQUIRED)),
        (
            named("g"),
            Wanted(
                tools=(F, G),
                tool_use=ToolUse.REQUIRED,
                allowed_tools=("g",),
                parallel_calls=False,
            ),
        ),
        (allowed("g", "f", "g"), Wanted(tools=(F, G), allowed_tools=("g", "f"))),
        (
            allowed("f", mode="required"),
            Wanted(tools=(F, G), tool_use=ToolUse.REQUIRED, allowed_tools=("f",)),
        ),
    ],
)
def test_which_tools_are_to_be_called(choice: object, wanted: Wanted) -> None:
    asked = read_chat(tools=[tool("f"), tool("g")], tool_choice=choice)
    assert asked.wanted == wanted


def test_one_call_at_a_time_may_be_asked_for() -> None:
    for parallel, taken in ((None, True), (True, True), (False, False)):
        asked = read_chat(tools=[tool()], parallel_tool_calls=parallel)
        assert asked.wanted.parallel_calls is taken


def test_no_tools_at_all_are_as_if_nothing_was_said_of_them() -> None:
    assert read_chat(tools=[]).wanted == Wanted()


ONLY_WITH_TOOLS = "is only allowed when 'tools' are specified."
PATTERN = (
    "string does not match pattern. Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
)


@pytest.mark.parametrize(
    ("fields", "message", "place"),
    [
        (
            {"tool_choice": "auto"},
            f"Invalid value for 'tool_choice': 'tool_choice' {ONLY_WITH_TOOLS}",
            "tool_choice",
        ),
        (
            {"tools": [], "parallel_tool_calls": True},
            f"Invalid value for 'parallel_tool_calls': 'parallel_tool_calls' {ONLY_WITH_TOOLS}",
            "parallel_tool_calls",
        ),
        (
            {"tools": [tool(), {"type": "custom", "custom": {"name": "c"}}]},
            "Invalid value: 'custom'. Supported values are: 'function'.",
            "tools[1].type",
        ),
        (
            {"tools": [{"type": "function"}]},
            "Missing required parameter: 'tools[0].function'.",
            "tools[0].function",
        ),
        ({"tools": [tool("a b")]}, f"Invalid 'tools[0].function.name': {PATTERN}", ".name"),
        ({"tools": [tool("")]}, f"Invalid 'tools[0].function.name': {PATTERN}", ".name"),
        ({"tools": [tool("a\n")]}, f"Invalid 'tools[0].function.name': {PATTERN}", ".name"),
        (
            {"tools": [tool("f"), tool("g"), tool("f")]},
            "tools[2].function.name: another tool has the name f",
            "tools[2].function.name",
        ),
        (
            {"tools": [tool(parameters={"type": "array"})]},
            (
                "Invalid schema for function 'f': schema must be a JSON Schema of 'type: "
                '"object"\', got \'type: "array"\'.'
            ),
            "tools[0].function.parameters",
        ),
        (
            {"tools": [tool(), tool("g", parameters={**STRICT, "required": []}, strict=True)]},
            (
                "Invalid schema for function 'g': In context=(), 'required' is required to be "
                "supplied and to be an array including every key in properties. Missing 'a'."
            ),
            "tools[1].function.parameters",
        ),
        (
            {"tools": [tool()], "tool_choice": "any"},
            "Invalid value: 'any'. Supported values are: 'none', 'auto', and 'required'.",
            "tool_choice",
        ),
        (
            {"tools": [tool()], "tool_choice": {"type": "custom"}},
            "Invalid value: 'custom'. Supported values are: 'function' and 'allowed_tools'.",
            "tool_choice.type",
        ),
        (
            {"tools": [tool()], "tool_choice": {"type": "function"}},
            "Missing required parameter: 'tool_choice.function'.",
            "tool_choice.function",
        ),
        (
            {"tools": [tool()], "tool_choice": {"type": "allowed_tools"}},
            "Missing required parameter: 'tool_choice.allowed_tools'.",
            "tool_choice.allowed_tools",
        ),
        (
            {"tools": [tool()], "tool_choice": named("g")},
            "Tool choice 'function' not found in 'tools' parameter: 'g' is none of them.",
            "tool_choice.function.name",
        ),
        (
            {"tools": [tool()], "tool_choice": allowed("f", mode="none")},
            "Invalid value: 'none'. Supported values are: 'auto' and 'required'.",
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"tools": [tool()], "tool_choice": allowed()},
            "tool_choice.allowed_tools.tools: expected one tool at least",
            "tool_choice.allowed_tools.tools",
        ),
        (
            {"tools": [tool()], "tool_choice": allowed("f", "g")},
            "Tool choice 'function' not found in 'tools' parameter: 'g' is none of them.",
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_said_in_openais_words(
    fields: dict[str, Any], message: str, place: str
) -> None:
    said, where, limit = refusal_of(**fields)
    assert (said, limit) == (message, None)
    assert where == place or (place == ".name" and where == "tools[0].function.name")


def test_how_many_tools_there_may_be_and_how_long_their_names() -> None:
    most = [tool(f"f{number}") for number in range(128)]
    assert len(read_chat(tools=most).wanted.tools) == 128
    assert refusal_of(tools=[*most, tool()]) == (
        (
            "Invalid 'tools': array too long. Expected an array with maximum length 128, but got "
            "an array with length 129 instead."
        ),
        "tools",
        128,
    )
    assert read_chat(tools=[tool("x" * 64)]).wanted.tools[0].name == "x" * 64
    assert refusal_of(tools=[tool("x" * 65)]) == (
        (
            "Invalid 'tools[0].function.name': string too long. Expected a string with maximum "
            "length 64, but got a string with length 65 instead."
        ),
        "tools[0].function.name",
        64,
    )


def test_a_worker_may_be_set_to_take_none() -> None:
    limits = replace(ROOMY, takes_tools=False)
    said = ("tools: this worker is set to take none", "tools", None)
    assert refusal_of(limits, tools=[tool()], tool_choice="none") == said
    assert read_chat(limits, tools=[]).wanted == Wanted()
