"""What may be shown of an answer, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer
from support.tiny_model import END, VOCABULARY, byte_token, write_tiny_model

from trio_worker.engine.text import AnswerText, Redecoding, StopMatcher, Vocabulary

pytestmark = pytest.mark.mlx

TEXT = "caf\u00e9 \U0001f600 \u4f60\u597d \U0001f468\u200d\U0001f469\u200d\U0001f467 the end\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> Any:
    return Vocabulary(tokenizer)


def one_by_one(text: Any) -> Any:
    return [byte_token(byte) for byte in text.encode()]


def test_no_character_is_ever_split(vocabulary: Any) -> None:
    answer = AnswerText(vocabulary, ())
    pieces = [answer.feed(token)[0] for token in one_by_one(TEXT)]
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_text_without_byte_tokens_is_shown_as_the_tokenizer_decodes_it(
    vocabulary: Any, tokenizer: Any
) -> None:
    tokens = tokenizer.encode(" hello world and the string")
    answer = AnswerText(vocabulary, ())
    assert "".join(answer.feed(token)[0] for token in tokens) == tokenizer.decode(tokens)


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=40))
def test_any_tokens_give_the_bytes_they_stand_for(vocabulary: Any, tokens: Any) -> None:
    """Random weights, and bad models, say things that are no UTF-8."""
    answer = AnswerText(vocabulary, ())
    shown = "".join(answer.feed(token)[0] for token in tokens) + answer.finish()[0]
    raw = b"".join(vocabulary._bytes.get(token, b"") for token in tokens if token > END)
    assert shown == raw.decode("utf-8", "replace")


def test_an_incomplete_character_is_flushed_at_the_end(vocabulary: Any) -> None:
    answer = AnswerText(vocabulary, ())
    assert answer.feed(byte_token(0xF0)) == ("", False)
    assert answer.finish() == ("\ufffd", False)


def test_special_tokens_show_nothing_but_have_a_name(vocabulary: Any) -> None:
    assert AnswerText(vocabulary, ()).feed(END) == ("", False)
    assert vocabulary.token_text(END) == "<|im_end|>"


def test_a_token_beyond_the_tokenizer_shows_nothing(vocabulary: Any) -> None:
    assert AnswerText(vocabulary, ()).feed(VOCABULARY - 1) == ("", False)


def test_the_way_for_other_tokenizers_shows_the_same(tokenizer: Any) -> None:
    detokeniser = Redecoding(tokenizer)
    pieces = [detokeniser.feed(token) for token in one_by_one(TEXT)]
    assert "".join(pieces) + detokeniser.flush() == TEXT
    assert all("\ufffd" not in piece for piece in pieces)


def test_the_way_for_other_tokenizers_flushes_what_is_incomplete(tokenizer: Any) -> None:
    detokeniser = Redecoding(tokenizer)
    assert detokeniser.feed(byte_token(0xF0)) == ""
    assert detokeniser.flush() == "\ufffd"
    assert detokeniser.flush() == ""


def feed_all(matcher: Any, pieces: Any) -> Any:
    shown = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def test_a_stop_string_is_found_across_pieces_and_cut_off() -> None:
    assert feed_all(StopMatcher(("END",)), ["abc E", "N", "D more"]) == ("abc ", True)


def test_what_only_began_like_a_stop_string_is_shown_in_the_end() -> None:
    assert feed_all(StopMatcher(("END",)), ["abc EN", "d"]) == ("abc ENd", False)
    assert feed_all(StopMatcher(("END",)), ["abc EN"]) == ("abc EN", False)


def test_the_earliest_stop_string_counts() -> None:
    assert feed_all(StopMatcher(("cd", "b")), ["abcd"]) == ("a", True)


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_the_shown_text_never_contains_a_stop_string_and_ends_before_the_first(
    text: Any, stops: Any, data: Any
) -> None:
    """However the text is cut into pieces."""
    pieces, rest = [], text
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:cut])
        rest = rest[cut:]
    shown, stopped = feed_all(StopMatcher(tuple(stops)), pieces)
    found = any(stop in text for stop in stops)
    assert stopped == found
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not found:
        assert shown == text
