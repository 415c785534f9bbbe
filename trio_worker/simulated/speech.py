"""What a simulated sequence says: words, and whatever else the form of its answer asks for.

A function of the prompt, the seed and the form. It thinks before it answers where reasoning is
looked for, calls the tools whose names its prompt says, and keeps to a grammar byte by byte, with
an eye on its end.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count, islice

from trio_worker.grammar.matching import BYTES_END, Grammars, allows, grammars_of_bytes, unset_bits
from trio_worker.markup.general import GENERAL_CALLS
from trio_worker.markup.style import Marks, Style
from trio_worker.protocol.prompt import Form

STYLE = Style(reasoning=Marks(start="<think>", end="</think>"), calls=GENERAL_CALLS)
"""How it writes what it thinks, and its calls."""
THOUGHTS_MAX = 8
"""Words that it thinks."""
PIECE_LENGTH = 4
"""Characters of a token that is no word."""
WORD_MAX = 32
"""Characters of the longest word that may be one of its own, and that is remembered."""
BYTES_A_TOKEN = 8
"""More are not said by so many tokens, whatever is held back."""
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "so", "tu")
_DIGITS = {syllable: str(digit) for digit, syllable in enumerate(_SYLLABLES)}
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LIKELY = b'0123456789-:,[{"]}' + _LETTERS
"""What is chosen from where it may; then white space comes where it must."""

Draws = Iterator[int]


def word(token: int) -> str:
    """The word of a token: its digits as syllables."""
    return "".join(_SYLLABLES[int(digit)] for digit in str(token))


def token_said(text: str) -> int | None:
    """The token whose word this is; None if it is nobody's."""
    if len(text) > WORD_MAX:
        return None
    digits = [_DIGITS.get(text[at : at + 2]) for at in range(0, len(text), 2)]
    if not digits or None in digits or (digits[0] == "0" and len(digits) > 1):
        return None
    return int("".join(map(str, digits)))


@lru_cache(maxsize=2**14)
def _token_of_word(text: str, vocabulary: int) -> int:
    """A word that it says itself is the token it was: a conversation goes on as it is cached."""
    said = token_said(text)
    if said is not None and said < vocabulary:
        return said
    return zlib.crc32(text.encode()) % vocabulary


def draws(prompt: tuple[int, ...], seed: int) -> Draws:
    """Numbers below 2^32 without end, of this prompt and seed."""
    base = hashlib.blake2b(repr((prompt, seed)).encode(), digest_size=8).digest()
    return (zlib.crc32(base + position.to_bytes(8, "big")) for position in count())


def answer_tokens(prompt: tuple[int, ...], seed: int, count: int, vocabulary: int) -> list[int]:
    """The first `count` tokens of the answer to `prompt` under `seed`, if it may be anything."""
    return [number % vocabulary for number in islice(draws(prompt, seed), count)]


@dataclass(slots=True)
class Speech:
    """The tokens of an answer, no more than may be said."""

    tokens: list[int] = field(default_factory=list)
    ends: bool = False
    """The last of them is the end of the answer; else there would be more to say."""
    _texts: dict[int, str] = field(default_factory=dict)
    """Of tokens that are no words, by their positions."""

    def text_at(self, position: int) -> str:
        text = self._texts.get(position)
        return f"{word(self.tokens[position])} " if text is None else text

    def add(self, token: int, text: str) -> None:
        self._texts[len(self.tokens)] = text
        self.tokens.append(token)

    def cut(self, length: int) -> None:
        if len(self.tokens) > length:
            self.ends = False
            del self.tokens[length:]


class Speaker:
    """Its state is the grammars that it has kept to."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    @cached_property
    def grammars(self) -> Grammars:
        """Of bytes, whatever the words are."""
        return grammars_of_bytes(lambda: 0.0)

    def token_of(self, text: str) -> int:
        # A longer one comes once, and is not worth being remembered.
        token_of = _token_of_word if len(text) <= WORD_MAX else _token_of_word.__wrapped__
        return token_of(text, self._vocabulary)

    def speech(self, prompt: tuple[int, ...], form: Form, *, seed: int, max_tokens: int) -> Speech:
        """What is answered to `prompt`."""
        drawn = draws(prompt, seed)
        speech = Speech()
        if form.finds_reasoning:
            self._think(speech, form, drawn)
        if form.grammar:
            self._keep_to(form, drawn, speech, max_tokens)
        elif called := [each.name for each in form.tools if self.token_of(each.name) in prompt]:
            self._call(speech, called[: 1 if form.one_call else None], drawn)
        else:
            self._add_words(speech, max_tokens - len(speech.tokens), drawn)
        speech.cut(max_tokens)
        return speech

    def _think(self, speech: Speech, form: Form, drawn: Draws) -> None:
        assert STYLE.reasoning is not None
        most = form.max_reasoning_tokens
        thoughts = next(drawn) % THOUGHTS_MAX + 1
        if not form.starts_in_reasoning:
            self._add(speech, STYLE.reasoning.start)
        self._add_words(speech, thoughts if most is None else min(thoughts, most), drawn)
        self._add(speech, STYLE.reasoning.end)

    def _call(self, speech: Speech, names: Sequence[str], drawn: Draws) -> None:
        self._add_words(speech, next(drawn) % 3, drawn)
        for name in names:
            self._add_text(
                speech, f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
            )
        speech.ends = True

    def _keep_to(self, form: Form, drawn: Draws, speech: Speech, max_tokens: int) -> None:
        said, speech.ends = keeping_to(
            form.grammar, self.grammars, drawn, most_bytes=BYTES_A_TOKEN * max_tokens
        )
        self._add_text(speech, said)

    def _add_words(self, speech: Speech, count: int, drawn: Draws) -> None:
        speech.tokens += [number % self._vocabulary for number in islice(drawn, max(count, 0))]

    def _add_text(self, speech: Speech, text: str) -> None:
        for at in range(0, len(text), PIECE_LENGTH):
            self._add(speech, text[at : at + PIECE_LENGTH])

    def _add(self, speech: Speech, text: str) -> None:
        speech.add(self.token_of(text), text)


def keeping_to(
    grammar: str, grammars: Grammars, drawn: Draws, *, most_bytes: int
) -> tuple[str, bool]:
    """A text that keeps to the grammar, and whether it is complete rather than cut off."""
    matcher = grammars.matcher(grammar)
    bits = unset_bits(1, grammars.size)
    said = bytearray()
    while len(said) < most_bytes and not matcher.is_stopped:
        matcher.fill(bits, 0)
        byte = _chosen(lambda token: allows(bits, 0, token), next(drawn))
        if byte == BYTES_END:
            return said.decode(), True
        matcher.consume(byte)
        said.append(byte)
    assert not matcher.error, matcher.error
    return said.decode("utf-8", "ignore"), matcher.is_stopped


def _chosen(allowed: Callable[[int], bool], number: int) -> int:
    """One of the bytes that are allowed, or the end: what is short and comes to an end."""
    if allowed(BYTES_END) and number % 2:
        return BYTES_END
    letters = [byte for byte in _LETTERS if allowed(byte)]
    # Where any letter may stand, it is in a text, whose end is a quotation mark.
    in_text = len(letters) == len(_LETTERS)
    closing = [byte for byte in (b'"' if in_text else b'"}]') if allowed(byte)]
    if closing and number % 4 == 0:
        return closing[number // 4 % len(closing)]
    likely = letters if in_text else [byte for byte in _LIKELY if allowed(byte)]
    others = likely or [byte for byte in range(BYTES_END) if allowed(byte)]
    return others[number // 4 % len(others)] if others else BYTES_END
