"""Grammars in llguidance's Lark by which nothing but calls in a format can be written.

Whatever is written by them is read as calls of the tools (`reader.py`), with arguments that their
schemas accept: but for a JSON value that has the mark of an argument's end in one of its strings,
where the format writes arguments one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from trio_worker.markup.argument_grammar import Spelling, arguments_rule
from trio_worker.markup.lark import (
    ANY_TEXT,
    NotEnforceable,
    Prepare,
    Rules,
    TokenOf,
    both,
    containing,
    literal,
)
from trio_worker.markup.style import CallStyle
from trio_worker.markup.tools import json_text, parameters_of
from trio_worker.protocol.prompt import Tool

_Arguments: TypeAlias = Callable[[Tool], str]
"""The rule of a tool's arguments."""

__all__ = ["NotEnforceable", "Prepare", "TokenOf", "call_rules", "call_rules_after_text"]


def call_rules(
    calls: CallStyle,
    tools: Sequence[Tool],
    *,
    most: int,
    token_of: TokenOf,
    prepare: Prepare = lambda schema: schema,
) -> str:
    """Rules of which `calls` is one call of these tools, or up to `most` of them.

    All other rules and terminals are named `call_…` and `CALL_…`.

    Raises NotEnforceable: for a format that there is no grammar of, and where the format cannot
    carry what the schema of a strict tool asks for.
    """
    rules = Rules(token_of, prepare)
    section, many = _section(rules, calls, tools, most, all_strict=True)
    start = rules.mark(calls.start)
    more = f" ({_BETWEEN[calls.format]} {start} {section}){{0,{many - 1}}}" if many > 1 else ""
    return rules.text(f"calls: {start} {section}{more}")


def call_rules_after_text(
    calls: CallStyle,
    tools: Sequence[Tool],
    *,
    most: int,
    token_of: TokenOf,
    prepare: Prepare = lambda schema: schema,
) -> str:
    """The same with any text before, between and after the calls, or no call at all.

    The text never spells out the mark that calls begin with. Only the arguments of strict tools
    are held to their schemas.
    """
    rules = Rules(token_of, prepare)
    section, many = _section(rules, calls, tools, most, all_strict=False)
    before = rules.before(calls.start)
    rest = rules.terminal(both(ANY_TEXT, [containing(calls.start)]))
    return rules.text(f"calls: ({before} {section}){{0,{many}}} {rest}")


def _section(
    rules: Rules,
    calls: CallStyle,
    tools: Sequence[Tool],
    most: int,
    *,
    all_strict: bool,
) -> tuple[str, int]:
    """The rule of what follows a section's start mark, and how many sections there may be."""

    def arguments(tool: Tool) -> str:
        if tool.parameters is None:
            return literal("{}")
        if not (tool.strict or all_strict):
            return rules.json({"type": "object"})
        return rules.json({**parameters_of(tool), "type": "object"})

    def spelled(spelling: Spelling) -> _Arguments:
        return lambda tool: arguments_rule(
            rules, parameters_of(tool), spelling, outer=calls.end, strict=tool.strict
        )

    mark = rules.mark
    match calls.format:
        case "json_tools":
            call = rules.any_of(
                f'{literal("""{"name": """ + json_text(tool.name) + """, "arguments": """)} '
                f'{arguments(tool)} "}}"'
                for tool in tools
            )
            return rules.rule(f'"\\n" {call} "\\n" {mark(calls.end)}'), most
        case "mistral":
            return rules.any_of(
                f"{literal(tool.name)} {mark('[ARGS]')} {arguments(tool)}" for tool in tools
            ), most
        case "kimi_k2":
            begin, end = mark("<|tool_call_begin|>"), mark("<|tool_call_end|>")
            argue = f"/[0-9]{{1,3}}/ {mark('<|tool_call_argument_begin|>')}"
            call = rules.any_of(
                f"{begin} {literal(f'functions.{tool.name}:')} {argue} {arguments(tool)} {end}"
                for tool in tools
            )
            return rules.rule(f"{call}{{1,{most}}} {mark(calls.end)}"), 1
        case "qwen3_coder":
            spell = spelled(_QWEN)
            call = rules.any_of(
                f'{literal(f"<function={tool.name}>" + chr(10))} {spell(tool)} "</function>\\n"'
                for tool in tools
            )
            return rules.rule(f'"\\n" {call} {mark(calls.end)}'), most
        case "glm47" | "laguna":
            spell = spelled(_GLM)
            call = rules.any_of(f'{literal(tool.name)} "\\n"? {spell(tool)}' for tool in tools)
            return rules.rule(f"{call} {mark(calls.end)}"), most
        case other:
            raise NotEnforceable(f"calls as this model writes them ({other}) cannot be enforced")


_BETWEEN = {
    "glm47": '"\\n"?',
    "json_tools": '"\\n"',
    "kimi_k2": "",
    "laguna": '"\\n"?',
    "mistral": "",
    "qwen3_coder": '"\\n"',
}
"""What stands between two sections."""

_QWEN = Spelling(
    before=lambda _rules, key: literal(f"<parameter={key}>\n"),
    end="</parameter>",
    after='"\\n"',
    json_types=("array", "boolean", "integer", "number", "object"),
    has_lines=True,
    never=("[nN][uU][lL][lL]",),
)
_GLM = Spelling(
    before=lambda rules, key: (
        f"{rules.mark('<arg_key>')} {literal(key)} {rules.mark('</arg_key>')} "
        f'"\\n"? {rules.mark("<arg_value>")}'
    ),
    end="</arg_value>",
    after='"\\n"?',
    json_types=None,
    has_lines=False,
)
