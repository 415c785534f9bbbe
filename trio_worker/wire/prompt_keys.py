"""How a prompt begins, as the keys by which it finds the worker that knows that beginning.

It goes by the fields as they were sent, before they are checked: where they are none of a prompt
there is no key, and whoever takes the request in says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from trio_worker.core.prefix_order import PrefixKeys, digest
from trio_worker.wire.native import Fields

SHORT_BYTES = 1024
"""About 256 tokens: what is shorter is computed again more cheaply than it is looked for."""
_SYSTEM_BYTES = 1024
"""Stand for the system prompt where there is none, or one so short that many have it in common."""
_PROMPT_BYTES = 4096
"""Of a prompt that is plain text: what tells one from another that begins alike."""
_SYSTEM_ROLES = ("system", "developer")


def keys_of(fields: Fields, body_bytes: int) -> PrefixKeys | None:
    """The keys of a request; None where its prompt is short.

    `body_bytes`, the length of the request's body, stands for that of its prompt.
    """
    if body_bytes < SHORT_BYTES:
        return None
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return _of_text(prompt.encode())
    messages = fields.get("messages")
    return _of_messages(fields, messages) if isinstance(messages, list) else None


def _of_text(text: bytes) -> PrefixKeys | None:
    """A prompt that grows with its conversation changes its second key once at most."""
    if len(text) < SHORT_BYTES:
        return None
    end = _PROMPT_BYTES if len(text) >= _PROMPT_BYTES else _SYSTEM_BYTES
    return PrefixKeys(system=digest(text[:_SYSTEM_BYTES]), conversation=digest(text[:end]))


def _of_messages(fields: Fields, messages: list[Any]) -> PrefixKeys:
    """Tools are part of what is in common: chat templates put them before the conversation."""
    common = list(_values(fields.get("tools")))
    rest = iter(messages)
    beginning: list[bytes] = []
    for message in rest:
        if _role(message) not in _SYSTEM_ROLES:
            beginning = list(_values(message))
            break
        common += _values(message)
    else:
        message = None
    if _role(message) != "user":
        for message in rest:
            beginning += _values(message)
            if _role(message) == "user":
                break
    conversation = digest(*common, b"", *beginning)
    if sum(map(len, common)) < _SYSTEM_BYTES:
        common = [b"".join((*common, *beginning))[:_SYSTEM_BYTES]]
    return PrefixKeys(system=digest(*common), conversation=conversation)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _values(value: Any) -> Iterator[bytes]:
    """What a message, or a list of tools, says, however its fields are ordered."""
    if value is not None:
        yield msgspec.json.encode(value, order="deterministic")
