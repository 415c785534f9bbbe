"""Which grammar an answer keeps to: constraints, tools and reasoning, apart and together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.grammars import CLOSE, OPEN, byte_grammars, is_taken

from trio_worker.grammar.forms import CALLS_MAX, FormRefused, grammar_of
from trio_worker.markup.general import GENERAL_CALLS
from trio_worker.markup.style import PLAIN, CallStyle, Marks, Style
from trio_worker.protocol.prompt import Choice, JsonSchema, Lark, Regex, Tool, ToolUse, Wanted

GRAMMARS = byte_grammars()

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool(name="weather", parameters=json.dumps(CITY))
CLOCK = Tool(name="clock")
STRICT = Tool(name="weather", parameters=json.dumps(CITY), strict=True)
TOOLS = (WEATHER, CLOCK)
SCHEMA = JsonSchema(schema='{"type": "object", "properties": {"ok": {"type": "boolean"}}}')

CALLING = Style(calls=GENERAL_CALLS)
THINKING = Style(reasoning=Marks(start="<think>", end="</think>"), calls=GENERAL_CALLS)


def call(name: str, arguments: str) -> bytes:
    text = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    return text.encode()


PARIS = call("weather", '{"city": "Paris"}')
WRONG = call("weather", '{"town": "Paris"}')
TIME = call("clock", "{}")


def takes(wanted: Wanted, *answers: Any, style: Style = CALLING, **others: Any) -> list[bool]:
    grammar = grammar_of(wanted, style, GRAMMARS, **others)
    return [is_taken(GRAMMARS, grammar, answer) for answer in answers]


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(),
        Wanted(tools=TOOLS),
        Wanted(tools=TOOLS, parallel_calls=False, max_reasoning_tokens=3),
        Wanted(tools=(CLOCK, STRICT), allowed_tools=("clock",)),
    ],
)
def test_where_nothing_has_to_be_kept_to_there_is_no_grammar(wanted: Wanted) -> None:
    assert grammar_of(wanted, THINKING, GRAMMARS) == ""
    assert grammar_of(wanted, THINKING, None) == ""


def test_an_answer_keeps_to_its_constraint() -> None:
    assert takes(Wanted(constraint=SCHEMA), b'{"ok": true}', b'{"ok": 1}', b"yes") == [
        *(True, False, False)
    ]
    assert takes(Wanted(constraint=Regex(pattern="[0-9]+")), b"12", b"x") == [True, False]
    assert takes(Wanted(constraint=Choice(options=("x", "y"))), b"x", b"z") == [True, False]
    assert takes(Wanted(constraint=Lark(grammar='start: "x"+')), b"xx", b"z") == [True, False]


def test_calls_that_must_come_are_the_answer() -> None:
    wanted = Wanted(tools=TOOLS, tool_use=ToolUse.REQUIRED)
    assert takes(wanted, PARIS, TIME, PARIS + b"\n" + TIME) == [True] * 3
    assert takes(wanted, call("clock", '{"a": 1}')) == [False]
    assert (
        takes(wanted, b"", b"Sure.", WRONG, call("other", "{}"), b"Sure. " + PARIS) == [False] * 5
    )
    assert takes(wanted, b"\n".join([TIME] * CALLS_MAX), b"\n".join([TIME] * (CALLS_MAX + 1))) == [
        *(True, False)
    ]


def test_a_named_tool_is_the_only_one_and_called_once_where_calls_are_not_parallel() -> None:
    wanted = Wanted(
        tools=TOOLS, tool_use=ToolUse.REQUIRED, allowed_tools=("weather",), parallel_calls=False
    )
    assert takes(wanted, PARIS, TIME, PARIS + b"\n" + PARIS) == [True, False, False]


def test_calls_that_must_come_go_before_a_constraint() -> None:
    wanted = Wanted(tools=TOOLS, tool_use=ToolUse.REQUIRED, constraint=SCHEMA)
    assert takes(wanted, PARIS, b'{"ok": true}') == [True, False]


def test_a_constrained_answer_may_be_calls_where_tools_may_be_called() -> None:
    wanted = Wanted(tools=TOOLS, constraint=SCHEMA)
    assert takes(wanted, PARIS, b'{"ok": true}', b"Sure.", WRONG) == [True, True, False, False]


def test_calls_of_a_strict_tool_keep_to_its_schema_after_any_text() -> None:
    loose = Tool(name="clock", parameters=json.dumps(CITY))
    wanted = Wanted(tools=(STRICT, loose))
    text = "Well, ä: ".encode()
    assert takes(wanted, b"", text, text + PARIS, text + PARIS + text) == [True] * 4
    assert takes(wanted, text + WRONG, call("other", "{}")) == [False, False]
    assert takes(wanted, call("clock", '{"anything": 1}')) == [True]


def test_reasoning_comes_before_all_of_it() -> None:
    thought = [OPEN, *b"hm {", CLOSE, *b"\n\n"]
    for wanted, answer in (
        (Wanted(constraint=SCHEMA), b'{"ok": true}'),
        (Wanted(tools=TOOLS, tool_use=ToolUse.REQUIRED), PARIS),
        (Wanted(tools=(STRICT,)), b"Well. " + PARIS),
    ):
        assert takes(wanted, [*thought, *answer], answer, style=THINKING) == [True, True]
        begun = [*thought[1:], *answer]
        assert takes(wanted, begun, style=THINKING, starts_in_reasoning=True) == [True]
    wanted = Wanted(constraint=SCHEMA)
    assert takes(wanted, b'{"ok": true}', style=THINKING, starts_in_reasoning=True) == [False]


def test_a_schema_cannot_change_how_it_is_compiled_for_a_tool_either() -> None:
    loose = json.dumps({**CITY, "x-guidance": {"whitespace_flexible": True, "lenient": True}})
    wanted = Wanted(tools=(Tool(name="weather", parameters=loose),), tool_use=ToolUse.REQUIRED)
    spaced = call("weather", '{   "city": "Paris"}')
    assert takes(wanted, PARIS, spaced) == [True, False]


ODD = Tool(name="odd", parameters='{"type": "object", "properties": {"a": {"not": {}}}}')
UNKNOWN = Style(calls=CallStyle(format="pythonic", start="[", end="]", parse=lambda *_: []))


@pytest.mark.parametrize(
    ("wanted", "style", "field", "said"),
    [
        (
            Wanted(constraint=JsonSchema(schema='{"properties": {"a": {"not": {}}}}')),
            *(PLAIN, "response_format", "not: not supported (at #/properties/a/not)"),
        ),
        (Wanted(constraint=JsonSchema(schema="[]")), PLAIN, "response_format", "an object"),
        (Wanted(constraint=Regex(pattern="[")), PLAIN, "grammar", "unclosed"),
        (Wanted(constraint=Choice(options=())), PLAIN, "grammar", "choose"),
        (
            Wanted(tools=(CLOCK, ODD), tool_use=ToolUse.REQUIRED),
            *(CALLING, "tools[1].parameters", "not: not supported (at #/properties/a/not)"),
        ),
        (
            Wanted(tools=(CLOCK, ODD), constraint=SCHEMA),
            *(CALLING, "tools[1].parameters", "not supported"),
        ),
        (
            Wanted(tools=(Tool(name="x", parameters='{"enum": [1]}', strict=True),)),
            *(CALLING, "tools[0].parameters", "Unsatisfiable"),
        ),
        (
            Wanted(tools=(Tool(name="x", parameters="7", strict=True),)),
            *(CALLING, "tools[0].parameters", "an object"),
        ),
        (Wanted(tools=TOOLS, tool_use=ToolUse.REQUIRED), PLAIN, "tools", "writes calls"),
        (
            Wanted(tools=TOOLS, tool_use=ToolUse.REQUIRED),
            *(UNKNOWN, "tool_choice", "cannot be enforced"),
        ),
        (Wanted(tools=(STRICT,)), UNKNOWN, "tools", "cannot be enforced"),
        (
            Wanted(
                tools=tuple(
                    Tool(name=f"t{n}", parameters=json.dumps({"title": "x" * 60_000}))
                    for n in range(3)
                ),
                tool_use=ToolUse.REQUIRED,
            ),
            *(CALLING, "tools", "longer than 131072 bytes"),
        ),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_field_that_is_at_fault(
    wanted: Wanted, style: Style, field: str, said: str
) -> None:
    with pytest.raises(FormRefused) as refused:
        grammar_of(wanted, style, GRAMMARS)
    assert refused.value.field == field
    assert said in refused.value.message


def test_a_tool_that_is_not_held_to_its_schema_may_have_any() -> None:
    assert grammar_of(Wanted(tools=(ODD,)), CALLING, GRAMMARS) == ""
    wanted = Wanted(tools=(ODD, STRICT))
    assert takes(wanted, call("odd", '{"a": 1}')) == [True]
    wanted = Wanted(tools=(ODD, CLOCK), tool_use=ToolUse.REQUIRED, allowed_tools=("clock",))
    assert takes(wanted, TIME) == [True]


def test_a_model_whose_tokens_are_not_known_by_their_bytes_is_refused_forms() -> None:
    with pytest.raises(FormRefused, match="tokenizer"):
        grammar_of(Wanted(constraint=SCHEMA), PLAIN, None)
