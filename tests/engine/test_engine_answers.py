"""How an answer ends, and what of it is shown."""

from __future__ import annotations

from typing import Any

import pytest
from support.batches import (
    run_one,
)
from support.tiny_model import (
    END,
    byte_token,
)

pytestmark = pytest.mark.mlx


def test_an_answer_has_exactly_max_tokens(batch: Any) -> None:
    for max_tokens in (1, 2, 9):
        of = run_one(batch, max_tokens=max_tokens)
        assert len(of.tokens) == max_tokens
        assert of.finish == "length"


def test_max_tokens_counts_what_was_produced_before(batch: Any) -> None:
    assert len(run_one(batch, produced=(9, 9, 9), max_tokens=5).tokens) == 2


def test_the_end_token_stops_the_answer_and_shows_nothing(batch: Any) -> None:
    of = run_one(batch, logit_bias=((END, 100.0),))
    assert (of.tokens, of.text, of.finish) == ([END], "", "stop")


def test_a_stop_string_across_tokens_ends_the_answer_without_it(batch: Any) -> None:
    x, y = byte_token(ord("x")), byte_token(ord("y"))
    bias = {"logit_bias": ((x, 100.0), (y, 100.0)), "temperature": 2.0, "max_tokens": 200}
    free = run_one(batch, seed=6, **bias)
    assert set(free.text) == {"x", "y"}
    at = free.text.index("xyxy")
    stopped = run_one(batch, seed=6, stop=("zz", "xyxy"), **bias)
    assert stopped.finish == "stop"
    assert stopped.text == free.text[:at]
    assert len(stopped.tokens) == at + 4
    back = run_one(batch, seed=6, stop=("xyxy",), produced=stopped.tokens[: at + 2], **bias)
    assert (back.text, len(back.tokens), back.finish) == ("", 2, "stop")


def test_what_only_began_like_a_stop_string_is_shown_at_the_end(batch: Any) -> None:
    x = byte_token(ord("x"))
    of = run_one(batch, logit_bias=((x, 100.0),), stop=("x" * 20,), max_tokens=5)
    assert (of.text, of.finish) == ("xxxxx", "length")
    assert of.texts[:4] == [""] * 4


def test_characters_of_several_tokens_come_whole(batch: Any) -> None:
    bias = tuple((byte_token(byte), 100.0) for byte in "\U0001f600".encode())
    of = run_one(batch, logit_bias=bias, temperature=2.0, seed=1, max_tokens=300)
    of_bytes = {token: byte for byte in range(256) if (token := byte_token(byte))}
    raw = bytes(of_bytes[token] for token in of.tokens)
    assert of.text == raw.decode("utf-8", "replace")
    assert any(ord(character) > 0xFFFF for character in of.text)


def test_a_stop_string_after_characters_of_several_tokens_with_log_probabilities(
    batch: Any,
) -> None:
    """Every token has its log-probability, also those whose text is held back or empty."""
    bias = tuple((byte_token(byte), 100.0) for byte in "\U0001f600".encode())
    settings = {"logit_bias": bias, "temperature": 2.0, "seed": 1, "max_tokens": 300}
    free = run_one(batch, **settings).text
    face = next(character for character in free if ord(character) > 0xFFFF)
    of = run_one(batch, stop=(face,), logprobs=True, top_logprobs=1, **settings)
    assert of.finish == "stop"
    assert of.text == free[: free.index(face)]
    assert of.tokens[-4:] == [byte_token(byte) for byte in face.encode()]
    assert len(of.logprobs) == len(of.tokens)
    assert all(one is not None and len(one.top) == 1 for one in of.logprobs)
