"""Where an answer is in its grammar: masks, ends, errors, and what hostile grammars may take."""

from __future__ import annotations

import json
import threading
import time
from random import Random
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from support.grammars import (
    END,
    OTHER_END,
    SIZE,
    byte_grammars,
    drawn,
    grammar_for,
    is_taken,
    next_tokens,
    schema_grammar,
)

from trio_worker.grammar import GrammarRefused, matching
from trio_worker.grammar.matching import BROKEN, Matcher, allows, only, unpacked, unset_bits
from trio_worker.protocol.prompt import Choice, Regex

OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


class SlowClock:
    """Every reading of it is `step` seconds after the last."""

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_every_end_token_is_allowed_where_an_answer_may_end_and_nowhere_else() -> None:
    grammars = byte_grammars()
    matcher = grammars.matcher(grammar_for(grammars, Regex(pattern="a+")))
    assert next_tokens(matcher) == {ord("a")}
    matcher.consume(ord("a"))
    assert next_tokens(matcher) == {ord("a"), END, OTHER_END}
    matcher.consume(OTHER_END)
    assert matcher.is_stopped
    assert not matcher.error


def test_an_answer_that_nothing_can_follow_is_over_without_an_end_token() -> None:
    grammars = byte_grammars()
    matcher: Any = grammars.matcher(grammar_for(grammars, Choice(options=("ab", "cd"))))
    matcher.consume(ord("c"))
    assert not matcher.is_stopped
    matcher.consume(ord("d"))
    assert matcher.is_stopped
    assert next_tokens(matcher) == {END, OTHER_END}


def test_a_callers_text_never_becomes_a_special_token() -> None:
    """With one choice only, the text is cut into tokens as the tokenizer would cut it."""
    grammars = byte_grammars()
    for grammar in (
        schema_grammar(grammars, {"const": "<|end|></think>"}),
        grammar_for(grammars, Choice(options=('"<|end|></think>"',))),
    ):
        assert is_taken(grammars, grammar, b'"<|end|></think>"')
        assert next_tokens(grammars.matcher(grammar)) == {ord('"')}
        assert next_tokens(grammars.matcher(grammar, b'"')) == {ord("<")}


def test_tokens_without_text_are_never_allowed() -> None:
    grammars = byte_grammars()
    matcher = grammars.matcher(grammar_for(grammars, Regex(pattern=r"(.|\n)*")))
    assert max(next_tokens(matcher) - {END, OTHER_END}) < 270


def test_what_must_come_is_cut_as_the_tokenizer_cuts_it_if_that_is_known() -> None:
    wanted = {"const": "abab"}

    def cut(text: str) -> list[int]:
        tokens: list[int] = []
        while text:
            size = 2 if text.startswith("ab") else 1
            tokens.append(262 if size == 2 else ord(text[0]))
            text = text[size:]
        return tokens

    known = byte_grammars(encode=cut)
    assert next_tokens(known.matcher(schema_grammar(known, wanted), b'"')) == {262}
    unknown = byte_grammars(encode=None)
    assert next_tokens(unknown.matcher(schema_grammar(unknown, wanted), b'"')) == {ord("a"), 262}


@pytest.mark.parametrize("seed", range(5))
def test_a_matcher_made_from_the_tokens_so_far_allows_the_same(seed: int) -> None:
    grammars = byte_grammars()
    grammar = schema_grammar(grammars, OBJECT)
    tokens, is_whole = drawn(grammars, grammar, Random(seed), 500)
    assert is_whole
    running = grammars.matcher(grammar)
    for place, token in enumerate(tokens):
        again = byte_grammars().matcher(grammar, tokens[:place])
        assert next_tokens(again) == next_tokens(running)
        running.consume(token)


def test_copies_of_a_grammar_go_their_own_ways() -> None:
    grammars = byte_grammars()
    grammar = grammar_for(grammars, Choice(options=("ab", "cd")))
    one, other = grammars.matcher(grammar), grammars.matcher(grammar)
    one.consume(ord("a"))
    assert next_tokens(other) >= {ord("a"), ord("c")}


def test_a_token_that_breaks_the_grammar_is_an_error_and_no_end() -> None:
    grammars = byte_grammars()
    matcher = grammars.matcher(grammar_for(grammars, Regex(pattern="a+")), b"a")
    matcher.consume(ord("b"))
    assert matcher.error
    assert not matcher.is_stopped
    bits = unset_bits(1, SIZE)
    bits[:] = 0
    matcher.fill(bits, 0)
    assert unpacked(bits, SIZE).all(), "nothing is drawn from no token"


def test_an_error_stays_and_does_not_quote_what_was_asked() -> None:
    grammars = byte_grammars()
    matcher = grammars.matcher(grammar_for(grammars, Choice(options=("secret",))), b"se")
    matcher.consume(ord("x"))
    said = matcher.error
    matcher.consume(ord("c"))
    assert matcher.error == said
    assert said == BROKEN
    assert "secret" not in said


class SilentMatcher:
    """Writes no mask."""

    def __init__(self, error: str) -> None:
        self._error = error

    def unsafe_compute_mask_ptr(self, _pointer: int, _size: int) -> None: ...

    def is_error(self) -> bool:
        return bool(self._error)

    def get_error(self) -> str:
        return self._error


@pytest.mark.parametrize(
    ("error", "said"),
    [("LexerTooComplex\n<non-verbose/>", "it is too complex"), ("", "lets nothing follow")],
)
def test_a_matcher_that_gives_up_at_a_mask_or_allows_nothing_is_in_error(
    error: str, said: str
) -> None:
    silent: Any = SilentMatcher(error)
    matcher: Any = Matcher(silent, lambda: 0.0)
    bits = np.zeros_like(unset_bits(1, SIZE))
    matcher.fill(bits, 0)
    assert said in matcher.error
    assert unpacked(bits, SIZE).all()


def test_what_shows_only_at_a_mask_is_refused_before_anybody_is_admitted() -> None:
    grammars = byte_grammars()
    with pytest.raises(GrammarRefused, match="no answer keeps to it"):
        grammars.check('start: %json {"$ref": "#"}')
    properties = {f"p{number}": {"type": "null"} for number in range(600)}
    wide = f"start: %json {json.dumps({'type': 'object', 'properties': properties})}"
    grammars.check(wide)
    grammars.check(wide, "[")
    with pytest.raises(GrammarRefused, match="too complex"):
        grammars.check(wide, "{")


def test_masks_that_take_too_long_in_all_fail_their_answer() -> None:
    clock = SlowClock(0.1)
    grammars = byte_grammars(clock=clock)
    matcher = grammars.matcher(grammar_for(grammars, Regex(pattern="a+")))
    bits = unset_bits(1, SIZE)
    filled = 0
    while not matcher.error:
        matcher.fill(bits, 0)
        filled += 1
    assert "too complex" in matcher.error
    assert filled == 11
    assert matcher.seconds == pytest.approx(1.1)


def test_a_long_answer_may_take_longer() -> None:
    clock = SlowClock(0.0004)
    grammars = byte_grammars(clock=clock)
    matcher = grammars.matcher(grammar_for(grammars, Regex(pattern="a+")))
    for _ in range(3000):
        next_tokens(matcher)
        matcher.consume(ord("a"))


def test_a_grammar_is_compiled_once_and_the_longest_unused_is_forgotten(monkeypatch: Any) -> None:
    made: list[str] = []
    compiler = LLMatcher

    def counting(tokenizer: Any, grammar: str, **others: Any) -> Any:
        made.append(grammar)
        return compiler(tokenizer, grammar, **others)

    monkeypatch.setattr(matching, "LLMatcher", counting)
    monkeypatch.setattr(matching, "PROTOTYPES_MAX", 2)
    grammars = byte_grammars()
    one, two, three = ('start: "a"', 'start: "b"', 'start: "c"')
    for grammar in (one, two, one, three):
        grammars.check(grammar)
        grammars.matcher(grammar)
    assert made == [one, two, three]
    grammars.matcher(one)
    assert made == [one, two, three]
    grammars.matcher(two)
    assert made == [one, two, three, two]


def test_a_refused_grammar_is_refused_again() -> None:
    grammars = byte_grammars()
    for _ in range(2):
        with pytest.raises(GrammarRefused):
            grammars.check("start: nothing")


def test_nobody_compiles_with_the_lock_held(monkeypatch: Any) -> None:
    lock = threading.Lock()
    compiler = LLMatcher
    seen: list[bool] = []

    def watching(*given: Any, **others: Any) -> Any:
        seen.append(lock.locked())
        return compiler(*given, **others)

    monkeypatch.setattr(matching, "LLMatcher", watching)
    byte_grammars(lock=lock).matcher('start: "a"')
    assert seen == [False]


def test_without_a_token_that_ends_an_answer_there_are_no_grammars() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        byte_grammars(end_tokens=(SIZE,))


@pytest.mark.parametrize("token", [0, 31, 32, 63, 257, 299])
def test_one_token_alone_can_be_allowed(token: int) -> None:
    bits = unset_bits(2, SIZE)
    only(bits, 1, token)
    assert np.flatnonzero(unpacked(bits, SIZE)[1]).tolist() == [token]
    assert unpacked(bits, SIZE)[0].all()
    assert [each for each in range(SIZE) if allows(bits, 1, each)] == [token]


HOSTILE = {
    "a pattern of exponential states": {"type": "string", "pattern": "^(a|b)*a(a|b){18}$"},
    "twenty patterns": {
        "allOf": [{"type": "string", "pattern": f"^.*{letter}.{{15}}$"} for letter in "abcdefghij"]
    },
    "a counted pattern": {"type": "string", "pattern": "^.{1,10000}$"},
    "repeats of repeats": {"type": "string", "pattern": "^((a{1,50}){1,50}){1,50}$"},
    "a long string": {"type": "string", "minLength": 100_000},
    "a long array": {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
    "doubling": {
        "$defs": {
            **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(16)},
            "d16": {"type": "integer"},
        },
        "$ref": "#/$defs/d0",
    },
    "many options": {"enum": [f"option {n}" for n in range(3000)]},
    "optional properties": {
        "type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(400)}
    },
    "optional properties of two": {
        "allOf": [
            {"type": "object", "properties": {f"{side}{n}": {} for n in range(400)}}
            for side in "pq"
        ]
    },
    "alternatives of alternatives": {
        "anyOf": [{"anyOf": [{"type": "array", "maxItems": n} for n in range(30)]}] * 30
    },
    "itself in itself": {
        "anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "object",
                  "additionalProperties": {"$ref": "#"}}, {"type": "string"}]
    },
}  # fmt: skip


@pytest.mark.parametrize("wanted", HOSTILE.values(), ids=HOSTILE)
def test_no_schema_stalls_whoever_compiles_it_or_draws_by_it(wanted: Any) -> None:
    """Within bounds that leave a busy machine room: without them some of these take minutes."""
    grammars = byte_grammars(clock=time.perf_counter)
    began_at = time.perf_counter()
    assert len(json.dumps(wanted)) < 65536
    try:
        grammar = schema_grammar(grammars, wanted)
        grammars.check(grammar, "{")
    except GrammarRefused:
        assert time.perf_counter() - began_at < 5
        return
    assert time.perf_counter() - began_at < 5
    chance, matcher = Random(1), grammars.matcher(grammar)
    bits = unset_bits(1, SIZE)
    for _ in range(300):
        began_at = time.perf_counter()
        matcher.fill(bits, 0)
        assert time.perf_counter() - began_at < 1
        if matcher.error or matcher.is_stopped:
            break
        matcher.consume(chance.choice(np.flatnonzero(unpacked(bits, SIZE)[0]).tolist()))
