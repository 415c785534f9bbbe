"""What models of several families write when they call tools, and what that is."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any

from trio_worker.markup.style import CallStyle, Marks, Style
from trio_worker.protocol.prompt import Form, Tool

WEATHER = Tool(
    name="get_weather",
    description="The weather of a place.",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "where": {"type": "object"},
                "hours": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        }
    ),
)
NOW = Tool(name="now", description="The time.")
TOOLS = (WEATHER, NOW)
FORM = Form(finds_reasoning=True, tools=TOOLS)


def style(family: str) -> Style:
    """As mlx-lm knows it, for a model that also thinks between `<think>` marks."""
    module: Any = importlib.import_module(f"mlx_lm.tool_parsers.{family}")
    return Style(
        reasoning=Marks(start="<think>", end="</think>"),
        calls=CallStyle(
            format=family,
            start=module.tool_call_start,
            end=module.tool_call_end,
            parse=module.parse_tool_call,
        ),
    )


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Recorded:
    """An answer, and what it comes to."""

    family: str
    text: str
    calls: tuple[Call, ...]
    content: str = ""
    reasoning: str = ""


BERN = {"city": "Bern", "days": 3}
RICH = {
    "city": 'Zürich\n"Altstadt" } ] \\ </',
    "days": 3,
    "exact": True,
    "where": {"a": [1, {"b": "}"}], "c": None},
    "hours": [1, 2],
}

RECORDED = [
    Recorded(
        "json_tools",
        "<think>\nThe user wants\n the weather. \n</think>\n\nI shall look.\n"
        f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(RICH)}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        (Call("get_weather", RICH), Call("now", {})),
        content="I shall look.\n",
        reasoning="The user wants\n the weather.",
    ),
    Recorded(
        "json_tools",
        '<tool_call>{"arguments":{"city":"Bern","days":3},"name":"get_weather"}</tool_call>'
        '<tool_call>{"name":"now"}</tool_call>'
        '<tool_call>{"name":"get_weather","arguments":"{\\"city\\": \\"Bern\\"}"}</tool_call>',
        (Call("get_weather", BERN), Call("now", {}), Call("get_weather", {"city": "Bern"})),
    ),
    Recorded(
        "json_tools",
        '<tool_call>{"name":"get_weather","arguments":{"city":"a </tool_call> b"},"x":[1]}'
        "</tool_call>\n\nThat is all.",
        (Call("get_weather", {"city": "a </tool_call> b"}),),
        content="That is all.",
    ),
    Recorded(
        "qwen3_coder",
        "Let me see.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"
        f"{RICH['city']}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "<parameter=exact>\ntrue\n</parameter>\n<parameter=where>\n"
        f"{json.dumps(RICH['where'])}\n</parameter>\n<parameter=hours>\n[1, 2]\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        (Call("get_weather", RICH), Call("now", {})),
        content="Let me see.\n\n",
    ),
    Recorded(
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(RICH)}[TOOL_CALLS]now[ARGS]{{}}",
        (Call("get_weather", RICH), Call("now", {})),
    ),
    Recorded(
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(BERN)}now[ARGS]{{}}",
        (Call("get_weather", BERN), Call("now", {})),
    ),
    Recorded(
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Bern", "days": 3}, '
        '"id": "a1B2c3D4e"}, {"name": "now", "arguments": {}}]',
        (Call("get_weather", BERN, id="a1B2c3D4e"), Call("now", {})),
    ),
    Recorded(
        "glm47",
        "<think>Weather.</think><tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Bern <b></arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        "<arg_key>where</arg_key><arg_value>"
        f"{json.dumps(RICH['where'])}</arg_value></tool_call>\n<tool_call>now</tool_call>",
        (
            Call("get_weather", {"city": "Bern <b>", "days": 3, "where": RICH["where"]}),
            Call("now", {}),
        ),
        reasoning="Weather.",
    ),
    Recorded(
        "longcat",
        "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
        "<longcat_arg_value>Bern</longcat_arg_value>\n<longcat_arg_key>days</longcat_arg_key>\n"
        "<longcat_arg_value>3</longcat_arg_value>\n</longcat_tool_call>",
        (Call("get_weather", BERN),),
    ),
    Recorded(
        "kimi_k2",
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{json.dumps(RICH)}<|tool_call_end|>"
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        (
            Call("get_weather", RICH, id="functions.get_weather:0"),
            Call("now", {}, id="functions.now:1"),
        ),
        content="I look.",
    ),
    Recorded(
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Bern'
        '</parameter>\n<parameter name="days">3</parameter>\n<parameter name="exact">true'
        '</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>\n',
        (Call("get_weather", {**BERN, "exact": True}), Call("now", {})),
    ),
    Recorded(
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Bern {<|"|>,days:3,where:{a:<|"|>}<|"|>}}'
        "<tool_call|><|tool_call>call:now{}<tool_call|>",
        (
            Call("get_weather", {"city": "Bern {", "days": 3, "where": {"a": "}"}}),
            Call("now", {}),
        ),
    ),
    Recorded(
        "pythonic",
        "<|tool_call_start|>[get_weather(city='Bern', days=3), now()]<|tool_call_end|>Wait.",
        (Call("get_weather", BERN), Call("now", {})),
        content="Wait.",
    ),
]
