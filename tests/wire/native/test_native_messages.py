"""The messages of a chat: every role with all it may hold, and calls with their results."""

from __future__ import annotations

from typing import Any

import pytest
from support.wire_requests import read_chat, refusal_of

from trio_worker.protocol.prompt import Message, ToolCall

USER = {"role": "user", "content": "x"}


def call(id_: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": id_, "type": "function", "function": function, **more}


def calls(*ids: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call(each) for each in ids], **more}


def result(id_: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": "r", **more}


def read(*messages: dict[str, Any]) -> tuple[Message, ...]:
    return read_chat(messages=list(messages)).messages


def test_every_role_is_told_with_all_that_it_holds() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read(
        {"role": "system", "content": "s", "name": "n"},
        {"role": "developer", "content": parts},
        {"role": "user", "content": parts, "name": "u"},
        {
            "role": "assistant",
            "content": None,
            "name": "a",
            "reasoning_content": "hm",
            "tool_calls": [call("c1", '{"a": 1}'), call("c2", "", index=1)],
        },
        result("c2", name="f"),
        result("c1", content=parts),
        {"role": "assistant", "content": ""},
    ) == (
        Message(role="system", content="s", name="n"),
        Message(role="system", content="ab"),
        Message(role="user", content="ab", name="u"),
        Message(
            role="assistant",
            content="",
            name="a",
            reasoning="hm",
            tool_calls=(
                ToolCall(id="c1", name="f", arguments='{"a": 1}'),
                ToolCall(id="c2", name="f", arguments="{}"),
            ),
        ),
        Message(role="tool", content="r", name="f", tool_call_id="c2"),
        Message(role="tool", content="ab", tool_call_id="c1"),
        Message(role="assistant", content=""),
    )


def test_an_answer_of_openais_can_be_sent_back_as_it_came() -> None:
    answered: dict[str, Any] = {
        "refusal": None,
        "audio": None,
        "function_call": None,
        "annotations": [],
    }
    (message,) = read({"role": "assistant", "content": "hi", "tool_calls": None, **answered})
    assert message == Message(role="assistant", content="hi")


NO_CALL = (
    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
    "'tool_calls'."
)
NO_RESULT = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
    "'tool_call_id'. The following tool_call_ids did not have response messages: "
)


@pytest.mark.parametrize(
    ("messages", "message", "place"),
    [
        ([result("c")], NO_CALL, "messages[0].role"),
        ([USER, result("c")], NO_CALL, "messages[1].role"),
        ([calls("c"), result("d")], NO_CALL, "messages[1].role"),
        ([calls("c"), result("c"), result("c")], NO_CALL, "messages[2].role"),
        ([calls("c"), result("c"), USER, result("c")], NO_CALL, "messages[3].role"),
        ([calls("c")], NO_RESULT + "c", "messages[0].tool_calls"),
        ([USER, calls("c", "b", "a"), result("b")], NO_RESULT + "a, c", "messages[1].tool_calls"),
        ([calls("c"), USER, result("c")], NO_RESULT + "c", "messages[0].tool_calls"),
        ([calls("c"), calls("d"), result("d")], NO_RESULT + "c", "messages[0].tool_calls"),
    ],
)
def test_a_result_follows_its_call_and_every_call_has_a_result(
    messages: list[dict[str, Any]], message: str, place: str
) -> None:
    assert refusal_of(messages=messages) == (message, place, None)


@pytest.mark.parametrize(
    ("message", "said", "place"),
    [
        ({"role": "assistant"}, "it is needed where there are no tool_calls", ".content"),
        (
            {"role": "assistant", "tool_calls": []},
            "it is needed where there are no tool_calls",
            ".content",
        ),
        ({"role": "user"}, "Object missing required field `content`", ""),
        ({"role": "tool", "content": "x"}, "Object missing required field `tool_call_id`", ""),
        ({**USER, "tool_calls": []}, "Object contains unknown field `tool_calls`", ""),
        ({"role": "user", "content": None}, "Expected `str | array`, got `null`", ".content"),
        (
            {"role": "assistant", "content": "x", "refusal": "no"},
            "Expected `null`, got `str`",
            ".refusal",
        ),
        (
            {"role": "assistant", "tool_calls": [{**call("c"), "id": ""}]},
            "Expected `str` of length >= 1",
            ".tool_calls[0].id",
        ),
    ],
)
def test_what_a_message_cannot_hold_is_said_with_its_place(
    message: dict[str, Any], said: str, place: str
) -> None:
    where = f"messages[1]{place}"
    assert refusal_of(messages=[USER, message]) == (f"{where}: {said}", where, None)


@pytest.mark.parametrize("arguments", ["[1]", "1", "{", '{"a"', "nul", "[" * 5000])
def test_what_a_tool_was_called_with_is_an_object(arguments: str) -> None:
    """Templates go through the members, which text has none of."""
    message = {"role": "assistant", "tool_calls": [call("b"), call("c", arguments)]}
    where = "messages[0].tool_calls[1].function.arguments"
    said = (f"{where}: it is not a JSON object", where, None)
    assert refusal_of(messages=[message, result("c"), result("b")]) == said
