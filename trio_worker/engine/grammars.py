"""The grammars of a model: what llguidance must know of its tokenizer."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from trio_worker.engine.text import byte_level_vocabulary
from trio_worker.grammar.matching import ByteTokens, Grammars

log = logging.getLogger("trio_worker.engine")

PLAIN_TEXT = '{"a": ["b", 1]}'
"""Begins as an answer may begin, and tells whether a tokenizer adds anything to a text."""


def open_grammars(tokenizer: Any, *, end_tokens: Iterable[int], size: int) -> Grammars | None:
    """Those of a model whose logits are `size` wide; None if its tokenizer cannot be read so.

    Takes a fraction of a second, and 50 MB.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    texts = byte_level_vocabulary(tokenizer)
    described = backend.to_str()
    try:
        return Grammars(
            described
            if texts is None
            else ByteTokens(texts=texts, encode=_encode(described, texts)),
            special=_special(tokenizer),
            end_tokens=end_tokens,
            size=size,
            # Of this thread alone: what others take meanwhile is no fault of the grammar.
            clock=time.thread_time,
            lock=threading.Lock(),
        )
    except ValueError as exc:
        log.warning("no answer of this model can be held to a form: %s", exc)
        return None


def _special(tokenizer: Any) -> dict[str, int]:
    """The tokens that are no text: the special ones, and whatever else looks like a mark."""
    return {
        str(token.content): id_
        for id_, token in tokenizer.added_tokens_decoder.items()
        if token.special or _is_mark(str(token.content))
    }


def _is_mark(text: str) -> bool:
    return (text[:1], text[-1:]) in (("<", ">"), ("[", "]"))


def _encode(described: str, texts: Mapping[int, bytes]) -> Callable[[str], list[int]] | None:
    """Cuts text into tokens as the model knows it, byte for byte; None if that is not to be had.

    Added tokens are left out, special or not: a caller's `<think>` is so many letters.
    """
    bare: dict[str, Any] = {"added_tokens": [], "normalizer": None, "post_processor": None}
    plain = Tokenizer.from_str(json.dumps({**json.loads(described), **bare}))

    def encode(text: str) -> list[int]:
        return list(plain.encode(text, add_special_tokens=False).ids)

    again = b"".join(texts.get(token, b"") for token in encode(PLAIN_TEXT))
    return encode if again == PLAIN_TEXT.encode() else None
