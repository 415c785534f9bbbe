"""How each format of calls is streamed, by mlx-lm's name of it.

| format | what is handed out |
|---|---|
| `json_tools`, `kimi_k2`, `mistral` | the name, then the arguments as they come |
| `glm47`, `laguna`, `longcat`, `minimax_m2`, `qwen3_coder` | the name, then argument by argument |
| every other | the call, when its end mark has come |
"""

from __future__ import annotations

import re

from trio_worker.markup.calls import Calls, Section, WholeSection
from trio_worker.markup.finding import begun_pattern, literally, whole_pattern
from trio_worker.markup.json_calls import JsonLayout, JsonSection
from trio_worker.markup.style import Style
from trio_worker.markup.xml_calls import XmlLayout, XmlSection

_SPACE = r"\s{0,64}"
_NAME = r"(?P<name>[\w.:/-]{1,128})"
_JSON_HEAD = (
    *(_SPACE, r"\{", _SPACE, *literally('"name"'), _SPACE, ":", _SPACE, '"', _NAME, '"'),
    *(_SPACE, ",", _SPACE, *literally('"arguments"'), _SPACE, ":", _SPACE, r"\{"),
)
_KIMI_HEAD = (
    *(_SPACE, *literally("<|tool_call_begin|>"), _SPACE),
    *(r"(?P<name>[\w./-]{1,128})", ":", r"(?P<number>\d{1,6})"),
    *(_SPACE, *literally("<|tool_call_argument_begin|>"), _SPACE, r"\{"),
)
_MISTRAL_HEAD = (_SPACE, r"(?P<name>[\w-]{1,128})", _SPACE, *literally("[ARGS]"), _SPACE, r"\{")
_QWEN_HEAD = (_SPACE, *literally("<function="), _NAME, _SPACE, ">")
_MINIMAX_HEAD = (_SPACE, *literally('<invoke name="'), _NAME, '"', _SPACE, ">")

_JSON = {
    "json_tools": JsonLayout(
        head=whole_pattern(*_JSON_HEAD), begun_head=begun_pattern(*_JSON_HEAD), depth=1
    ),
    "kimi_k2": JsonLayout(
        head=whole_pattern(*_KIMI_HEAD),
        begun_head=begun_pattern(*_KIMI_HEAD),
        end="<|tool_call_end|>",
        has_several=True,
        name_space="functions.",
    ),
    "mistral": JsonLayout(
        head=whole_pattern(*_MISTRAL_HEAD),
        begun_head=begun_pattern(*_MISTRAL_HEAD),
        has_several=True,
    ),
}


def _keyed_by_tags(tag: str) -> XmlLayout:
    """`f<arg_key>a</arg_key><arg_value>1</arg_value>`, where `tag` is `arg`."""
    start = f"<{tag}_key>"
    return XmlLayout(
        head=re.compile(f"{_SPACE}{_NAME}{_SPACE}(?={start})"),
        begun_head=begun_pattern(_SPACE, _NAME, _SPACE, *literally(start)),
        argument=(start, f"</{tag}_value>"),
        key=re.compile(rf"\s*(?P<key>[^<]*?)\s*</{tag}_key>\s*<{tag}_value>"),
        whole=lambda name, argument: name + argument,
        has_other_forms=True,
    )


_XML = {
    "glm47": _keyed_by_tags("arg"),
    "laguna": _keyed_by_tags("arg"),
    "longcat": _keyed_by_tags("longcat_arg"),
    "minimax_m2": XmlLayout(
        head=whole_pattern(*_MINIMAX_HEAD),
        begun_head=begun_pattern(*_MINIMAX_HEAD),
        argument=("<parameter name=", "</parameter>"),
        key=re.compile(r"\s*[\"']?(?P<key>[^>\"']*)[\"']?\s*>"),
        end="</invoke>",
        has_several=True,
        whole=lambda name, argument: f'<invoke name="{name}">{argument}</invoke>',
    ),
    "qwen3_coder": XmlLayout(
        head=whole_pattern(*_QWEN_HEAD),
        begun_head=begun_pattern(*_QWEN_HEAD),
        argument=("<parameter=", "</parameter>"),
        key=re.compile(r"\s*(?P<key>[^\s<>]+)>?"),
        end="</function>",
        whole=lambda name, argument: f"<function={name}>{argument}</function>",
    ),
}
_WITHIN = {
    "function_gemma": ("<escape>",),
    "gemma4": ('<|"|>',),
    "kimi_k2": ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    "kimi_k3": ("<|open|>", "<|close|>", "<|sep|>"),
    "mistral": ("[ARGS]",),
}


def section_of(calls: Calls) -> Section:
    """What reads one section of `calls`, which their style writes."""
    if (json_layout := _JSON.get(calls.style.format)) is not None:
        return JsonSection(json_layout, calls)
    if (xml_layout := _XML.get(calls.style.format)) is not None:
        return XmlSection(xml_layout, calls)
    return WholeSection(calls)


def marks_of(style: Style) -> tuple[str, ...]:
    """Every text that a vocabulary may have as a token of its own, and that is part of a mark."""
    reasoning, calls = style.reasoning, style.calls
    marks = [] if reasoning is None else [reasoning.start, reasoning.end]
    if calls is not None:
        marks += [calls.start, calls.end, *_WITHIN.get(calls.format, ())]
    return tuple(mark for mark in marks if mark)
