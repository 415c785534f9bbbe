"""Which grammar an answer keeps to, from what its caller wants and how the model writes.

1. Calls that must come are all that there is to the answer.
2. What the answer itself is to be like, it is; where tools may be called, calls may come instead.
3. Calls of strict tools may come after any text, and keep to their schemas.
4. Everything else is read as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trio_worker.grammar import NOT_BY_BYTES, GrammarRefused, schema
from trio_worker.grammar.composed import composed
from trio_worker.grammar.matching import Grammars
from trio_worker.grammar.rules import answer_rules
from trio_worker.markup.call_grammar import NotEnforceable, call_rules, call_rules_after_text
from trio_worker.markup.style import Style
from trio_worker.protocol.prompt import Constraint, JsonSchema, Tool, ToolUse, Wanted

CALLS_MAX = 8
"""Of one answer whose calls keep to a grammar: models repeat themselves."""
TOOLS_BYTES_MAX = 128 * 1024
"""The schemas of all tools whose calls keep to a grammar, together."""
NO_ARGUMENTS = '{"type": "object", "properties": {}, "additionalProperties": false}'
BEGINNING = "{"
"""A schema that is too complex shows it in what may follow this."""


class FormRefused(Exception):
    """Such an answer cannot be had."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        """The place in the request that is at fault."""
        self.message = message


def grammar_of(
    wanted: Wanted, style: Style, grammars: Grammars | None, *, starts_in_reasoning: bool = False
) -> str:
    """Lark for all of an answer; "": it may be anything. Raises `FormRefused`.

    `style` says how this answer's reasoning and calls are written. May take some seconds.
    """
    constraint = None if wanted.tool_use is ToolUse.REQUIRED else wanted.constraint
    tools = callable_tools(wanted)
    calls_are_held = bool(tools) and _calls_are_held(wanted, tools)
    if constraint is None and not calls_are_held:
        return ""
    field = _field(constraint, wanted)
    if grammars is None:
        raise FormRefused(field, NOT_BY_BYTES)
    answer = "" if constraint is None else _answer(constraint, field, grammars)
    calls = _calls(wanted, tools, style, grammars, field) if calls_are_held else ""
    grammar = composed(
        answer=answer,
        calls=calls,
        marks=style.reasoning,
        starts_in_reasoning=starts_in_reasoning,
        parts_of=grammars.parts_of,
    )
    try:
        grammars.check(grammar)
    except GrammarRefused as exc:
        raise FormRefused(field, str(exc)) from None
    return grammar


def callable_tools(wanted: Wanted) -> tuple[Tool, ...]:
    """Those of which calls are wanted; the others are only told of."""
    allowed = wanted.allowed_tools
    return tuple(tool for tool in wanted.tools if not allowed or tool.name in allowed)


def _calls_are_held(wanted: Wanted, tools: Sequence[Tool]) -> bool:
    """Whether calls keep to a grammar, all of them or those of strict tools."""
    is_all = wanted.tool_use is ToolUse.REQUIRED or wanted.constraint is not None
    return is_all or any(tool.strict for tool in tools)


def _field(constraint: Constraint | None, wanted: Wanted) -> str:
    if constraint is not None:
        return "response_format" if isinstance(constraint, JsonSchema) else "grammar"
    return "tool_choice" if wanted.tool_use is ToolUse.REQUIRED else "tools"


def _answer(constraint: Constraint, field: str, grammars: Grammars) -> str:
    """The rules of an answer that somebody can keep to."""
    try:
        rules = answer_rules(constraint)
        grammars.check(composed(answer=rules, parts_of=grammars.parts_of), BEGINNING)
    except GrammarRefused as exc:
        message = str(exc)
        if isinstance(constraint, JsonSchema):
            message = _placed(constraint.schema, message)
        raise FormRefused(field, message) from None
    return rules


def _calls(
    wanted: Wanted, tools: Sequence[Tool], style: Style, grammars: Grammars, field: str
) -> str:
    if style.calls is None:
        raise FormRefused("tools", "nothing is known of how this model writes calls")
    follow_text = wanted.tool_use is ToolUse.AUTO and wanted.constraint is None
    held = [tool for tool in tools if tool.strict] if follow_text else tools
    if sum(len(tool.parameters or "") for tool in held) > TOOLS_BYTES_MAX:
        raise FormRefused("tools", f"the tools' schemas are longer than {TOOLS_BYTES_MAX} bytes")
    for tool in held:
        _check_tool(tool, f"tools[{wanted.tools.index(tool)}].parameters", grammars)
    try:
        return (call_rules_after_text if follow_text else call_rules)(
            style.calls,
            [_without_more(tool) for tool in tools],
            most=CALLS_MAX if wanted.parallel_calls else 1,
            token_of=grammars.token_of,
            prepare=schema.prepared,
        )
    except NotEnforceable as exc:
        raise FormRefused(field, str(exc)) from None


def _without_more(tool: Tool) -> Tool:
    """One that says nothing of arguments takes none; as a schema, nothing would let any come."""
    return replace(tool, parameters=NO_ARGUMENTS) if tool.parameters is None else tool


def _check_tool(tool: Tool, field: str, grammars: Grammars) -> None:
    if tool.parameters is None:
        return
    try:
        rule = schema.lark({**schema.read(tool.parameters), "type": "object"})
        grammars.check(f"start: {rule}\n", BEGINNING)
    except GrammarRefused as exc:
        raise FormRefused(field, _placed(tool.parameters, str(exc))) from None


def _placed(text: str, message: str) -> str:
    """The message with its place in this schema; of one that could not be read, as it is."""
    try:
        return schema.placed(schema.read(text), message)
    except GrammarRefused:
        return message
