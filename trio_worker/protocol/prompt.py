"""What is to be answered and in what form: what goes to the tokeniser, and what comes back.

The form that a caller wants is worked out where the prompt is tokenised, since it depends on the
model: on its vocabulary, and on how its family writes reasoning and tool calls.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from trio_worker.protocol.value import Value

GENERAL_TOOL_PROMPT = "general_tool_prompt"
"""The note that the model's template knows no tools, and was told of them in general words."""

NO_TEMPLATE_VARIABLES = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversations"),
        *("messages", "return_assistant_tokens_mask", "return_dict", "tokenize", "tools"),
    }
)
"""What a caller's variables must not be named: it is said otherwise, or belongs to the library."""


class ToolCall(Value, frozen=True, kw_only=True):
    """A call that an earlier answer made."""

    id: str
    name: str
    arguments: str
    """JSON, of an object."""


class Message(Value, frozen=True, kw_only=True):
    """One message of a chat."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    name: str | None = None
    reasoning: str | None = None
    """Of an assistant."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant."""
    tool_call_id: str | None = None
    """Of a tool: which call this is the result of."""


class Tool(Value, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: str | None = None
    """Their JSON Schema, as JSON; None: it takes none."""
    strict: bool = False
    """Its arguments always keep to the schema."""


class JsonSchema(Value, frozen=True, kw_only=True, tag=True):
    """The answer is JSON that this schema, which is JSON itself, accepts."""

    schema: str


class Regex(Value, frozen=True, kw_only=True, tag=True):
    """The answer as a whole matches."""

    pattern: str


class Choice(Value, frozen=True, kw_only=True, tag=True):
    """The answer is one of these."""

    options: tuple[str, ...]


class Lark(Value, frozen=True, kw_only=True, tag=True):
    """The answer keeps to a grammar in llguidance's Lark."""

    grammar: str


Constraint: TypeAlias = JsonSchema | Regex | Choice | Lark


class ToolUse(StrEnum):
    """Whether there are to be calls; where there are to be none, no tools are sent."""

    AUTO = "auto"
    REQUIRED = "required"


class Wanted(Value, frozen=True, kw_only=True):
    """What the answer is to be like, as far as its caller has said so."""

    constraint: Constraint | None = None
    tools: tuple[Tool, ...] = ()
    """All of them are told to the model."""
    tool_use: ToolUse = ToolUse.AUTO
    allowed_tools: tuple[str, ...] = ()
    """The names of those that may be called; none: all of them."""
    parallel_calls: bool = True
    max_reasoning_tokens: int | None = None
    template_variables: str = ""
    """For the chat template: JSON, of an object; "" is none."""


ANYTHING = Wanted()


class Form(Value, frozen=True, kw_only=True):
    """How an answer's tokens are drawn and its text is taken apart.

    The engine works it out when it tokenises; it comes back with each admission, unread.
    """

    grammar: str = ""
    """What the answer keeps to, in llguidance's Lark; "" is nothing."""
    finds_reasoning: bool = False
    starts_in_reasoning: bool = False
    """The prompt ends within it."""
    max_reasoning_tokens: int | None = None
    """After this many the reasoning is ended."""
    tools: tuple[Tool, ...] = ()
    """Calls of these are found; with none, nothing is taken for a call."""
    is_general: bool = False
    """Calls are written as the general prompt says rather than as the model's family does."""
    one_call: bool = False
    """The answer ends after its first call."""


FREE = Form()


class Prompt(Value, frozen=True, kw_only=True):
    """A prompt that can be computed."""

    tokens: tuple[int, ...]
    form: Form = FREE
    notes: tuple[str, ...] = ()
    """What was not done quite as asked, in a word each, for `worker.degraded`."""


# --- what comes beside the text of an answer ----------------------------------------------


class Reasoning(Value, frozen=True, kw_only=True, tag=True):
    """More of what the model thinks before it answers."""

    text: str


class CallBegun(Value, frozen=True, kw_only=True, tag=True):
    """A tool is to be called; its arguments follow."""

    index: int
    """Counts the calls of the answer from 0."""
    name: str
    id: str | None = None
    """The model's own, if it gave one."""


class CallArguments(Value, frozen=True, kw_only=True, tag=True):
    """More of a call's arguments; all of them together are JSON, unless the answer was cut off."""

    index: int
    text: str


Piece: TypeAlias = Reasoning | CallBegun | CallArguments
