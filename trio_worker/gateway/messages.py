"""The messages of a chat, from OpenAI's shape to the wire's.

Programs that append what a client library gave them send back everything that was in it, empty
fields too; those are dropped. What has a meaning that a worker cannot give it is refused. Whether
calls and their results belong together is the worker's to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trio_worker.gateway.json_body import Object, invalid, quoted

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Roles as they are sent, and as the wire names them."""
_REASONING = ("reasoning_content", "reasoning")
"""Two names that servers have for it; the first is the wire's, and comes before the other."""
_OF_ROLE: Mapping[str, tuple[str, ...]] = {
    "assistant": ("tool_calls", *_REASONING),
    "tool": ("tool_call_id",),
}
"""What else a message may have beside role, content and name."""
_UNSUPPORTED = {
    "audio": "not supported by this server; leave it out",
    "function_call": "the old form of tool_calls; send those",
    "refusal": "not supported by this server; leave it out",
    "tool_call_id": "only in messages of role tool",
    "tool_calls": "only in messages of role assistant",
}
"""Refused where a message has no place for it, even if unknown fields are ignored."""
_UNSUPPORTED_PARTS = {"image_url", "input_audio", "file", "refusal"}

_MESSAGE, _PART = "messages", "messages.content"
_CALL, _FUNCTION = "messages.tool_calls", "messages.tool_calls.function"
"""Where a field is that has no effect."""
_KINDS = {
    _MESSAGE: "a message",
    _PART: "a part of type text",
    _CALL: "a call",
    _FUNCTION: "a called function",
}
_WITHOUT_EFFECT = {
    f"{_PART}.cache_control",
    # What OpenAI's client for Python adds to what it has parsed.
    f"{_MESSAGE}.parsed",
    f"{_FUNCTION}.parsed_arguments",
    # Left over where a program has put a stream together by itself.
    f"{_CALL}.index",
}


def to_wire(messages: Any, *, ignore_unknown: bool) -> tuple[list[Object], set[str]]:
    """The messages as a worker takes them, and the names of what was there without effect.

    Raises `InvalidRequest`, with the place in `details.field`.
    """
    if not isinstance(messages, list):
        raise invalid("messages", "expected an array of messages")
    reader = _Reader(ignore_unknown=ignore_unknown)
    wire = [reader.message(message, f"messages[{n}]") for n, message in enumerate(messages)]
    return wire, reader.unused


class _Reader:
    """Reads the messages of one request, and remembers the names of what has no effect."""

    def __init__(self, *, ignore_unknown: bool) -> None:
        self.unused: set[str] = set()
        self._ignore_unknown = ignore_unknown

    def message(self, message: Any, where: str) -> Object:
        if not isinstance(message, dict):
            raise invalid(where, "expected an object with role and content")
        role = _role(message.get("role"), where)
        beside = _beside(message, {"role", "content"})
        known = ("name", *_OF_ROLE.get(role, ()))
        others = [name for name in beside if name not in known]
        for name in others:
            if name in _UNSUPPORTED:
                raise invalid(f"{where}.{name}", _UNSUPPORTED[name])
        self._pass_over(others, where, _MESSAGE)
        wire: Object = {"role": role}
        # A message that calls need not say anything.
        if message.get("content") is not None or "tool_calls" not in beside:
            wire["content"] = self._content(message.get("content"), f"{where}.content")
        for name in (each for each in known if each in beside):
            value, at = beside[name], f"{where}.{name}"
            if name == "tool_calls":
                wire[name] = self._calls(value, at)
            elif not isinstance(value, str):
                raise invalid(at, "expected text")
            else:
                wire.setdefault(_REASONING[0] if name in _REASONING else name, value)
        return wire

    def _content(self, content: Any, where: str) -> Any:
        if isinstance(content, list):
            return [self._part(each, f"{where}[{n}]") for n, each in enumerate(content)]
        if not isinstance(content, str):
            raise invalid(where, "expected text, or an array of parts of type text")
        return content

    def _part(self, part: Any, where: str) -> Object:
        if not isinstance(part, dict):
            raise invalid(where, "expected an object with type and text")
        kind = part.get("type")
        if kind != "text":
            named = kind if isinstance(kind, str) and kind in _UNSUPPORTED_PARTS else "this type"
            only = "only those of type text are"
            raise invalid(where, f"parts of {named} are not supported; {only}")
        if not isinstance(part.get("text"), str):
            raise invalid(f"{where}.text", "expected text")
        self._pass_over(_beside(part, {"type", "text"}), where, _PART)
        return {"type": "text", "text": part["text"]}

    def _calls(self, calls: Any, where: str) -> list[Object]:
        if not isinstance(calls, list):
            raise invalid(where, "expected an array of calls")
        return [self._call(call, f"{where}[{n}]") for n, call in enumerate(calls)]

    def _call(self, call: Any, where: str) -> Object:
        if not isinstance(call, dict):
            raise invalid(where, "expected an object with id, type and function")
        wire = self._known(call, {"id", "type", "function"}, where, _CALL)
        if isinstance(wire.get("function"), dict):
            known, at = {"name", "arguments"}, f"{where}.function"
            wire["function"] = self._known(wire["function"], known, at, _FUNCTION)
        return wire

    def _known(self, given: Object, known: set[str], where: str, within: str) -> Object:
        self._pass_over(_beside(given, known), where, within)
        return {name: value for name, value in given.items() if name in known}

    def _pass_over(self, names: Iterable[str], where: str, within: str) -> None:
        """Note the names of what has no effect; what should have one is refused."""
        for name in names:
            unused = f"{within}.{name}"
            if unused not in _WITHOUT_EFFECT and not self._ignore_unknown:
                raise invalid(f"{where}.{quoted(name)}", f"not a field of {_KINDS[within]}")
            self.unused.add(unused)


def _role(role: Any, where: str) -> str:
    if isinstance(role, str) and role in _ROLES:
        return _ROLES[role]
    hint = "; the results of calls are sent in role tool" if role == "function" else ""
    raise invalid(f"{where}.role", f"expected one of {', '.join(_ROLES)}{hint}")


def _beside(fields: Mapping[str, Any], known: set[str]) -> Object:
    """The other fields that hold something; false and 0 are something."""
    return {
        name: value
        for name, value in fields.items()
        if name not in known and value is not None and value not in ("", [], {})
    }
