"""How many tokens an answer may reason with, and what must come then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from trio_worker.grammar.budget import ReasoningBudget


@dataclass(frozen=True)
class Marks:
    start: str
    end: str


TEXTS = ["<think>", "</think>", "a", "b", "</", "think", ">", "<th", "ink>", "</th", "</think><th"]
WORDS = dict(enumerate(TEXTS))
OPEN, CLOSE, A, B, SLASH, THINK, SHUT, HALF, OTHER_HALF, CLOSE_HALF, CLOSE_AND_HALF = WORDS


def budget(most: int, *, end_mark: tuple[int, ...] = (CLOSE,), starts: bool = True) -> Any:
    return ReasoningBudget(
        Marks("<think>", "</think>"),
        most,
        end_mark=end_mark,
        text_of=WORDS.__getitem__,
        starts_in_reasoning=starts,
    )


def forced_after(of: Any, *tokens: int) -> list[int | None]:
    """What must come at the beginning, and after each of these."""
    found = [of.forced]
    for token in tokens:
        of.consume(token)
        found.append(of.forced)
    return found


def test_the_end_must_come_when_the_tokens_are_spent() -> None:
    assert forced_after(budget(2), A, B, CLOSE, A) == [None, None, CLOSE, None, None]


def test_no_tokens_at_all_end_it_at_once() -> None:
    assert forced_after(budget(0), CLOSE, A) == [CLOSE, None, None]


def test_who_ends_by_itself_is_let_be() -> None:
    assert forced_after(budget(2), A, CLOSE, A, B, A) == [None] * 6


def test_what_is_written_before_the_start_mark_is_not_counted() -> None:
    of = budget(1, starts=False)
    assert forced_after(of, A, A, OPEN, A, CLOSE) == [None, None, None, None, CLOSE, None]


def test_an_answer_without_reasoning_is_never_touched() -> None:
    assert set(forced_after(budget(0, starts=False), A, B, A, B)) == {None}


def test_marks_are_found_across_tokens() -> None:
    of = budget(1, starts=False)
    assert forced_after(of, HALF, OTHER_HALF, A) == [None, None, None, CLOSE]
    assert forced_after(budget(3), A, CLOSE_HALF, OTHER_HALF, A, A) == [None] * 6


def test_a_mark_may_begin_in_the_token_that_another_ends_in() -> None:
    of = budget(1)
    assert forced_after(of, A, CLOSE_AND_HALF, OTHER_HALF) == [None, CLOSE, None, CLOSE]


def test_an_end_mark_of_several_tokens_is_written_to_its_end() -> None:
    of = budget(1, end_mark=(SLASH, THINK, SHUT))
    assert forced_after(of, A, SLASH, THINK, SHUT, A) == [None, SLASH, THINK, SHUT, None, None]


def test_an_end_that_could_not_come_yet_begins_again() -> None:
    of = budget(1, end_mark=(SLASH, THINK, SHUT))
    assert forced_after(of, A, B, SLASH, A, SLASH) == [None, SLASH, SLASH, THINK, SLASH, THINK]


def test_a_mark_whose_tokens_do_not_show_it_is_not_forced_for_ever() -> None:
    assert forced_after(budget(1, end_mark=(A, B)), B, A, B, A) == [None, A, B, None, None]


def test_reasoning_that_begins_again_has_nothing_left() -> None:
    of = budget(1)
    assert forced_after(of, A, CLOSE, B, OPEN, CLOSE) == [None, CLOSE, None, None, CLOSE, None]


@pytest.mark.parametrize("cut", range(7))
def test_it_is_a_function_of_the_tokens(cut: int) -> None:
    tokens = (A, B, SLASH, THINK, SHUT, A, OPEN)
    whole = budget(2, end_mark=(SLASH, THINK, SHUT))
    expected = forced_after(whole, *tokens)
    again = budget(2, end_mark=(SLASH, THINK, SHUT))
    for token in tokens[:cut]:
        again.consume(token)
    assert forced_after(again, *tokens[cut:]) == expected[cut:]
