"""The keys of a prompt: what they are alike for, and that no request has to be right for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trio_worker.core.prefix_order import PrefixKeys
from trio_worker.wire.prompt_keys import keys_of

SYSTEM = {"role": "system", "content": "You are a helpful shop. " * 60}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "looks " * 300}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def keys(**fields: Any) -> PrefixKeys | None:
    return keys_of(fields, len(msgspec.json.encode(fields)))


def some(**fields: Any) -> PrefixKeys:
    found = keys(**fields)
    assert found is not None
    return found


def test_a_short_prompt_has_none() -> None:
    assert keys(messages=[user("hello " * 100)]) is None
    assert keys(messages=[user("hello " * 200)]) is not None
    assert keys(prompt="hello " * 100) is None
    # A long list of something else does not make a prompt long.
    assert keys(prompt="hello", stop=["x" * 900, "y" * 900]) is None


def test_the_turns_of_a_conversation_have_the_same_keys() -> None:
    first = some(messages=[SYSTEM, user("one")])
    assert some(messages=[SYSTEM, user("one"), said("two"), user("three")]) == first
    assert some(messages=[SYSTEM, user("one"), said("other")], temperature=0.5) == first


def test_conversations_with_one_system_prompt_share_that_key_alone() -> None:
    one, other = some(messages=[SYSTEM, user("one")]), some(messages=[SYSTEM, user("other")])
    assert one.system == other.system
    assert one.conversation != other.conversation


def test_tools_belong_to_the_system_prompt() -> None:
    one = some(messages=[user("one")], tools=TOOLS)
    other = some(messages=[user("other")], tools=TOOLS)
    assert one.system == other.system
    assert one.conversation != other.conversation
    assert some(messages=[SYSTEM, user("one")], tools=TOOLS).system not in (
        one.system,
        some(messages=[SYSTEM, user("one")]).system,
    )


def test_a_short_system_prompt_that_all_have_does_not_bring_them_together() -> None:
    brief = {"role": "system", "content": "You are helpful."}
    one = some(messages=[brief, user("one " * 400)])
    other = some(messages=[brief, user("other " * 400)])
    assert one.system != other.system


def test_without_a_system_prompt_the_beginning_stands_for_it() -> None:
    long = "tell me about " * 100
    one, other = some(messages=[user(long + "one")]), some(messages=[user(long + "other")])
    assert one.system == other.system
    assert one.conversation != other.conversation


def test_content_parts_and_the_order_of_fields_do_not_matter() -> None:
    parts = [{"type": "text", "text": "look " * 300}]
    one = some(messages=[{"role": "user", "content": parts}])
    turned = [{"text": "look " * 300, "type": "text"}]
    assert some(messages=[{"content": turned, "role": "user"}]) == one
    assert some(messages=[user("look " * 300)]) != one


def test_a_conversation_that_the_assistant_opens_begins_there() -> None:
    one = some(messages=[SYSTEM, said("welcome"), user("one")])
    assert some(messages=[SYSTEM, said("welcome"), user("one"), said("two"), user("3")]) == one
    assert some(messages=[SYSTEM, said("hello"), user("one")]).conversation != one.conversation
    assert some(messages=[SYSTEM, user("one")]).conversation != one.conversation


def test_several_system_messages_are_one_system_prompt() -> None:
    more = {"role": "developer", "content": "be brief"}
    one = some(messages=[SYSTEM, more, user("one")])
    assert one.system == some(messages=[SYSTEM, more, user("other")]).system
    assert one.system != some(messages=[SYSTEM, user("one")]).system


def test_a_plain_prompt_goes_by_its_beginning() -> None:
    one = some(prompt="x" * 5000)
    assert some(prompt="x" * 5000 + "y") == one
    assert some(prompt="x" * 4000 + "y" * 1000).system == one.system
    assert some(prompt="x" * 4000 + "y" * 1000).conversation != one.conversation
    assert some(prompt="x" * 2000).conversation == one.system


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM],
        [said("x")],
        [None],
        [7, "x", [], {}],
        [{"role": ["system"]}],
        [{"role": "system", "content": {"a": [None]}}],
        {"role": "user"},
        "hello",
        7,
    ],
)
def test_what_is_no_conversation_is_left_to_the_checks(messages: Any) -> None:
    keys_of({"messages": messages}, 5000)
    keys_of({"messages": messages, "tools": messages}, 5000)
    keys_of({"prompt": messages}, 5000)
