"""What is taken for a schema, a pattern or a choice at all, before anything is compiled."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.grammars import byte_grammars, grammar_for, is_taken, schema_grammar

from trio_worker.grammar import GrammarRefused, schema
from trio_worker.grammar.rules import answer_rules
from trio_worker.protocol.prompt import Choice, JsonSchema, Lark, Regex

GRAMMARS = byte_grammars()


def nested(depth: int) -> Any:
    wanted: Any = {"type": "null"}
    for _ in range(depth - 1):
        wanted = {"type": "array", "items": wanted}
    return wanted


def with_properties(count: int, *, required: int = 0) -> Any:
    names = [f"p{n}" for n in range(count)]
    return {
        "type": "object",
        "properties": {name: {"type": "null"} for name in names},
        "required": names[:required],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"minimum": NaN}', "NaN"),
        ("[]", "an object, or true or false"),
        ('"object"', "an object, or true or false"),
        ("false", "nothing is valid"),
        ("[" * 100_000 + "]" * 100_000, "longer than 65536 bytes"),
        ("[" * 30_000 + "]" * 30_000, "nested too deeply"),
        ('{"const": "' + "x" * 65536 + '"}', "longer than 65536 bytes"),
        (json.dumps(nested(49)), "nested deeper than 48 (at #/items"),
        (json.dumps(with_properties(401)), "401 optional properties, and may have 400"),
    ],
)
def test_what_is_no_schema_or_too_big_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(GrammarRefused, match=re.escape(said)):
        schema.read(text)


@pytest.mark.parametrize(
    "wanted", [nested(48), with_properties(400), with_properties(1000, required=1000)]
)
def test_what_is_just_within_bounds_can_be_had(wanted: Any) -> None:
    GRAMMARS.check(schema_grammar(GRAMMARS, wanted), "{")


def test_all_properties_together_have_a_bound() -> None:
    part = with_properties(300, required=300)
    wanted = {"type": "array", "prefixItems": [part] * 17}
    short = json.loads(json.dumps(wanted).replace('{"type": "null"}', "{}"))
    with pytest.raises(GrammarRefused, match=r"longer than|more than 5000 properties"):
        schema.read(json.dumps(short, separators=(",", ":")))
    assert sum(len(each.get("properties", ())) for _, each in schema.places(short)) == 5100


def test_a_schema_cannot_speak_to_the_compiler() -> None:
    lenient = {"x-guidance": {"lenient": True, "whitespace_flexible": True}, "not": {}}
    with pytest.raises(GrammarRefused, match="not"):
        GRAMMARS.check(schema_grammar(GRAMMARS, lenient))
    spaced = {**lenient, "type": "array"}
    del spaced["not"]
    assert not is_taken(GRAMMARS, schema_grammar(GRAMMARS, spaced), b"[   ]")


def test_a_place_is_a_json_pointer() -> None:
    wanted = {
        "properties": {"a/b~c": {"items": [{"anyOf": [{}]}]}, "items": True},
        "$defs": {"d": {}},
    }
    assert [path for path, _ in schema.places(wanted)] == [
        "#",
        "#/properties/a~1b~0c",
        "#/properties/a~1b~0c/items/0",
        "#/properties/a~1b~0c/items/0/anyOf/0",
        "#/$defs/d",
    ]


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("[a-c]{2}", [b"ab"], [b"a", b"abc", b"xab"]),
        ("a/b", [b"a/b"], [b"ab"]),
        (r"a\/b\\/", [b"a/b\\/"], [b"a/b/"]),
        ("a\nb", [b"a\nb"], [b"ab"]),
        (r"[/\]]+", [b"/]"], [b""]),
        ("", [b""], [b"a"]),
        ("ä|ö", ["ö".encode()], [b"o"]),
        ("^yes$", [b"yes"], [b"yes "]),
    ],
)
def test_an_answer_matches_a_pattern_as_a_whole(
    pattern: str, right: list[bytes], wrong: list[bytes]
) -> None:
    grammar = grammar_for(GRAMMARS, Regex(pattern=pattern))
    assert [is_taken(GRAMMARS, grammar, each) for each in right] == [True] * len(right)
    assert [is_taken(GRAMMARS, grammar, each) for each in wrong] == [False] * len(wrong)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=4))
def test_an_answer_is_one_of_the_options_to_the_letter(options: list[str]) -> None:
    if not any(options):
        return
    grammar = grammar_for(GRAMMARS, Choice(options=tuple(options)))
    for option in options:
        assert is_taken(GRAMMARS, grammar, option.encode())
        assert is_taken(GRAMMARS, grammar, option.encode() + b"!") == (option + "!" in options)


def test_a_grammar_keeps_its_names_to_itself() -> None:
    own = Lark(grammar='start: answer\nanswer: gap "}"\ngap: "a"+')
    assert is_taken(GRAMMARS, grammar_for(GRAMMARS, own), b"aa}")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Regex(pattern="[a"), "unclosed character class"),
        (Regex(pattern=r"(?=a)"), "look-around"),
        (Regex(pattern="a" * 20_000), "the pattern is longer than 16384 bytes"),
        (Choice(options=()), "nothing to choose from"),
        (Choice(options=("", "")), "nothing to choose from"),
        (Choice(options=("x" * 70_000,)), "the choice is longer than 65536 bytes"),
        (Lark(grammar="start: nothing"), "unknown name"),
        (Lark(grammar='start: "' + "x" * 70_000 + '"'), "the grammar is longer than 65536 bytes"),
        (JsonSchema(schema="7"), "a schema is an object"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(asked: Any, said: str) -> None:
    with pytest.raises(GrammarRefused, match=re.escape(said)) as refused:
        GRAMMARS.check(f"start: answer\n{answer_rules(asked)}")
    assert "\n" not in str(refused.value)
