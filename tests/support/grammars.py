"""A vocabulary of single bytes for grammars, and answers held against them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import numpy as np

from trio_worker.grammar.composed import composed
from trio_worker.grammar.matching import ByteTokens, Grammars, Matcher, unpacked, unset_bits
from trio_worker.grammar.rules import answer_rules
from trio_worker.protocol.prompt import Constraint, JsonSchema

END, OTHER_END, OPEN, CLOSE = 256, 257, 258, 259
SPECIAL = {"<|end|>": END, "<|other|>": OTHER_END, "<think>": OPEN, "</think>": CLOSE}
MERGED = {260: b'{"', 261: b'":', 262: b"ab", 263: b"true"}
SIZE = 300
"""As logits, with more rows than there are tokens."""


def byte_grammars(**others: Any) -> Grammars:
    """The tokens are the bytes, a few words, the special ones, and nothing."""
    texts = {token: bytes([token]) for token in range(256)} | MERGED
    settings = {
        "special": SPECIAL,
        "end_tokens": (END, OTHER_END),
        "size": SIZE,
        "clock": lambda: 0.0,
        **others,
    }
    encode = settings.pop("encode", lambda text: list(text.encode()))
    return Grammars(ByteTokens(texts=texts, encode=encode), **settings)


def grammar_for(grammars: Grammars, constraint: Constraint) -> str:
    return composed(answer=answer_rules(constraint), parts_of=grammars.parts_of)


def schema_grammar(grammars: Grammars, schema: Any) -> str:
    return grammar_for(grammars, JsonSchema(schema=json.dumps(schema)))


def next_tokens(matcher: Matcher) -> set[int]:
    """Those that may come next. Raises AssertionError for a matcher in error."""
    bits = unset_bits(1, SIZE)
    matcher.fill(bits, 0)
    assert not matcher.error
    return set(np.flatnonzero(unpacked(bits, SIZE)[0]).tolist())


def is_taken(grammars: Grammars, grammar: str, answer: bytes | Iterable[int]) -> bool:
    """Whether an answer of these tokens keeps to the grammar, and may end there."""
    matcher = grammars.matcher(grammar)
    for token in answer:
        if token not in next_tokens(matcher):
            return False
        matcher.consume(token)
        assert not matcher.error
    return END in next_tokens(matcher)


def drawn(grammars: Grammars, grammar: str, chance: Random, most: int) -> tuple[list[int], bool]:
    """Up to `most` tokens by chance among those that may come; and whether they are an answer."""
    matcher = grammars.matcher(grammar)
    tokens: list[int] = []
    while not matcher.is_stopped and len(tokens) < most:
        token = chance.choice(sorted(next_tokens(matcher)))
        if token in (END, OTHER_END):
            return tokens, True
        matcher.consume(token)
        tokens.append(token)
    return tokens, matcher.is_stopped


def text_of(tokens: Sequence[int]) -> bytes:
    """What tokens of the byte vocabulary stand for; of special ones, nothing."""
    return b"".join(MERGED.get(t, bytes([t]) if t < 256 else b"") for t in tokens)
