"""Answers taken apart as they are written, however they are cut."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.recorded_calls import FORM, NOW, RECORDED, TOOLS, WEATHER, Call, Recorded, style

from trio_worker.markup.calls import MOST_TO_PARSE
from trio_worker.markup.formats import marks_of
from trio_worker.markup.reader import AnswerReader
from trio_worker.markup.style import Style
from trio_worker.markup.tools import tool_objects
from trio_worker.protocol.prompt import CallArguments, CallBegun, Form, Reasoning

pytestmark = pytest.mark.mlx

EACH = pytest.mark.parametrize(
    "recorded", RECORDED, ids=[f"{n} {each.family}" for n, each in enumerate(RECORDED)]
)


@dataclass
class Read:
    """What all readings of an answer came to."""

    content: str = ""
    reasoning: str = ""
    names: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    arguments: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    is_over: bool = False

    def add(self, reading: Any) -> None:
        self.content += reading.content
        self.is_over = reading.is_over
        for piece in reading.pieces:
            match piece:
                case Reasoning(text=text):
                    assert text
                    self.reasoning += text
                case CallBegun(index=index, name=name, id=id_):
                    assert index == len(self.names)
                    self.names.append(name)
                    self.ids.append(id_)
                case CallArguments(index=index, text=text):
                    assert text
                    assert index == len(self.names) - 1, "the name comes first"
                    self.arguments[index] += text

    @property
    def calls(self) -> tuple[Call, ...]:
        """Raises where the arguments are no JSON."""
        return tuple(
            Call(name, json.loads(self.arguments[n]), self.ids[n])
            for n, name in enumerate(self.names)
        )


def read(style: Style, pieces: Iterable[str], form: Form = FORM, *, is_cut: bool = False) -> Read:
    reader, whole = AnswerReader(style, form), Read()
    for piece in pieces:
        whole.add(reader.feed(piece))
    whole.add(reader.finish(is_cut=is_cut))
    return whole


def after_each(style: Style, text: str, form: Form = FORM) -> list[Read]:
    """What has been read after each character."""
    reader, so_far, readings = AnswerReader(style, form), Read(), []
    for char in text:
        so_far.add(reader.feed(char))
        readings.append(
            Read(
                so_far.content,
                so_far.reasoning,
                [*so_far.names],
                [*so_far.ids],
                defaultdict(str, so_far.arguments),
                so_far.is_over,
            )
        )
    return readings


def is_what_it_is(recorded: Recorded, got: Read) -> bool:
    return (got.content, got.reasoning, got.calls) == (
        recorded.content,
        recorded.reasoning,
        recorded.calls,
    )


@EACH
def test_what_a_family_writes_is_read_in_whole_and_by_the_character(recorded: Recorded) -> None:
    assert is_what_it_is(recorded, read(style(recorded.family), [recorded.text]))
    assert is_what_it_is(recorded, read(style(recorded.family), recorded.text))


@EACH
def test_it_is_the_same_cut_in_two_anywhere(recorded: Recorded) -> None:
    of = style(recorded.family)
    for at in range(1, len(recorded.text)):
        assert is_what_it_is(recorded, read(of, [recorded.text[:at], recorded.text[at:]])), at


@EACH
def test_what_is_read_after_each_character_does_not_depend_on_the_cuts(recorded: Recorded) -> None:
    """So an answer that goes on after a crash goes on with the next piece."""
    of = style(recorded.family)
    for end, expected in enumerate(after_each(of, recorded.text), 1):
        reader, got = AnswerReader(of, FORM), Read()
        got.add(reader.feed(recorded.text[:end]))
        assert got == expected, end


@EACH
@settings(max_examples=30)
@given(data=st.data())
def test_it_is_the_same_cut_anyhow(recorded: Recorded, data: st.DataObject) -> None:
    text = recorded.text
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert is_what_it_is(recorded, read(style(recorded.family), pieces))


@EACH
def test_the_calls_are_those_of_the_familys_parser(recorded: Recorded) -> None:
    """Where that is given what stands between the marks as one."""
    calls = style(recorded.family).calls
    assert calls is not None
    if recorded.family in ("json_tools", "longcat") or not calls.end:
        pytest.skip("mlx-lm's parser is not as exact")
    found: list[Call] = []
    rest = recorded.text.partition(calls.start)[2]
    while rest:
        inner, _, rest = rest.partition(calls.end)
        parsed = calls.parse(inner, tool_objects(TOOLS))
        found += [
            Call(each["name"], each["arguments"], each.get("id"))
            for each in (parsed if isinstance(parsed, list) else [parsed])
        ]
        rest = rest.partition(calls.start)[2]
    assert tuple(found) == recorded.calls


@EACH
def test_arguments_come_before_their_call_has_ended_where_the_format_lets_them(
    recorded: Recorded,
) -> None:
    calls = style(recorded.family).calls
    assert calls is not None
    if recorded.family in ("gemma4", "pythonic") or "arguments" in recorded.text[:30]:
        pytest.skip("comes whole")
    if " [{" in recorded.text:
        pytest.skip("a list comes whole")
    readings = after_each(style(recorded.family), recorded.text)
    sizes = {len(each.arguments[0]) for each in readings if each.names}
    assert len(sizes) > 2


def test_only_what_is_asked_for_is_looked_for() -> None:
    recorded = RECORDED[0]
    without = read(style("json_tools"), recorded.text, Form())
    assert (without.content, without.names, without.reasoning) == (recorded.text, [], "")
    reasoning = read(style("json_tools"), recorded.text, Form(finds_reasoning=True))
    assert reasoning.reasoning == recorded.reasoning
    assert reasoning.content == recorded.text.partition("</think>\n\n")[2]
    calls = read(style("json_tools"), recorded.text, Form(tools=TOOLS))
    assert calls.calls == recorded.calls
    assert calls.content == recorded.text.partition("<tool_call>")[0]


def test_an_answer_that_begins_in_reasoning_needs_no_mark_for_it() -> None:
    form = replace(FORM, starts_in_reasoning=True)
    got = read(style("json_tools"), "\n so it is\n\n</think>\n\n  Yes. ", form)
    assert (got.reasoning, got.content) == ("so it is", "Yes. ")


def test_reasoning_is_at_the_beginning_or_after_calls_and_not_amid_content() -> None:
    """What is JSON by a grammar may well have such marks in its strings."""
    text = '{"a": "<think>b</think>"}'
    assert read(style("json_tools"), text) == Read(content=text)
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    got = read(style("json_tools"), f"  <think>a</think>{call}\n<think>b</think>{call}")
    assert (got.content, got.reasoning, got.names) == ("", "ab", ["now", "now"])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a <tool", "a <tool"),
        ("\n <thin", "\n <thin"),
        (" \n", " \n"),
        ("a <tool_cal", "a <tool_cal"),
        ("<think>a</think>\n ", ""),
        ("<think>a</think>\n<tool", "<tool"),
    ],
)
def test_what_only_began_like_a_mark_is_content_in_the_end(text: str, content: str) -> None:
    assert read(style("json_tools"), text).content == content


KIMI_STARTED = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    "<|tool_call_argument_begin|>"
)
QWEN_STARTED = "<tool_call><function=get_weather><parameter=city>a</parameter>"
JSON_STARTED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Be'


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("json_tools", "<tool_call> is a mark."),
        ("json_tools", " \n<tool_call> is a mark."),
        ("json_tools", "<tool_call>\n</tool_call> so"),
        ("json_tools", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "unknown"}</tool_call> x'),
        ("json_tools", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "now", "arguments": "a"}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "now", "arguments": NaN}</tool_call>'),
        ("json_tools", "<tool_call>[1]</tool_call>"),
        ("json_tools", "<tool_call>[]</tool_call>"),
        ("json_tools", '<tool_call>{"name" "now"}</tool_call>'),
        ("json_tools", '<tool_call>{"arguments": {"a": [}, "name": "now"}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "get_wea'),
        ("json_tools", '<tool_call>{"arguments": {"a'),
        ("json_tools", "<tool_call>" * 50),
        ("qwen3_coder", "<tool_call>\nplain</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=get_wea"),
        ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
        ("mistral", "[TOOL_CALLS]now"),
        ("mistral", "[TOOL_CALLS][1]"),
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": 3}]'),
        ("mistral", '[TOOL_CALLS] [{"name": "now"}, {"name": "unknown"}]'),
        ("glm47", "<tool_call>unknown</tool_call>"),
        ("glm47", "<tool_call>a\nb\n\nc</tool_call>"),
        ("longcat", "<longcat_tool_call>now</longcat_tool_call>"),
        ("kimi_k2", "<|tool_calls_section_begin|>now<|tool_calls_section_end|>"),
        ("kimi_k2", "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"),
        ("minimax_m2", '<minimax:tool_call><invoke name="unknown"></invoke></minimax:tool_call>'),
        ("minimax_m2", "<minimax:tool_call>hello</minimax:tool_call>"),
        ("gemma4", "<|tool_call>call:now{a:}<tool_call|>"),
        ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Be'),
        ("pythonic", "<|tool_call_start|>now<|tool_call_end|>"),
    ],
)
def test_what_looked_like_a_call_and_is_none_is_content_as_it_was_written(
    family: str, text: str
) -> None:
    for pieces in ([text], text):
        got = read(style(family), pieces)
        assert (got.content, got.names) == (text, [])


def test_a_call_is_found_after_one_that_was_none() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    got = read(style("json_tools"), f"<tool_call>no {call}")
    assert (got.content, got.names) == ("<tool_call>no ", ["now"])


@pytest.mark.parametrize(
    ("family", "text", "arguments", "content"),
    [
        ("json_tools", JSON_STARTED, '{"city": "Be', ""),
        ("json_tools", JSON_STARTED + 'rn"}', '{"city": "Bern"}', ""),
        ("json_tools", JSON_STARTED + 'rn"}\n</tool_call> So.', '{"city": "Bern"}', "So."),
        ("json_tools", JSON_STARTED + 'rn"\n</tool_call> So.', '{"city": "Bern"\n', "So."),
        ("json_tools", JSON_STARTED + 'rn"}} So </tool_call> it.', '{"city": "Bern"}', "So  it."),
        ("json_tools", JSON_STARTED + 'rn"}}</tool_c', '{"city": "Bern"}', ""),
        (
            "kimi_k2",
            KIMI_STARTED + '{"city": 1<|tool_call_end|><|tool_calls_section_end|>So.',
            '{"city": 1',
            "So.",
        ),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": 1} So.', '{"city": 1}', "So."),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": 1}So', '{"city": 1}', "So"),
        (
            "qwen3_coder",
            QWEN_STARTED + "<parameter=days>3</function></tool_call>So.",
            '{"city": "a"}',
            "So.",
        ),
        (
            "qwen3_coder",
            QWEN_STARTED + "<parameter=days>\nmany\n</parameter></function></tool_call>",
            '{"city": "a", "days": "many"}',
            "",
        ),
        (
            "qwen3_coder",
            QWEN_STARTED + "</function> So.",
            '{"city": "a"}',
            "So.",
        ),
    ],
)
def test_a_call_that_breaks_off_stays_as_far_as_it_came(
    family: str, text: str, arguments: str, content: str
) -> None:
    for pieces in ([text], text):
        got = read(style(family), pieces)
        assert (got.names, got.arguments[0], got.content) == (["get_weather"], arguments, content)


@pytest.mark.parametrize("recorded", [each for each in RECORDED if each.family != "json_tools"])
def test_an_answer_that_is_cut_off_has_what_was_handed_out_before(recorded: Recorded) -> None:
    """And not what a parser makes of half a call."""
    of = style(recorded.family)
    for end, before in enumerate(after_each(of, recorded.text), 1):
        got = read(of, [recorded.text[:end]], is_cut=True)
        assert got.names == before.names
        assert dict(got.arguments) == dict(before.arguments)


def test_an_end_token_may_stand_for_the_end_mark_of_a_whole_call() -> None:
    text = "<|tool_call>call:now{}"
    assert read(style("gemma4"), text).names == ["now"]
    assert read(style("gemma4"), text, is_cut=True) == Read(content=text)


@pytest.mark.parametrize("family", sorted({each.family for each in RECORDED}))
def test_an_answer_of_one_call_is_over_after_it(family: str) -> None:
    recorded = next(each for each in RECORDED if each.family == family and each.calls)
    form = replace(FORM, one_call=True)
    for pieces in ([recorded.text, "more"], [*recorded.text, "more"]):
        got = read(style(family), pieces, form)
        assert got.is_over
        assert got.calls == recorded.calls[:1]
        assert "more" not in got.content
    until = [each.is_over for each in after_each(style(family), recorded.text, form)]
    assert until.index(True) < len(until) - 1 or len(recorded.calls) == 1


def test_an_answer_of_one_call_is_over_though_its_own_end_mark_is_missing() -> None:
    text = f"{KIMI_STARTED}{{}}<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}"
    for pieces in ([text], text):
        got = read(style("kimi_k2"), pieces, replace(FORM, one_call=True))
        assert (got.names, got.is_over) == (["get_weather"], True)


def test_more_than_a_parser_is_to_read_is_content() -> None:
    for family, start, unit, end in [
        ("gemma4", "<|tool_call>call:now{a:1", " ", "}<tool_call|>"),
        ("json_tools", '<tool_call>{"arguments":{},', " ", '"name":"now"}</tool_call>'),
        ("glm47", "<tool_call>now ", "{", "</tool_call>"),
    ]:
        text = start + unit * MOST_TO_PARSE + end
        pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]
        assert read(style(family), [text]) == read(style(family), pieces) == Read(content=text)


@pytest.mark.parametrize(
    ("family", "start", "unit"),
    [
        ("gemma4", "<|tool_call>", "call:f{"),
        ("kimi_k3", "<|open|>tools<|sep|>", "<|open|>call"),
        ("pythonic", "<|tool_call_start|>", "[a("),
    ],
)
def test_no_parser_looks_for_calls_without_end(family: str, start: str, unit: str) -> None:
    """It would hold up every other answer: mlx-lm's take seconds for these, or minutes."""
    calls, asked = style(family).calls, list[str]()
    assert calls is not None

    def parse(text: str, _: Any) -> list[Any]:
        asked.append(text)
        return []

    noted = Style(calls=dataclasses.replace(calls, parse=parse))
    text = start + unit * 4000
    assert read(noted, [text]) == Read(content=text)
    assert asked == []
    read(noted, [start + unit * 10 + "x" * 10_000])
    assert len(asked) == 1


def test_an_id_that_no_wire_can_carry_is_left_out() -> None:
    text = '[TOOL_CALLS][{"name": "now", "arguments": {"a": "\\ud800"}, "id": "\\ud800"}]'
    got = read(style("mistral"), [text])
    assert got.ids == [None]
    assert got.arguments[0].encode() == b'{"a": "\\ud800"}'


FRAGMENTS = st.sampled_from(
    [
        *("<", ">", "{", "}", '"', "\\", " ", "\n", "a", "[", "]", ",", ":", "=", "/", "|"),
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "now", "get_weather", '"name": '),
        *(
            '"arguments": {',
            '{"name": "now", "arguments": {',
            "}}",
            "<function=now>",
            "</function>",
        ),
        *("<parameter=city>", "</parameter>", "[TOOL_CALLS]", "[ARGS]", "now[ARGS]{", "<arg_key>"),
        *("</arg_key><arg_value>", "</arg_value>", "<|tool_calls_section_begin|>"),
        *("<|tool_calls_section_end|>", "<|tool_call_begin|>functions.now:0", "<|tool_call_end|>"),
        *("<|tool_call_argument_begin|>", "<minimax:tool_call>", "</minimax:tool_call>"),
        *('<invoke name="now">', "</invoke>", '<parameter name="a">', "<|tool_call>call:now{}"),
        "<tool_call|>",
    ]
)


@pytest.mark.parametrize("family", sorted({each.family for each in RECORDED}))
@settings(max_examples=150)
@given(fragments=st.lists(FRAGMENTS, max_size=25), one_call=st.booleans(), is_cut=st.booleans())
def test_no_text_is_read_differently_by_the_character(
    family: str,
    fragments: list[str],
    *,
    one_call: bool,
    is_cut: bool,
) -> None:
    of, form = style(family), replace(FORM, one_call=one_call)
    assert of.calls is not None
    fragments = [of.calls.start if each == "<tool_call>" else each for each in fragments]
    text = "".join(fragments)
    by_character = read(of, text, form, is_cut=is_cut)
    assert read(of, [text], form, is_cut=is_cut) == by_character
    assert read(of, fragments, form, is_cut=is_cut) == by_character


@pytest.mark.parametrize("family", sorted({each.family for each in RECORDED}))
@settings(max_examples=100)
@given(fragments=st.lists(FRAGMENTS, max_size=20))
def test_what_may_yet_be_content_is_counted(family: str, fragments: list[str]) -> None:
    """Nothing that is shown later comes from before the characters that are held back."""
    reader = AnswerReader(style(family), FORM)
    text = ""
    for fragment in fragments:
        for char in fragment:
            text += char
            reader.feed(char)
            assert 0 <= reader.undecided <= len(text)
    before = text[: len(text) - reader.undecided]
    late = reader.finish(is_cut=True).content
    assert text.endswith(late) or late in text[len(before) :]


def test_the_marks_are_told_that_a_vocabulary_may_silence() -> None:
    assert marks_of(style("gemma4")) == (
        *("<think>", "</think>", "<|tool_call>", "<tool_call|>"),
        '<|"|>',
    )
    assert marks_of(style("mistral"))[2:] == ("[TOOL_CALLS]", "[ARGS]")
    assert marks_of(Style()) == ()


def test_tools_without_a_name_that_is_called_are_no_tools() -> None:
    form = replace(FORM, tools=(NOW,))
    assert read(style("json_tools"), RECORDED[0].text, form).names == ["now"]
    assert WEATHER.name in read(style("json_tools"), RECORDED[0].text, form).content
