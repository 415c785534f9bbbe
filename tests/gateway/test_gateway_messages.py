"""Messages of a chat: what is kept, dropped and refused."""

from __future__ import annotations

from typing import Any

import pytest

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.messages import to_wire

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "annotations": None}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [], "x": None, "y": {}, "z": ""},
            {"role": "assistant", "content": "a"},
        ),
        (
            {"role": "user", "content": "a", "name": "Ann"},
            {"role": "user", "content": "a", "name": "Ann"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL], "function_call": None},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        ),
        (
            {"role": "tool", "content": "a", "tool_call_id": "1", "name": "f"},
            {"role": "tool", "content": "a", "tool_call_id": "1", "name": "f"},
        ),
        (
            {"role": "tool", "content": [{"type": "text", "text": "a"}], "tool_call_id": "1"},
            {"role": "tool", "content": [{"type": "text", "text": "a"}], "tool_call_id": "1"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "b"},
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "c", "reasoning_content": "b"},
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
        ),
    ],
)
def test_a_message_is_told_as_the_wire_has_it(
    message: dict[str, Any], wire: dict[str, Any]
) -> None:
    assert to_wire([message], ignore_unknown=False) == ([wire], set())


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("Hi", "messages[1]"),
        ({}, "messages[1].role"),
        ({"role": [], "content": "a"}, "messages[1].role"),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, "messages[1].content"),
        ({"role": "tool", "content": "a", "tool_call_id": 1}, "messages[1].tool_call_id"),
        ({"role": "user", "content": "a", "name": {"a": 1}}, "messages[1].name"),
        ({"role": "user", "content": "a", "reasoning": "b"}, "messages[1].reasoning"),
        ({"role": "assistant", "content": "a", "reasoning": ["b"]}, "messages[1].reasoning"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content"),
        ({"role": "assistant", "content": None, "reasoning": "b"}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": "f"}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL, "f"]}, "messages[1].tool_calls[1]"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "x": 1}]},
            "messages[1].tool_calls[0].x",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"x": 1}}]},
            "messages[1].tool_calls[0].function.x",
        ),
        ({"role": "function", "content": "a"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 1}, "messages[1].content"),
        ({"role": "assistant", "content": "", "refusal": "No"}, "messages[1].refusal"),
        ({"role": "assistant", "content": "", "audio": {"id": "1"}}, "messages[1].audio"),
        ({"role": "user", "content": "a", "mood": 0}, "messages[1].mood"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": []}]}, "messages[1].content[0]"),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}],
            },
            "messages[1].content[1]",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]},
            "messages[1].content[0].x",
        ),
    ],
)
def test_what_a_worker_cannot_take_is_refused_by_its_place(message: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_wire([{"role": "user", "content": "a"}, message], ignore_unknown=False)
    assert caught.value.details == {"field": field}
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("role", "name", "said"),
    [
        ("user", "tool_calls", "only in messages of role assistant"),
        ("assistant", "tool_call_id", "only in messages of role tool"),
        ("assistant", "function_call", "send those"),
        ("assistant", "audio", "not supported"),
        ("assistant", "refusal", "not supported"),
    ],
)
def test_what_has_a_meaning_is_refused_even_where_unknown_fields_are_ignored(
    role: str, name: str, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"\.{name}: .*{said}"):
        to_wire([{"role": role, "content": "a", name: "x"}], ignore_unknown=True)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        *((kind, kind) for kind in ("image_url", "input_audio", "file", "refusal")),
        ("hologram", "this type"),
        ([], "this type"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_kind(kind: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"parts of {said} are not supported"):
        to_wire([{"role": "user", "content": [{"type": kind}]}], ignore_unknown=True)


@pytest.mark.parametrize(("role", "is_old"), [("function", True), ("x", False)])
def test_another_role_is_refused_with_those_that_there_are(role: str, *, is_old: bool) -> None:
    with pytest.raises(InvalidRequest, match="system, developer, user, assistant, tool") as caught:
        to_wire([{"role": role, "content": "a"}], ignore_unknown=False)
    assert ("are sent in role tool" in caught.value.message) is is_old


def test_what_is_dropped_is_named() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "x": 1}
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}, "z": 1, "n": None}
    call = {**CALL, "index": 0, "y": 1, "function": function}
    messages, unused = to_wire(
        [
            {"role": "user", "content": [part], "mood": "good"},
            {"role": "assistant", "tool_calls": [call], "parsed": {"a": 1}},
        ],
        ignore_unknown=True,
    )
    assert messages == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    assert unused == {
        "messages.mood",
        "messages.parsed",
        "messages.content.cache_control",
        "messages.content.x",
        "messages.tool_calls.index",
        "messages.tool_calls.y",
        "messages.tool_calls.function.parsed_arguments",
        "messages.tool_calls.function.z",
    }
