"""Grammars of calls: what they let through is what is read, and fits the tools' schemas."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from support.recorded_calls import TOOLS, style

from trio_worker.markup.call_grammar import NotEnforceable, call_rules, call_rules_after_text
from trio_worker.markup.reader import AnswerReader
from trio_worker.protocol.prompt import CallArguments, CallBegun, Form, Tool

pytestmark = pytest.mark.mlx

BYTES = LLTokenizer("byte")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
}
TYPED = {**SCHEMA, "properties": {**SCHEMA["properties"], "where": {"type": "array"}}}
FAMILIES = ("glm47", "json_tools", "kimi_k2", "mistral", "qwen3_coder")


def tool(schema: Any, *, strict: bool = True) -> Tool:
    return Tool(name="get_weather", parameters=json.dumps(schema), strict=strict)


NOW = Tool(name="now")
TYPED_TOOLS = (tool(TYPED), NOW)


def accepts(rules: str, text: str) -> bool:
    """Whether `text` is all of an answer by these rules."""
    matcher = LLMatcher(BYTES, "start: calls\n" + rules, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


def rules_of(family: str, tools: Any = TYPED_TOOLS, *, most: int = 2, free: bool = False) -> str:
    calls = style(family).calls
    assert calls is not None
    rules = call_rules_after_text if free else call_rules
    return rules(calls, tools, most=most, token_of=lambda _: None)


def written(family: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """As the family's template writes them."""

    def one(index: int, name: str, arguments: dict[str, Any]) -> str:
        json_ = json.dumps(arguments, ensure_ascii=False)
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
        match family:
            case "json_tools":
                return f'<tool_call>\n{{"name": "{name}", "arguments": {json_}}}\n</tool_call>'
            case "mistral":
                return f"[TOOL_CALLS]{name}[ARGS]{json_}"
            case "kimi_k2":
                return (
                    f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
                    f"{json_}<|tool_call_end|>"
                )
            case "qwen3_coder":
                inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in texts.items())
                return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"
            case _:
                inner = "".join(
                    f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n"
                    for k, v in texts.items()
                )
                return f"<tool_call>{name}\n{inner}</tool_call>"

    between = "\n" if family in ("json_tools", "qwen3_coder") else ""
    text = between.join(one(index, *call) for index, call in enumerate(calls))
    if family == "kimi_k2":
        return f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>"
    return text


def read(family: str, text: str, tools: Any) -> list[tuple[str, Any]]:
    reader = AnswerReader(style(family), Form(tools=tools))
    pieces = [*reader.feed(text).pieces, *reader.finish().pieces]
    arguments = {each.index: each.text for each in pieces if isinstance(each, CallArguments)}
    begun = [each for each in pieces if isinstance(each, CallBegun)]
    return [(each.name, json.loads(arguments[each.index])) for each in begun]


GOOD: list[dict[str, Any]] = [
    {"city": "Bern", "days": 3},
    {"city": "Zürich", "days": 3, "unit": "F", "where": [1, {"a": "}"}]},
    {"city": "a\nb <c>", "days": 10, "where": []},
]
BAD: list[dict[str, Any]] = [
    {"city": "Bern"},
    {"days": 3},
    {"city": "Bern", "days": 0},
    {"city": "Bern", "days": "x"},
    {"city": "much longer than it may be", "days": 3},
    {"city": "Bern", "days": 3, "unit": "K"},
    {"city": "Bern", "days": 3, "more": 1},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_that_fit_can_be_written_and_are_what_is_read(family: str) -> None:
    rules = rules_of(family)
    for arguments in GOOD:
        calls = [("get_weather", arguments), ("now", {})]
        text = written(family, *calls)
        assert accepts(rules, text), text
        assert accepts(rules, written(family, calls[0])), text
        assert read(family, text, TYPED_TOOLS) == calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", BAD)
def test_arguments_that_do_not_fit_cannot_be_written(family: str, arguments: Any) -> None:
    assert not accepts(rules_of(family), written(family, ("get_weather", arguments)))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_so_many_calls_of_these_tools_can_be_written(family: str) -> None:
    rules = rules_of(family)
    now: tuple[str, dict[str, Any]] = ("now", {})
    assert accepts(rules, written(family, now, now))
    assert not accepts(rules, written(family, now, now, now))
    assert not accepts(rules_of(family, most=1), written(family, now, now))
    assert not accepts(rules, "")
    assert not accepts(rules, "I look. " + written(family, now))
    assert not accepts(rules, written(family, ("other", {})))
    assert not accepts(rules_of(family, [NOW]), written(family, ("get_weather", GOOD[0])))


@pytest.mark.parametrize("family", FAMILIES)
def test_after_text_calls_may_come_and_keep_to_strict_tools(family: str) -> None:
    loose = tool(TYPED, strict=False)
    rules = rules_of(family, free=True)
    call = written(family, ("get_weather", GOOD[0]))
    assert accepts(rules, "")
    assert accepts(rules, "No call <b>.\n")
    assert accepts(rules, f"I look.\n{call}")
    assert accepts(rules, f"{call}\nDone.")
    assert not accepts(rules, "I look.\n" + written(family, ("get_weather", BAD[0])))
    assert not accepts(rules, f"I look.\n{call[:-3]}")
    if family in ("json_tools", "mistral", "kimi_k2"):
        free = rules_of(family, [loose, NOW], free=True)
        assert accepts(free, written(family, ("get_weather", BAD[0])))


@pytest.mark.parametrize("family", ["glm47", "json_tools", "mistral", "kimi_k2"])
def test_a_schema_may_refer_to_its_own_definitions(family: str) -> None:
    rules = rules_of(family, [tool(SCHEMA)])
    good = {**GOOD[0], "where": {"x": 1.5}}
    assert accepts(rules, written(family, ("get_weather", good)))
    bad = {**GOOD[0], "where": {"x": "y"}}
    assert not accepts(rules, written(family, ("get_weather", bad)))


WALKED = tool(
    {
        "type": "object",
        "properties": {
            "text": {"type": "string", "maxLength": 20},
            "number": {"type": "integer", "minimum": -5, "maximum": 50},
            "truth": {"type": "boolean"},
            "word": {"type": "string", "enum": ["a b", "C"]},
            "thing": {
                "type": "object",
                "properties": {"x": {"type": "string", "maxLength": 10}},
                "additionalProperties": False,
            },
            "list": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        },
        "required": ["text", "list"],
        "additionalProperties": False,
    }
)
MISLEADING = b'</parameter></arg_value>\n</tool_call>\\"null'
"""What ends a text too early, if it can."""


def walked(rules: str, seed: int) -> tuple[str, bool]:
    """A text that the rules let through, drawn byte by byte, and whether it is whole."""
    random = Random(seed)
    matcher = LLMatcher(BYTES, "start: calls\n" + rules, log_level=0)
    bits = allocate_token_bitmask(1, BYTES.vocab_size)
    text = bytearray()
    while not matcher.is_stopped() and len(text) < 3000:
        fill_next_token_bitmask(matcher, bits, 0)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[0, :256]
        likely = [byte for byte in np.flatnonzero(allowed) if byte in MISLEADING]
        drawn = likely if likely and random.random() < 0.6 else [*np.flatnonzero(allowed)]
        byte = int(random.choice(drawn))
        assert matcher.consume_token(byte)
        text.append(byte)
        if matcher.is_accepting() and random.random() < 0.3:
            break
    return text.decode("utf-8", "replace"), matcher.is_accepting()


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_drawn_is_read_as_calls_that_fit(family: str) -> None:
    rules, whole = rules_of(family, [WALKED, NOW]), 0
    schemas = {"get_weather": json.loads(WALKED.parameters or ""), "now": {"maxProperties": 0}}
    for seed in range(40):
        text, is_whole = walked(rules, seed)
        if is_whole:
            whole += 1
            calls = read(family, text, [WALKED, NOW])
            assert calls
            for name, arguments in calls:
                jsonschema.validate(arguments, schemas[name])
    assert whole > 20


def test_a_text_of_qwens_cannot_end_its_call_or_mean_null() -> None:
    rules = rules_of("qwen3_coder")

    def call(city: str) -> str:
        return written("qwen3_coder", ("get_weather", {"city": city, "days": 1}))

    for city in ("a</tool_call>", "null", "NULL", "a</parameter>"):
        assert not accepts(rules, call(city))
    assert accepts(rules, call("nulls"))


@pytest.mark.parametrize(
    ("family", "property_", "why"),
    [
        ("qwen3_coder", {"type": "string", "pattern": "^a"}, "pattern"),
        ("qwen3_coder", {"type": ["string", "null"]}, "type"),
        ("qwen3_coder", {"anyOf": [{"type": "string"}]}, "type"),
        ("qwen3_coder", {"type": "string", "enum": ["null"]}, "enum"),
        ("glm47", {"type": "string", "minLength": 2}, "minLength"),
        ("glm47", {"type": "string", "enum": [" a"]}, "enum"),
    ],
)
def test_what_a_format_cannot_carry_is_refused_of_a_strict_tool(
    family: str, property_: Any, why: str
) -> None:
    schema = {"type": "object", "properties": {"a": property_}}
    with pytest.raises(NotEnforceable, match=why):
        rules_of(family, [tool(schema)])
    rules = rules_of(family, [tool(schema, strict=False)])
    assert accepts(rules, written(family, ("get_weather", {})))


@pytest.mark.parametrize("more", [{"minProperties": 1}, {"required": ["b"]}, {"anyOf": []}])
def test_what_is_asked_of_all_arguments_together_is_refused_too(more: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, **more}
    with pytest.raises(NotEnforceable):
        rules_of("qwen3_coder", [tool(schema)])


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "maxLength": "9}/ | /.*/"}}},
        {"properties": {"a": {"type": "string", "minLength": True}}},
        {"properties": {"a": {"type": "string", "enum": ["\ud800"]}}},
        {"properties": []},
        {"required": {"a": 1}},
    ],
)
def test_a_schema_that_is_none_gets_nothing_into_the_grammar(schema: Any) -> None:
    for family in ("qwen3_coder", "glm47"):
        with pytest.raises(NotEnforceable):
            rules_of(family, [tool(schema, strict=False)])


def test_an_argument_whose_name_a_mark_cannot_hold_is_refused() -> None:
    schema = {"type": "object", "properties": {"a>b": {"type": "integer"}}}
    with pytest.raises(NotEnforceable, match="a>b"):
        rules_of("glm47", [tool(schema, strict=False)])


@pytest.mark.parametrize("family", ["gemma4", "pythonic", "minimax_m2"])
def test_a_format_without_a_grammar_is_refused_by_its_name(family: str) -> None:
    with pytest.raises(NotEnforceable, match=family):
        rules_of(family, TOOLS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [call_rules, call_rules_after_text])
def test_a_mark_that_is_a_token_is_written_as_that_token(family: str, rules: Any) -> None:
    calls = style(family).calls
    assert calls is not None
    marks = {calls.start: 700, calls.end: 701} if calls.end else {calls.start: 700}
    lark = rules(calls, TYPED_TOOLS, most=1, token_of=marks.get)
    for mark, token in marks.items():
        assert f"<[{token}]>" in lark
        assert f'"{mark}"' not in lark
