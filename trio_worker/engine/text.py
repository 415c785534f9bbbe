"""Turns the tokens of an answer into text that may be shown, and finds the stop strings.

The texts handed out for a sequence add up to a function of its tokens alone, so a sequence that
is computed again after a crash is fed its old tokens silently and goes on with the next character.
No part of a character is ever handed out, and no part of a stop string.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterable
from typing import Any, Protocol

from trio_worker.markup.finding import overlap_of


class Detokeniser(Protocol):
    """The text of one token after the other. Holds back what is not a whole character yet."""

    def feed(self, token: int) -> str: ...

    def flush(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""


class Vocabulary:
    """What every sequence shares: the bytes of each token, and which tokens end an answer."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(tokenizer.all_special_ids).union(
            id_ for id_, token in added if token.special
        )
        self._texts = {id_: str(token.content) for id_, token in added}
        self._bytes = byte_level_vocabulary(tokenizer)
        # The tokenise thread uses the tokenizer at the same time, and it is not thread-safe.
        self._tokenizer = copy.deepcopy(tokenizer) if self._bytes is None else None

    def special_in(self, marks: Iterable[str]) -> frozenset[int]:
        """The tokens that show nothing by themselves, and of which one of these is made."""
        texts = {token: self._texts.get(token, "") for token in self._special}
        return frozenset(
            token for token, text in texts.items() if text and any(text in mark for mark in marks)
        )

    def detokeniser(self, shown: frozenset[int] = frozenset()) -> Detokeniser:
        """With `shown`, special tokens that are shown nevertheless."""
        if self._bytes is not None:
            return ByteLevel(self._bytes, self._special - shown if shown else self._special)
        return Redecoding(self._tokenizer, self._special - shown if shown else None)

    def token_text(self, token: int) -> str:
        """One token by itself, as it is shown beside its log-probability."""
        if self._bytes is not None:
            return self._bytes.get(token, b"").decode("utf-8", "replace")
        assert self._tokenizer is not None
        return str(self._tokenizer.decode([token]))


class ByteLevel:
    """For byte-level BPE, where a token is a string of bytes: exact, and linear in the length."""

    def __init__(self, vocabulary: dict[int, bytes], silent: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._silent = silent
        self._held = b""

    def feed(self, token: int) -> str:
        if token in self._silent:
            return ""
        # A model may have more rows than its tokenizer has tokens; those stand for no text.
        held = self._held + self._vocabulary.get(token, b"")
        # What an incremental decoder does, without its two Python calls a token.
        text, whole = codecs.utf_8_decode(held, "replace")
        self._held = held[whole:]
        return text

    def flush(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class Redecoding:
    """For every other tokenizer: decodes a short window twice and hands out the difference."""

    def __init__(self, tokenizer: Any, silent: frozenset[int] | None = None) -> None:
        """`silent` are the tokens that show nothing; None: the special ones."""
        self._tokenizer = tokenizer
        self._silent = silent
        self._tokens: list[int] = []
        self._window = 0
        self._shown = 0

    def feed(self, token: int) -> str:
        if self._silent is not None and token in self._silent:
            return ""
        self._tokens.append(token)
        before, now = self._decode(self._shown), self._decode(len(self._tokens))
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        before, now = self._decode(self._shown), self._decode(len(self._tokens))
        self._window = self._shown = len(self._tokens)
        return now[len(before) :]

    def _decode(self, end: int) -> str:
        window = self._tokens[self._window : end]
        return str(
            self._tokenizer.decode(
                window,
                skip_special_tokens=self._silent is None,
                clean_up_tokenization_spaces=False,
            )
        )


class StopMatcher:
    """Cuts a text off before the first stop string; holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop string was found (then nothing follows)."""
        if not self._stops:
            return text, False
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        cut = len(held) - overlap_of(held, self._stops)
        self._held = held[cut:]
        return held[:cut], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one sequence: its detokeniser and its stop matcher, in this order."""

    def __init__(self, vocabulary: Vocabulary, stops: tuple[str, ...]) -> None:
        self._detokeniser = vocabulary.detokeniser()
        self._matcher = StopMatcher(stops)

    def recall(self, tokens: Iterable[int]) -> None:
        """Take in what was handed out before."""
        for token in tokens:
            self.feed(token)

    def feed(self, token: int) -> tuple[str, bool]:
        return self._matcher.feed(self._detokeniser.feed(token))

    def finish(self, *, is_cut: bool = False) -> tuple[str, bool]:  # noqa: ARG002 - it is text
        """The end of the text, once no token follows."""
        text, stopped = self._matcher.feed(self._detokeniser.flush())
        return (text, True) if stopped else (text + self._matcher.flush(), False)


def byte_level_vocabulary(tokenizer: Any) -> dict[int, bytes] | None:
    """The bytes of every token, or None if the tokenizer is not plain byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    alphabet = byte_alphabet()
    added = {id_: str(token.content) for id_, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = {}
    for token, id_ in tokenizer.get_vocab().items():
        if id_ in added:
            vocabulary[id_] = added[id_].encode()
        else:
            vocabulary[id_] = b"".join(
                bytes((alphabet[char],)) if char in alphabet else char.encode() for char in token
            )
    return vocabulary


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
