"""Which tokens may come next, by llguidance: compiled grammars, and where an answer is in one.

1. A grammar is compiled once, and its first masks computed, before anybody waits for it: a copy
   of it costs next to nothing.
2. A matcher in error answers every mask with "the end" and raises nothing: who asks for a mask or
   consumes a token asks for `error` then.
3. Where an answer is in its grammar is a function of its tokens.
4. What belongs to the world is passed in: a clock, and a lock for prototypes that two threads use.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from trio_worker.grammar import GrammarRefused

PROTOTYPES_MAX = 128
"""Compiled grammars that are kept, each of 0.05 to 0.1 MB; of a thousand properties, of 1 MB."""
LEXER_STATES_MAX = 20_000
"""Of one answer, 1 to 2 KB each; most answers come to some hundreds."""
PATIENCE_S = 1.0
"""What the masks and the tokens of one answer may take in all, and"""
PATIENCE_A_TOKEN_S = 0.001
"""as much again for each token: a wide regular expression takes half of it on and on."""

BROKEN = "a token breaks the grammar"
"""The error of a matcher that was given what it had not allowed."""

Bits: TypeAlias = npt.NDArray[np.int32]
"""A row of them for each row: bit i % 32 of word i // 32 says whether token i may come next."""

_LIMITS = LLParserLimits(max_lexer_states=LEXER_STATES_MAX, verbose_errors=False)
WITHOUT_FORCING = '%llguidance {"no_forcing": true}\n'
_ERROR_OF_A_SCHEMA = "failed to compile JSON schema: "


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTokens:
    """A vocabulary whose every token is some bytes."""

    texts: Mapping[int, bytes]
    encode: Callable[[str], list[int]] | None
    """Of text, in which nothing is special: a caller's text must not become the end. None: the
    tokenizer makes something else of a text by itself; then no part of an answer is forced to be
    cut into tokens as it would cut it."""


class Grammars:
    """The grammars of one model's vocabulary, each compiled once.

    Its state is the compiled ones, the latest used last. They are copied under the lock, and
    compiled outside of it.
    """

    def __init__(
        self,
        vocabulary: ByteTokens | str,
        *,
        special: Mapping[str, int],
        end_tokens: Iterable[int],
        size: int,
        clock: Callable[[], float],
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """`vocabulary` may also be the text of a tokenizer.json, for those not made of bytes.

        `special` are the tokens that stand for no text of an answer, by their names: marks, and
        those that end it. `size` is the width of the model's logits, and more or less than the
        tokenizer has. `clock` gives seconds. Raises ValueError for a tokenizer.json that
        llguidance cannot read, and where no token ends an answer.
        """
        self.size = size
        self._ends = sorted(token for token in end_tokens if token < size)
        self._clock = clock
        self._lock = lock or nullcontext()
        self._prototypes: OrderedDict[str, LLMatcher] = OrderedDict()
        if isinstance(vocabulary, str):
            self._tokenizer = LLTokenizer(vocabulary, n_vocab=size, eos_token=self._ends)
            # It would take a caller's "<|im_end|>" for the end, were it to cut what must come.
            self._options = WITHOUT_FORCING
        else:
            wrapped = TokenizerWrapper(_Wrapped(vocabulary, special, self._ends, size))
            self._tokenizer = LLTokenizer(wrapped, eos_token=self._ends)
            self._options = "" if vocabulary.encode else WITHOUT_FORCING
        self._special = {
            name: token
            for name, token in special.items()
            if token < size and self._tokenizer.is_special_token(token)
        }

    def token_of(self, mark: str) -> int | None:
        """The token that this text is, where a grammar has to refer to it by its number."""
        return self._special.get(mark)

    def parts_of(self, mark: str) -> list[str | int]:
        """A text as a grammar has to write it: special tokens, and the texts between them."""
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        parts = re.split(f"({'|'.join(names)})", mark) if names else [mark]
        return [self._special.get(part, part) for part in parts if part]

    def check(self, grammar: str, probe: str = "") -> None:
        """Raises `GrammarRefused` if nobody can keep to this Lark, or not after `probe`.

        May take seconds for the worst; it lets go of the interpreter meanwhile.
        """
        prototype = self._prototype(grammar)
        if probe and not prototype.is_stopped():
            further = prototype.deep_copy()
            # It may not begin like that, which is no error.
            further.try_consume_tokens(self._tokenizer.greedy_tokenize(probe))
            _compute_mask(further)

    def matcher(self, grammar: str, produced: Sequence[int] = ()) -> Matcher:
        """Where an answer that has these tokens is in the grammar; raises as `check` does."""
        prototype = self._prototype(grammar)
        with self._lock:
            matcher = Matcher(prototype.deep_copy(), self._clock)
        for token in produced:
            matcher.consume(token)
        return matcher

    def _prototype(self, grammar: str) -> LLMatcher:
        with self._lock:
            if (known := self._prototypes.get(grammar)) is not None:
                self._prototypes.move_to_end(grammar)
                return known
        made = LLMatcher(self._tokenizer, self._options + grammar, log_level=0, limits=_LIMITS)
        if made.is_error():
            raise GrammarRefused(_fault(made.get_error()))
        _compute_mask(made)
        with self._lock:
            self._prototypes[grammar] = made
            while len(self._prototypes) > PROTOTYPES_MAX:
                self._prototypes.popitem(last=False)
        return made


class Matcher:
    """Where one answer is in its grammar. Of one thread."""

    def __init__(self, matcher: LLMatcher, clock: Callable[[], float]) -> None:
        self._matcher = matcher
        self._clock = clock
        self._tokens = 0
        self._error = ""
        self.seconds = 0.0
        """What it has taken, most of it for masks."""

    def consume(self, token: int) -> None:
        """The answer goes on with this token, or ends with it. One not allowed is an error."""
        self._tokens += 1
        if self._error:
            return
        began_at = self._clock()
        if not self._matcher.consume_token(token):
            fault = _fault(self._matcher.get_error())
            self._error = fault if fault in _PLAIN.values() else BROKEN
        self.seconds += self._clock() - began_at

    @property
    def is_stopped(self) -> bool:
        """The answer is complete, and nothing can follow."""
        return not self._error and self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the answer cannot go on; "": it can."""
        return self._error

    def fill(self, bits: Bits, row: int) -> None:
        """Write which tokens may come next into a row. In error, and only then, these are all."""
        if not self._error:
            began_at = self._clock()
            words = bits[row]
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self.seconds += self._clock() - began_at
            if self._matcher.is_error():
                self._error = _fault(self._matcher.get_error())
            elif self.seconds > PATIENCE_S + PATIENCE_A_TOKEN_S * self._tokens:
                self._error = "the grammar is too complex: to follow it takes too long"
            elif not words.any():
                # Whoever chooses from no token is given the first.
                self._error = "the grammar lets nothing follow"
        if self._error:
            bits[row] = -1


BYTES_END = 256
"""The end of an answer, for `grammars_of_bytes`."""


def grammars_of_bytes(clock: Callable[[], float]) -> Grammars:
    """Those of a vocabulary whose tokens are the 256 bytes, by their numbers, and the end."""
    return Grammars(
        ByteTokens(
            texts={byte: bytes((byte,)) for byte in range(BYTES_END)},
            encode=lambda text: list(text.encode()),
        ),
        special={"<end>": BYTES_END},
        end_tokens=(BYTES_END,),
        size=BYTES_END + 1,
        clock=clock,
    )


def unset_bits(rows: int, size: int) -> Bits:
    """A mask of each row that allows every one of `size` tokens."""
    return np.full((rows, -(-size // 32)), -1, dtype=np.int32)


def only(bits: Bits, row: int, token: int) -> None:
    """Allow this token alone, in a row."""
    bits[row] = 0
    bits[row, token // 32] = np.uint32(1 << token % 32).astype(np.int32)


def allows(bits: Bits, row: int, token: int) -> bool:
    return bool(bits[row, token // 32] >> (token % 32) & 1)


def unpacked(bits: Bits, size: int) -> npt.NDArray[np.bool_]:
    """A truth value for each token of each row."""
    return np.unpackbits(bits.view(np.uint8), axis=1, count=size, bitorder="little").view(np.bool_)


class _Wrapped:
    """A vocabulary as llguidance asks for it."""

    def __init__(
        self,
        vocabulary: ByteTokens,
        special: Mapping[str, int],
        ends: Sequence[int],
        size: int,
    ) -> None:
        self.eos_token_id = ends[0] if ends else 0
        self.bos_token_id = None
        # A token without text is never allowed.
        self.tokens = [vocabulary.texts.get(token, b"") for token in range(size)]
        names = {token: name for name, token in special.items() if token < size}
        for token, name in names.items():
            self.tokens[token] = name.encode()
        self.special_token_ids = sorted(names)
        self._encode = vocabulary.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode()) if self._encode else []


def _compute_mask(matcher: LLMatcher) -> None:
    """Raises `GrammarRefused` for what compiles and yet has nothing to begin with."""
    matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarRefused(_fault(matcher.get_error()))


def _fault(message: str) -> str:
    """What llguidance says of a grammar, without the grammar."""
    lines = message.removesuffix("\n<non-verbose/>").split("\n")
    said = [line.strip() for line in lines if not _is_quotation(line)]
    text = " ".join(line for line in said if line)
    text = text.partition(_ERROR_OF_A_SCHEMA)[2] or text
    return next((plain for found, plain in _PLAIN.items() if found in text), text)


def _is_quotation(line: str) -> bool:
    number, bar, _ = line.partition(" | ")
    return (bar != "" and number.strip().isdigit()) or line.strip() == "^"


_PLAIN = {
    "Current row has": "it is too complex: at one place there are too many ways on",
    "NoExtension": "no answer keeps to it, however it goes on",
    "ParserTooComplex": "it is too complex",
    "LexerTooComplex": "it is too complex",
}
