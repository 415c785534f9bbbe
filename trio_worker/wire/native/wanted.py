"""What an answer is to be like, put together from all the fields that say so."""

from __future__ import annotations

from typing import Any

import msgspec

from trio_worker.protocol.prompt import NO_TEMPLATE_VARIABLES, ToolUse, Wanted
from trio_worker.wire.native.constraints import constraint_of
from trio_worker.wire.native.faults import refused
from trio_worker.wire.native.fields import RequestFields, RequestLimits
from trio_worker.wire.native.tools import tools_wanted

_VARIABLES_BYTES_MAX = 16_384
"""Of `chat_template_kwargs` as JSON."""
_OF_MESSAGES = (
    *("tools", "tool_choice", "parallel_tool_calls", "max_reasoning_tokens"),
    *("reasoning_effort", "enable_thinking", "chat_template_kwargs"),
)
"""Of these a model learns through its chat template."""


def wanted_of(asked: RequestFields, limits: RequestLimits) -> Wanted:
    """Raises `InvalidRequest`, with the place in `details.field`."""
    if asked.messages is None:
        for name in _OF_MESSAGES:
            if getattr(asked, name) is not None:
                raise refused(f"{name}: it needs messages; a prompt is used as it is", name)
    if asked.tools and not limits.takes_tools:
        raise refused("tools: this worker is set to take none", "tools")
    constraint = constraint_of(asked.response_format, asked.grammar, allow_lark=limits.allows_lark)
    wanted = tools_wanted(asked.tools or (), asked.tool_choice, parallel=asked.parallel_tool_calls)
    return msgspec.structs.replace(
        wanted,
        # Where there have to be calls, there is no text that could keep to anything.
        constraint=None if wanted.tool_use is ToolUse.REQUIRED else constraint,
        max_reasoning_tokens=asked.max_reasoning_tokens,
        template_variables=_template_variables(asked),
    )


def _template_variables(asked: RequestFields) -> str:
    """As JSON; what is given in `chat_template_kwargs` holds before what follows from others."""
    given: dict[str, Any] = asked.chat_template_kwargs or {}
    for name in given:
        if name in NO_TEMPLATE_VARIABLES:
            raise refused(
                f"chat_template_kwargs: {name} is no variable of templates",
                "chat_template_kwargs",
            )
    variables: dict[str, Any] = {}
    if asked.reasoning_effort is not None:
        variables["reasoning_effort"] = asked.reasoning_effort
        if asked.reasoning_effort == "none":
            variables["enable_thinking"] = False
    if asked.enable_thinking is not None:
        variables["enable_thinking"] = asked.enable_thinking
    variables |= given
    if not variables:
        return ""
    try:
        text = msgspec.json.encode(variables)
    except RecursionError:
        text = b" " * (_VARIABLES_BYTES_MAX + 1)
    if len(text) > _VARIABLES_BYTES_MAX:
        raise refused(
            f"chat_template_kwargs: at most {_VARIABLES_BYTES_MAX} bytes of JSON are taken",
            "chat_template_kwargs",
            limit=_VARIABLES_BYTES_MAX,
        )
    return text.decode()
