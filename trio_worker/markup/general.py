"""A prompt that tells of tools in general words, for a model whose chat template knows none.

It asks for calls as the Hermes models write them, which many models have seen: each an object with
`name` and `arguments` between `<tool_call>` marks. Earlier calls and results become turns of the
two roles that every template knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from msgspec.structs import replace

from trio_worker.markup.style import CallStyle
from trio_worker.markup.tools import json_text, tool_objects
from trio_worker.protocol.prompt import Message, Tool, ToolCall

GENERAL_CALLS = CallStyle(
    format="json_tools",
    start="<tool_call>",
    end="</tool_call>",
    parse=lambda text, _tools: json.loads(text),
)

_BEFORE = """\
You may call functions to help with what the user asks. Their signatures are
between <tools> marks:
<tools>
"""
_AFTER = """
</tools>

For each call write a JSON object with the function's name and its arguments
between <tool_call> marks:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def told_of_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation in plain messages, with the tools, if any, in its system message."""
    plain = _in_plain_turns(messages)
    if not tools:
        return plain
    told = _BEFORE + "\n".join(json_text(tool) for tool in tool_objects(tools)) + _AFTER
    if plain and plain[0].role == "system":
        return [replace(plain[0], content=f"{plain[0].content}\n\n{told}".lstrip()), *plain[1:]]
    return [Message(role="system", content=told), *plain]


def _in_plain_turns(messages: Sequence[Message]) -> list[Message]:
    """Calls as their text, and the results that follow each other as one turn of the user's."""
    plain: list[Message] = []
    in_results = False
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if in_results:
                plain[-1] = replace(plain[-1], content=f"{plain[-1].content}\n{result}")
            else:
                plain.append(Message(role="user", content=result))
        elif message.tool_calls:
            calls = [_written(call) for call in message.tool_calls]
            content = "\n".join([*([message.content] if message.content else []), *calls])
            plain.append(replace(message, content=content, tool_calls=()))
        else:
            plain.append(message)
        in_results = message.role == "tool"
    return plain


def _written(call: ToolCall) -> str:
    arguments = call.arguments.strip() or "{}"
    return (
        f'<tool_call>\n{{"name": {json_text(call.name)}, "arguments": {arguments}}}\n</tool_call>'
    )
