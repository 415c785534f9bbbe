"""Tokenizers of several kinds, as grammars see them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.guided import PERSON
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from trio_worker.engine.grammars import open_grammars
from trio_worker.engine.text import byte_alphabet
from trio_worker.grammar.forms import grammar_of
from trio_worker.grammar.matching import unpacked, unset_bits
from trio_worker.markup.style import PLAIN
from trio_worker.protocol.prompt import Choice, Constraint, JsonSchema, Wanted

pytestmark = pytest.mark.mlx

END = "<|im_end|>"


def finished(tokenizer: Tokenizer) -> Any:
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "    ")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def by_bytes(*, adds_space: bool = False, normalizer: Any = None) -> Any:
    """Byte-level BPE, as GPT-2's and Qwen's."""
    tokens = [*byte_alphabet(), "ab"]
    tokenizer = Tokenizer(
        BPE(vocab={each: n for n, each in enumerate(tokens)}, merges=[("a", "b")])
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer)


def by_pieces() -> Any:
    """Pieces with a mark for the space, and bytes for what has no piece, as Llama 2's."""
    pieces = ["▁", *map(chr, range(33, 127)), "▁a", "ab", '{"', '":', "true"]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "a"), ("a", "b"), ("{", '"'), ('"', ":")]
    tokenizer = Tokenizer(
        BPE(vocab={each: n for n, each in enumerate(tokens)}, merges=merges, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return finished(tokenizer)


KINDS = {
    "by bytes": by_bytes(),
    "with a space before": by_bytes(adds_space=True),
    "normalised": by_bytes(normalizer=normalizers.NFC()),
    "by pieces": by_pieces(),
}


def opened(tokenizer: Any) -> Any:
    grammars = open_grammars(
        tokenizer, end_tokens=[tokenizer.eos_token_id], size=len(tokenizer) + 30
    )
    assert grammars is not None
    return grammars


def drawn(tokenizer: Any, constraint: Constraint, seed: int) -> str:
    """An answer by chance, to its end."""
    grammars = opened(tokenizer)
    matcher = grammars.matcher(grammar_of(Wanted(constraint=constraint), PLAIN, grammars))
    tokens: list[int] = []
    chance, bits = Random(seed), unset_bits(1, grammars.size)
    while not matcher.is_stopped:
        matcher.fill(bits, 0)
        assert not matcher.error
        tokens.append(chance.choice(np.flatnonzero(unpacked(bits, grammars.size)[0]).tolist()))
        matcher.consume(tokens[-1])
        assert not matcher.error
    kept = [token for token in tokens if token != tokenizer.eos_token_id]
    # A piece at the beginning of a text loses the space before it.
    before = tokenizer.encode("x", add_special_tokens=False)
    text = str(tokenizer.decode([*before, *kept], clean_up_tokenization_spaces=False))
    return text.partition("x")[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_validates_with_every_kind_of_tokenizer(kind: str, seed: int) -> None:
    text = drawn(KINDS[kind], JsonSchema(schema=json.dumps(PERSON)), seed)
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", [END, f"a {END} <think>", "e\u0301", "    ab"])
def test_a_callers_text_comes_as_it_is_with_every_kind_of_tokenizer(kind: str, option: str) -> None:
    """Neither does it become a special token, nor is it normalised."""
    assert drawn(KINDS[kind], Choice(options=(option,)), 1) == option


def test_marks_are_tokens_though_they_are_not_special_and_spaces_are_text() -> None:
    for kind, tokenizer in KINDS.items():
        grammars = opened(tokenizer)
        assert grammars.parts_of(f"<think> {END}") == [
            *(tokenizer.convert_tokens_to_ids("<think>"), " ", tokenizer.eos_token_id)
        ], kind
        assert grammars.token_of("    ") is None


def test_what_has_no_description_or_no_end_cannot_be_held_to_a_form() -> None:
    assert open_grammars(object(), end_tokens=[1], size=10) is None
    assert open_grammars(KINDS["by bytes"], end_tokens=(), size=300) is None
