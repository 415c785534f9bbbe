"""Messages of a chat: what is kept, dropped and refused."""

from __future__ import annotations

from typing import Any

import pytest

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.messages import to_wire


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
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "messages[1].role"),
        ({"role": "function", "content": "a"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 1}, "messages[1].content"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            "messages[1].tool_calls",
        ),
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
    "name", ["tool_calls", "tool_call_id", "function_call", "audio", "refusal"]
)
def test_what_has_a_meaning_is_refused_even_where_unknown_fields_are_ignored(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"\.{name}: not supported"):
        to_wire([{"role": "assistant", "content": "a", name: "x"}], ignore_unknown=True)


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


@pytest.mark.parametrize(
    ("role", "about_tools"), [("tool", True), ("function", True), ("x", False)]
)
def test_another_role_is_refused_with_those_that_there_are(role: str, *, about_tools: bool) -> None:
    with pytest.raises(InvalidRequest, match="system, developer, user, assistant") as caught:
        to_wire([{"role": role, "content": "a"}], ignore_unknown=False)
    assert ("does not call tools" in caught.value.message) is about_tools


def test_what_is_dropped_is_named() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "x": 1}
    messages, unused = to_wire(
        [{"role": "user", "content": [part], "name": "Ann", "mood": "good"}], ignore_unknown=True
    )
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert unused == {
        "messages.name",
        "messages.mood",
        "messages.content.cache_control",
        "messages.content.x",
    }
