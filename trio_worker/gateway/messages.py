"""The messages of a chat, from OpenAI's shape to the wire's.

Programs that append what a client library gave them send back everything that was in it, empty
fields too; those are dropped. What has a meaning that a worker cannot give it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.json_body import Object, quoted

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles as they are sent, and as the wire names them."""
_UNSUPPORTED = {"tool_calls", "tool_call_id", "function_call", "audio", "refusal"}
_WITHOUT_EFFECT = {"name"}
_PART_WITHOUT_EFFECT = {"cache_control"}
_UNSUPPORTED_PARTS = {"image_url", "input_audio", "file", "refusal"}


def to_wire(messages: Any, *, ignore_unknown: bool) -> tuple[list[Object], set[str]]:
    """The messages as a worker takes them, and the names of what was there without effect.

    Raises `InvalidRequest`, with the place in `details.field`.
    """
    if not isinstance(messages, list):
        raise _invalid("messages", "expected an array of messages")
    unused: set[str] = set()
    return [
        _message(message, f"messages[{index}]", unused, ignore_unknown=ignore_unknown)
        for index, message in enumerate(messages)
    ], unused


def _message(message: Any, where: str, unused: set[str], *, ignore_unknown: bool) -> Object:
    if not isinstance(message, dict):
        raise _invalid(where, "expected an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        hint = "; this server does not call tools yet" if role in ("tool", "function") else ""
        raise _invalid(f"{where}.role", f"expected one of {', '.join(_ROLES)}{hint}")
    for name in _beside(message, {"role", "content"}):
        if name in _UNSUPPORTED:
            raise _invalid(f"{where}.{name}", "not supported by this server yet; leave it out")
        if name not in _WITHOUT_EFFECT and not ignore_unknown:
            raise _invalid(f"{where}.{quoted(name)}", "not a field of a message")
        unused.add(f"messages.{name}")
    content = message.get("content")
    if isinstance(content, list):
        content = [
            _part(part, f"{where}.content[{index}]", unused, ignore_unknown=ignore_unknown)
            for index, part in enumerate(content)
        ]
    elif not isinstance(content, str):
        raise _invalid(f"{where}.content", "expected text, or an array of parts of type text")
    return {"role": _ROLES[role], "content": content}


def _part(part: Any, where: str, unused: set[str], *, ignore_unknown: bool) -> Object:
    if not isinstance(part, dict):
        raise _invalid(where, "expected an object with type and text")
    kind = part.get("type")
    if kind != "text":
        named = kind if isinstance(kind, str) and kind in _UNSUPPORTED_PARTS else "this type"
        raise _invalid(where, f"parts of {named} are not supported; only those of type text are")
    if not isinstance(part.get("text"), str):
        raise _invalid(f"{where}.text", "expected text")
    for name in _beside(part, {"type", "text"}):
        if name not in _PART_WITHOUT_EFFECT and not ignore_unknown:
            raise _invalid(f"{where}.{quoted(name)}", "not a field of a part of type text")
        unused.add(f"messages.content.{name}")
    return {"type": "text", "text": part["text"]}


def _beside(fields: Mapping[str, Any], known: set[str]) -> list[str]:
    """The names of other fields that hold something; false and 0 are something."""
    return [
        name
        for name, value in fields.items()
        if name not in known and value is not None and value not in ("", [], {})
    ]


def _invalid(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: {what}", details={"field": where})
