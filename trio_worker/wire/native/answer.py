"""Writes the bodies of an answer, chat's and completions'."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import msgspec

from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob


class _PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of tokens, as OpenAI names them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptTokensDetails

    @classmethod
    def of(cls, *, prompt: int, completion: int, cached: int) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=_PromptTokensDetails(cached_tokens=cached),
        )


class WorkerNote(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker says about how it served the request."""

    id: str
    request_id: str
    seed: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    priority: str
    resumed: int
    degraded: tuple[str, ...]


class _Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk of a stream adds to the message."""

    role: str | None = None
    content: str | None = None


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class _Alternative(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    utf8: list[int] | None = msgspec.field(name="bytes")


class _TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    utf8: list[int] | None = msgspec.field(name="bytes")
    top_logprobs: tuple[_Alternative, ...]


class _MessageLogprobs(msgspec.Struct, frozen=True):
    """As chat has them: an entry a token."""

    content: tuple[_TokenLogprob, ...]
    refusal: None = None

    @classmethod
    def of(cls, logprobs: Sequence[TokenLogprob]) -> _MessageLogprobs:
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


class _TextLogprobs(msgspec.Struct, frozen=True):
    """As completions have them: a list of each thing, with a place for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]

    @classmethod
    def of(
        cls, logprobs: Sequence[TokenLogprob], texts: Sequence[str], *, begins_at: int
    ) -> _TextLogprobs:
        """`texts` is what each token has shown; `begins_at` characters stand before the first."""
        offsets = list(accumulate(map(len, texts), initial=begins_at))
        return cls(
            tokens=[each.token for each in logprobs],
            token_logprobs=[each.logprob for each in logprobs],
            top_logprobs=(
                [_by_token(each) for each in logprobs]
                if any(each.top for each in logprobs)
                else None
            ),
            text_offset=offsets[:-1],
        )


_Logprobs: TypeAlias = _MessageLogprobs | _TextLogprobs


class _Choice(msgspec.Struct, kw_only=True):
    """One of `delta`, `message` and `text` is set; the others are left out."""

    index: int = 0
    delta: _Delta | msgspec.UnsetType = msgspec.UNSET
    message: _Message | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: tuple[_Choice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    worker: WorkerNote | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.json.Encoder()

_HERE = "\0"
"""A text that no id and no model's name has in it."""
_HERE_WRITTEN = _encoder.encode(_HERE)


_SILENT = (b'"delta":{}', b'"delta":{"role":"assistant"}', b'"text":"","logprobs":null')
"""What no text can spell inside of a body: its quotation marks would have backslashes."""


def is_silent(chunk: bytes) -> bool:
    """Whether a chunk of a stream, but the last, says nothing: the opening, or a keep-alive."""
    return any(each in chunk for each in _SILENT)


class AnswerWriter:
    """Writes the bodies of one request's answer."""

    def __init__(self, *, request_id: RequestId, model: str, created: int, chat: bool) -> None:
        """`created` is in seconds since the epoch; `chat` says that `messages` were sent.

        The answer to a `prompt` has a text where that to messages has a message.
        """
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"
        self._model = model
        self._created = created
        self._chat = chat
        self._said = 0
        """Characters, counted where each token's place among them is told."""
        # The chunks of an answer are alike but for their texts.
        self._before_text, self._after_text = self._body(_Delta(content=_HERE)).split(_HERE_WRITTEN)

    def opening(self) -> bytes:
        """The first chunk of a stream: the request has been admitted."""
        return self._body(_Delta(role="assistant"))

    def keep_alive(self) -> bytes:
        """An empty chunk: the request is alive and nothing can be shown yet."""
        return self._body(_Delta())

    def chunk(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """What one token shows; of one answer, all chunks have its log-probability or none."""
        if logprobs:
            body = self._body(_Delta(content=text), logprobs=self._logprobs(logprobs, (text,)))
            self._said += len(text)
            return body
        return self._before_text + _encoder.encode(text) + self._after_text

    def closing(self, finish: FinishReason, usage: Usage, note: WorkerNote) -> bytes:
        """The last chunk of a stream."""
        return self._body(_Delta(), finish=finish, usage=usage, note=note)

    def whole(
        self,
        texts: Sequence[str],
        logprobs: Sequence[TokenLogprob] | None,
        finish: FinishReason,
        usage: Usage,
        note: WorkerNote,
    ) -> bytes:
        """The only message of an answer that is not streamed; `texts` is what each token shows."""
        return self._body(
            _Message(role="assistant", content="".join(texts)),
            logprobs=None if logprobs is None else self._logprobs(logprobs, texts),
            finish=finish,
            usage=usage,
            note=note,
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprob], texts: Sequence[str]) -> _Logprobs:
        if self._chat:
            return _MessageLogprobs.of(logprobs)
        return _TextLogprobs.of(logprobs, texts, begins_at=self._said)

    def _body(
        self,
        part: _Delta | _Message,
        *,
        logprobs: _Logprobs | None = None,
        finish: FinishReason | None = None,
        usage: Usage | msgspec.UnsetType = msgspec.UNSET,
        note: WorkerNote | msgspec.UnsetType = msgspec.UNSET,
    ) -> bytes:
        choice = _Choice(logprobs=logprobs, finish_reason=finish)
        if not self._chat:
            kind = "text_completion"
            choice.text = part.content or ""
        elif isinstance(part, _Delta):
            kind = "chat.completion.chunk"
            choice.delta = part
        else:
            kind = "chat.completion"
            choice.message = part
        return _encoder.encode(
            _Body(
                id=self._id,
                object=kind,
                created=self._created,
                model=self._model,
                choices=(choice,),
                usage=usage,
                worker=note,
            )
        )


def _utf8(token: str) -> list[int] | None:
    """The token's bytes; None where it is not whole characters, and some bytes are not known."""
    return None if "\ufffd" in token else list(token.encode())


def _by_token(logprob: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the one that was chosen; of those alike as text, the likeliest."""
    values: dict[str, float] = {}
    for token, value in (*logprob.top, (logprob.token, logprob.logprob)):
        values.setdefault(token, value)
    return values
