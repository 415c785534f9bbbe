"""One grammar for reasoning and what follows it, whatever its marks are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from support.grammars import CLOSE, END, OPEN, byte_grammars, is_taken, next_tokens

from trio_worker.grammar.composed import composed
from trio_worker.grammar.rules import answer_rules
from trio_worker.protocol.prompt import Choice, JsonSchema

GRAMMARS = byte_grammars()
ANSWER = answer_rules(JsonSchema(schema='{"type": "object"}'))
CALLS = 'calls: "<call>" body\nbody: /[a-z]+/ ">"\n'


@dataclass(frozen=True)
class Marks:
    start: str
    end: str


TOKENS = Marks("<think>", "</think>")
MIXED = Marks("<think>deeply\n", "</think> done")
TEXTS = Marks("<|channel>thought", "<channel|>")


def whole(**given: Any) -> str:
    return composed(parts_of=GRAMMARS.parts_of, **given)


def written(*parts: bytes | int) -> list[int]:
    return [token for part in parts for token in ([part] if isinstance(part, int) else part)]


MARKS = pytest.mark.parametrize(
    ("marks", "opening", "closing"),
    [
        (TOKENS, [OPEN], [CLOSE]),
        (MIXED, [OPEN, *b"deeply\n"], [CLOSE, *b" done"]),
        (TEXTS, list(TEXTS.start.encode()), list(TEXTS.end.encode())),
    ],
    ids=["tokens", "tokens and texts", "texts"],
)


@MARKS
def test_only_what_follows_the_reasoning_is_held_to_the_form(
    marks: Any, opening: list[int], closing: list[int]
) -> None:
    thought = "so: {\n is ä brace, <".encode()
    begun = whole(answer=ANSWER, marks=marks, starts_in_reasoning=True)
    assert is_taken(GRAMMARS, begun, [*thought, *closing, *b'\n\n{"a": 1}'])
    assert is_taken(GRAMMARS, begun, [*closing, *b"{}"])
    assert not is_taken(GRAMMARS, begun, [*thought, *closing, *b"\n\nSure: {}"])
    assert not is_taken(GRAMMARS, begun, b"{}")


@MARKS
def test_where_the_model_may_begin_to_reason_it_also_may_not(
    marks: Any, opening: list[int], closing: list[int]
) -> None:
    free = whole(answer=ANSWER, marks=marks)
    assert is_taken(GRAMMARS, free, b"{}")
    assert is_taken(GRAMMARS, free, [*opening, *b"hm", *closing, *b"\n{}"])
    assert not is_taken(GRAMMARS, free, [*opening, *b"hm", *closing])
    assert not is_taken(GRAMMARS, free, b"hm")


@MARKS
def test_an_answer_cannot_end_in_the_middle_of_its_reasoning(
    marks: Any, opening: list[int], closing: list[int]
) -> None:
    matcher = GRAMMARS.matcher(whole(answer=ANSWER, marks=marks, starts_in_reasoning=True))
    for token in [*b"I think {}", *closing[:-1]]:
        assert END not in next_tokens(matcher)
        matcher.consume(token)
    assert closing[-1] in next_tokens(matcher)


def test_a_mark_that_is_a_token_is_not_written_as_text() -> None:
    begun = whole(answer=ANSWER, marks=TOKENS, starts_in_reasoning=True)
    assert not is_taken(GRAMMARS, begun, b"hm</think>{}")


def test_a_mark_is_taken_apart_into_its_tokens_and_texts() -> None:
    assert GRAMMARS.parts_of("<think>") == [OPEN]
    assert GRAMMARS.parts_of("a</think><think>b") == ["a", CLOSE, OPEN, "b"]
    assert GRAMMARS.parts_of("think>") == ["think>"]
    longer = byte_grammars(special={"<|end|>": END, "[A": OPEN, "[A]": CLOSE})
    assert longer.parts_of("[A][A") == [CLOSE, OPEN]


def test_reasoning_ends_at_the_first_end_mark() -> None:
    begun = whole(answer=ANSWER, marks=TEXTS, starts_in_reasoning=True)
    assert not is_taken(GRAMMARS, begun, b"a<channel|>b<channel|>{}")


@MARKS
def test_an_answer_or_calls_may_follow(marks: Any, opening: list[int], closing: list[int]) -> None:
    either = whole(answer=ANSWER, calls=CALLS, marks=marks)
    for end in (b"{}", b"<call>abc>"):
        assert is_taken(GRAMMARS, either, end)
        assert is_taken(GRAMMARS, either, [*opening, *b"hm", *closing, *end])
    assert not is_taken(GRAMMARS, either, b"<call>{}>")
    calls = whole(calls=CALLS, marks=marks)
    assert is_taken(GRAMMARS, calls, b"<call>abc>")
    assert not is_taken(GRAMMARS, calls, b"{}")


def test_marks_may_contain_what_means_something_in_a_pattern() -> None:
    odd = Marks("[(THINK*\\", "/.*?[end] -#\n|")
    begun = whole(answer=ANSWER, marks=odd, starts_in_reasoning=True)
    assert is_taken(GRAMMARS, begun, [*b"hm", *odd.end.encode(), *b"{}"])
    assert not is_taken(GRAMMARS, begun, b"hm/abc?[end] -#\n|{}")
    assert is_taken(
        GRAMMARS, whole(answer=ANSWER, marks=odd), (odd.start + odd.end + "{}").encode()
    )


def test_without_marks_nothing_comes_before_the_answer() -> None:
    bare = whole(answer=answer_rules(Choice(options=("yes", "no"))))
    assert is_taken(GRAMMARS, bare, b"yes")
    assert not is_taken(GRAMMARS, bare, b"\nyes")
