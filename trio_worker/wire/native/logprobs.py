"""Log-probabilities as an answer tells them, chat's and completions'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from trio_worker.protocol.turn import TokenLogprob


class _Alternative(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    utf8: list[int] | None = msgspec.field(name="bytes")


class _TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    utf8: list[int] | None = msgspec.field(name="bytes")
    top_logprobs: tuple[_Alternative, ...]


class MessageLogprobs(msgspec.Struct, frozen=True):
    """As chat has them: an entry a token."""

    content: tuple[_TokenLogprob, ...]
    refusal: None = None

    @classmethod
    def of(cls, logprobs: Sequence[TokenLogprob]) -> MessageLogprobs:
        return cls(
            tuple(
                _TokenLogprob(
                    each.token,
                    each.logprob,
                    _utf8(each.token),
                    tuple(_Alternative(token, value, _utf8(token)) for token, value in each.top),
                )
                for each in logprobs
            )
        )


class TextLogprobs(msgspec.Struct, frozen=True):
    """As completions have them: a list of each thing, with a place for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]

    @classmethod
    def of(cls, logprobs: Sequence[TokenLogprob], offsets: Sequence[int]) -> TextLogprobs:
        """`offsets` says how many characters stand before each token."""
        return cls(
            tokens=[each.token for each in logprobs],
            token_logprobs=[each.logprob for each in logprobs],
            top_logprobs=(
                [_by_token(each) for each in logprobs]
                if any(each.top for each in logprobs)
                else None
            ),
            text_offset=list(offsets),
        )


Logprobs: TypeAlias = MessageLogprobs | TextLogprobs


def _utf8(token: str) -> list[int] | None:
    """The token's bytes; None where it is not whole characters, and some bytes are not known."""
    return None if "\ufffd" in token else list(token.encode())


def _by_token(logprob: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the one that was chosen; of those alike as text, the likeliest."""
    values: dict[str, float] = {}
    for token, value in (*logprob.top, (logprob.token, logprob.logprob)):
        values.setdefault(token, value)
    return values
