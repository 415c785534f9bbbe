"""Tools, and which of them are to be called, in OpenAI's form and with its words for faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from trio_worker.protocol.prompt import Tool, ToolUse, Wanted
from trio_worker.wire.native.faults import check_name, invalid_value, missing, refused, too_long
from trio_worker.wire.native.schemas import check_object, check_strict, schema_text

TOOLS_MAX = 128
_CHOICES = "'none', 'auto', and 'required'"


class _Function(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    function: _Function | None = None
    custom: Any = None


class _Named(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class _NamedTool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    function: _Named | None = None


class _Allowed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: str
    tools: list[_NamedTool]


class _Choice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    function: _Named | None = None
    allowed_tools: _Allowed | None = None


ToolChoiceField: TypeAlias = str | _Choice


def tools_wanted(
    given: Sequence[ToolField],
    choice: ToolChoiceField | None,
    *,
    parallel: bool | None,
) -> Wanted:
    """What is wanted of tools, and nothing else; none of it where none is to be called.

    Raises `InvalidRequest`, with the place in `details.field`.
    """
    if not given:
        _check_unaccompanied(tool_choice=choice, parallel_tool_calls=parallel)
        return Wanted()
    if len(given) > TOOLS_MAX:
        raise too_long("array", len(given), TOOLS_MAX, "tools")
    tools = tuple(_tool(each, f"tools[{place}]") for place, each in enumerate(given))
    names = _distinct_names(tools)
    is_parallel = parallel is not False
    if isinstance(choice, _Choice):
        return _of_some(tools, names, choice, is_parallel=is_parallel)
    match choice:
        case None | "auto":
            return Wanted(tools=tools, parallel_calls=is_parallel)
        case "required":
            return Wanted(tools=tools, tool_use=ToolUse.REQUIRED, parallel_calls=is_parallel)
        case "none":
            return Wanted()
        case _:
            raise invalid_value(choice, _CHOICES, "tool_choice")


def _check_unaccompanied(**fields: object) -> None:
    for name, value in fields.items():
        if value is not None:
            raise refused(
                f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified.",
                name,
            )


def _tool(given: ToolField, where: str) -> Tool:
    if given.type != "function":
        raise invalid_value(given.type, "'function'", f"{where}.type")
    function = given.function
    if function is None or given.custom is not None:
        raise missing(f"{where}.function")
    check_name(function.name, f"{where}.function.name")
    return Tool(
        name=function.name,
        description=function.description,
        parameters=_parameters(function, f"{where}.function.parameters"),
        strict=bool(function.strict),
    )


def _parameters(function: _Function, where: str) -> str | None:
    if function.parameters is None:
        return None
    whose = f"function '{function.name}'"
    text = schema_text({"type": "object", **function.parameters}, where)
    check_object(function.parameters, whose, where)
    if function.strict:
        check_strict(function.parameters, whose, where)
    return text


def _distinct_names(tools: Sequence[Tool]) -> set[str]:
    names: set[str] = set()
    for place, tool in enumerate(tools):
        if tool.name in names:
            where = f"tools[{place}].function.name"
            raise refused(f"{where}: another tool has the name {tool.name}", where)
        names.add(tool.name)
    return names


def _of_some(
    tools: tuple[Tool, ...], names: set[str], choice: _Choice, *, is_parallel: bool
) -> Wanted:
    """All are told, and some of them may be called."""
    match choice.type:
        case "function":
            if choice.function is None:
                raise missing("tool_choice.function")
            _check_known(choice.function.name, names, "tool_choice.function.name")
            # It is to be called, not to be called again and again.
            return Wanted(
                tools=tools,
                tool_use=ToolUse.REQUIRED,
                allowed_tools=(choice.function.name,),
                parallel_calls=False,
            )
        case "allowed_tools":
            if choice.allowed_tools is None:
                raise missing("tool_choice.allowed_tools")
            return Wanted(
                tools=tools,
                tool_use=_mode(choice.allowed_tools.mode),
                allowed_tools=_allowed(choice.allowed_tools.tools, names),
                parallel_calls=is_parallel,
            )
        case _:
            raise invalid_value(choice.type, "'function' and 'allowed_tools'", "tool_choice.type")


def _mode(mode: str) -> ToolUse:
    if mode not in list(ToolUse):
        raise invalid_value(mode, "'auto' and 'required'", "tool_choice.allowed_tools.mode")
    return ToolUse(mode)


def _allowed(given: Sequence[_NamedTool], names: set[str]) -> tuple[str, ...]:
    where = "tool_choice.allowed_tools.tools"
    if not given:
        raise refused(f"{where}: expected one tool at least", where)
    for place, each in enumerate(given):
        if each.type != "function":
            raise invalid_value(each.type, "'function'", f"{where}[{place}].type")
        if each.function is None:
            raise missing(f"{where}[{place}].function")
        _check_known(each.function.name, names, f"{where}[{place}].function.name")
    return tuple(dict.fromkeys(each.function.name for each in given if each.function))


def _check_known(name: str, names: set[str], where: str) -> None:
    if name not in names:
        raise refused(
            f"Tool choice 'function' not found in 'tools' parameter: {name[:64]!r} is none of "
            "them.",
            where,
        )
