"""Tools and calls as JSON has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trio_worker.protocol.prompt import Tool


def tool_objects(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as OpenAI writes them: what chat templates and parsers read."""
    return [{"type": "function", "function": _function_object(tool)} for tool in tools]


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments; of one that takes none, an object without properties."""
    schema = json.loads(tool.parameters) if tool.parameters else None
    return schema if isinstance(schema, dict) else {"type": "object", "properties": {}}


def _function_object(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": parameters_of(tool)}


def json_text(value: Any) -> str:
    """Raises ValueError or TypeError where JSON has no such value.

    Readable where UTF-8 can carry it: a parser may have made half a surrogate pair of an escape.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text
