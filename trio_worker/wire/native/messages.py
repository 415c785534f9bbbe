"""The messages of a chat: what each may hold, and that calls of tools and results go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from trio_worker.errors import InvalidRequest
from trio_worker.protocol.prompt import Message, ToolCall
from trio_worker.wire.native.faults import refused


class _TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


_Content: TypeAlias = str | list[_TextPart]


class _Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role"):
    name: str | None = None


class _System(_Message, frozen=True, kw_only=True, tag="system"):
    content: _Content


class _Developer(_System, frozen=True, kw_only=True, tag="developer"):
    """OpenAI's later name of `system`."""


class _User(_Message, frozen=True, kw_only=True, tag="user"):
    content: _Content


class _Called(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str


class _Call(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Annotated[str, Meta(min_length=1)]
    type: Literal["function"] = "function"
    function: _Called
    index: int | None = None
    """Left by who puts the parts of a stream together; its place says the same."""


class _Assistant(_Message, frozen=True, kw_only=True, tag="assistant"):
    content: _Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    # What OpenAI's answers have beside these, and clients send back with them.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class _ToolResult(_Message, frozen=True, kw_only=True, tag="tool"):
    tool_call_id: str
    content: _Content


ChatMessage: TypeAlias = _System | _Developer | _User | _Assistant | _ToolResult


def messages_of(given: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """What a model is told. Raises `InvalidRequest`, with the place in `details.field`."""
    _check_results(given)
    return tuple(_message(each, f"messages[{place}]") for place, each in enumerate(given))


def _check_results(given: Sequence[ChatMessage]) -> None:
    """That every result follows its call, and every call has a result."""
    unanswered: set[str] = set()
    called_at = 0
    for place, each in enumerate(given):
        if isinstance(each, _ToolResult):
            if each.tool_call_id not in unanswered:
                raise refused(
                    "Invalid parameter: messages with role 'tool' must be a response to a "
                    "preceeding message with 'tool_calls'.",
                    f"messages[{place}].role",
                )
            unanswered.discard(each.tool_call_id)
            continue
        if unanswered:
            raise _no_result(unanswered, called_at)
        if isinstance(each, _Assistant):
            unanswered, called_at = {call.id for call in each.tool_calls or ()}, place
    if unanswered:
        raise _no_result(unanswered, called_at)


def _no_result(unanswered: set[str], called_at: int) -> InvalidRequest:
    return refused(
        "An assistant message with 'tool_calls' must be followed by tool messages responding to "
        "each 'tool_call_id'. The following tool_call_ids did not have response messages: "
        + ", ".join(sorted(unanswered))[:256],
        f"messages[{called_at}].tool_calls",
    )


def _message(given: ChatMessage, where: str) -> Message:
    match given:
        case _System():
            return Message(role="system", content=_text(given.content), name=given.name)
        case _User():
            return Message(role="user", content=_text(given.content), name=given.name)
        case _ToolResult():
            return Message(
                role="tool",
                content=_text(given.content),
                name=given.name,
                tool_call_id=given.tool_call_id,
            )
        case _Assistant():
            return _assistant(given, where)


def _assistant(given: _Assistant, where: str) -> Message:
    if given.content is None and not given.tool_calls:
        where = f"{where}.content"
        raise refused(f"{where}: it is needed where there are no tool_calls", where)
    return Message(
        role="assistant",
        content=_text(given.content or ""),
        name=given.name,
        reasoning=given.reasoning_content,
        tool_calls=tuple(
            ToolCall(
                id=call.id,
                name=call.function.name,
                arguments=_arguments(call, f"{where}.tool_calls[{place}].function.arguments"),
            )
            for place, call in enumerate(given.tool_calls or ())
        ),
    )


def _arguments(call: _Call, where: str) -> str:
    """What it was called with: JSON of an object; some clients leave out one without a member."""
    arguments = call.function.arguments or "{}"
    try:
        is_object = isinstance(msgspec.json.decode(arguments), dict)
    except (msgspec.MsgspecError, RecursionError):
        is_object = False
    if not is_object:
        raise refused(f"{where}: it is not a JSON object", where)
    return arguments


def _text(content: _Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
