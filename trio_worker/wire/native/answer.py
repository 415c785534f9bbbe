"""Writes the bodies of an answer, chat's and completions'."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from trio_worker.protocol.prompt import Piece, Reasoning
from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob
from trio_worker.wire.native.calls import Call, CallDelta, CallIds, call_deltas, whole_calls
from trio_worker.wire.native.logprobs import Logprobs, MessageLogprobs, TextLogprobs
from trio_worker.wire.native.whole_choice import WholeChoice


class _PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class _CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of tokens, as OpenAI names them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptTokensDetails
    completion_tokens_details: _CompletionTokensDetails

    @classmethod
    def of(cls, *, prompt: int, completion: int, cached: int, reasoning: int = 0) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=_PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=_CompletionTokensDetails(reasoning_tokens=reasoning),
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
    reasoning_content: str | None = None
    tool_calls: tuple[CallDelta, ...] | None = None


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str | None
    """None where there are calls in the place of a text."""
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: tuple[Call, ...] | msgspec.UnsetType = msgspec.UNSET


class _Choice(msgspec.Struct, kw_only=True):
    """One of `delta`, `message` and `text` is set; the others are left out."""

    index: int = 0
    delta: _Delta | msgspec.UnsetType = msgspec.UNSET
    message: _Message | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: tuple[_Choice, ...]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    worker: WorkerNote | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.json.Encoder()

_HERE = "\0"
"""A text that no id and no model's name has in it."""
_HERE_WRITTEN = _encoder.encode(_HERE)


_SILENT = (b'"delta":{}', b'"delta":{"role":"assistant"}', b'"text":"","logprobs":null')
_ENDED = b'"finish_reason":"'
"""As the ones before, what no text can spell inside of a body: its quotation marks would have
backslashes."""


def is_silent(chunk: bytes) -> bool:
    """Whether a chunk of a stream, but the last, says nothing: an opening, or a keep-alive."""
    return any(each in chunk for each in _SILENT) and _ENDED not in chunk


class AnswerWriter:
    """Writes the bodies of one request's answer."""

    def __init__(
        self, *, request_id: RequestId, model: str, created: int, chat: bool, choices: int = 1
    ) -> None:
        """`created` is in seconds since the epoch; `chat` says that `messages` were sent.

        The answer to a `prompt` has a text where that to messages has a message.
        """
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"
        self._model = model
        self._created = created
        self._chat = chat
        self._said = [0] * choices
        """Characters, counted where each token's place among them is told."""
        self._call_ids = [CallIds(request_id, choice) for choice in range(choices)]
        # The chunks of a choice are alike but for their texts.
        self._around_text = [
            self._chunk(choice, _Delta(content=_HERE)).split(_HERE_WRITTEN)
            for choice in range(choices)
        ]

    def opening(self, choice: int = 0) -> bytes:
        """The first chunk of a choice in a stream: the request has been admitted."""
        return self._chunk(choice, _Delta(role="assistant"))

    def keep_alive(self, choice: int = 0) -> bytes:
        """An empty chunk: the request is alive and nothing can be shown yet."""
        return self._chunk(choice, _Delta())

    def chunk(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        beside: Sequence[Piece] = (),
        choice: int = 0,
    ) -> bytes:
        """What one token shows, beside the text what it adds to the reasoning and to calls.

        Of one answer, all chunks have log-probabilities or none.
        """
        if not logprobs and not beside:
            before, after = self._around_text[choice]
            return before + _encoder.encode(text) + after
        body = self._chunk(
            choice,
            self._delta(text, beside, choice) if beside else _Delta(content=text),
            logprobs=(
                self._logprobs(logprobs, [self._said[choice]] * len(logprobs)) if logprobs else None
            ),
        )
        self._said[choice] += len(text)
        return body

    def ending(self, finish: FinishReason, choice: int = 0) -> bytes:
        """The last chunk of a choice, where something follows in the stream."""
        return self._chunk(choice, _Delta(), finish=finish)

    def closing(self, finish: FinishReason, usage: Usage, note: WorkerNote) -> bytes:
        """The last chunk of a stream with one choice, where it is not a summary."""
        return self._chunk(0, _Delta(), finish=finish, usage=usage, note=note)

    def summary(self, usage: Usage, note: WorkerNote) -> bytes:
        """The last chunk of a stream whose choices have all ended before."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._body(kind, (), usage, note)

    def whole(
        self,
        choices: Sequence[WholeChoice],
        usage: Usage,
        note: WorkerNote,
        *,
        with_logprobs: bool = False,
    ) -> bytes:
        """The only message of an answer that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        written = tuple(
            self._whole_choice(index, choice, with_logprobs=with_logprobs)
            for index, choice in enumerate(choices)
        )
        return self._body(kind, written, usage, note)

    def _delta(self, text: str, beside: Sequence[Piece], choice: int) -> _Delta:
        thought = "".join(each.text for each in beside if isinstance(each, Reasoning))
        return _Delta(
            content=text or None,
            reasoning_content=thought or None,
            tool_calls=call_deltas(beside, self._call_ids[choice]),
        )

    def _whole_choice(self, index: int, choice: WholeChoice, *, with_logprobs: bool) -> _Choice:
        calls = whole_calls(choice.beside, self._call_ids[index]) if self._chat else ()
        text = choice.text or None if calls else choice.text
        # Where there are calls in the place of a text, none of its tokens is there to be told.
        with_logprobs = with_logprobs and text is not None
        written = _Choice(
            index=index,
            logprobs=self._logprobs(choice.logprobs, choice.offsets) if with_logprobs else None,
            finish_reason=choice.finish,
        )
        if self._chat:
            written.message = _Message(
                content=text,
                reasoning_content=choice.reasoning or msgspec.UNSET,
                tool_calls=calls or msgspec.UNSET,
            )
        else:
            written.text = choice.text
        return written

    def _logprobs(self, logprobs: Sequence[TokenLogprob], offsets: Sequence[int]) -> Logprobs:
        if self._chat:
            return MessageLogprobs.of(logprobs)
        return TextLogprobs.of(logprobs, offsets)

    def _chunk(
        self,
        choice: int,
        delta: _Delta,
        *,
        logprobs: Logprobs | None = None,
        finish: FinishReason | None = None,
        usage: Usage | msgspec.UnsetType = msgspec.UNSET,
        note: WorkerNote | msgspec.UnsetType = msgspec.UNSET,
    ) -> bytes:
        written = _Choice(index=choice, logprobs=logprobs, finish_reason=finish)
        if self._chat:
            written.delta = delta
            return self._body("chat.completion.chunk", (written,), usage, note)
        written.text = delta.content or ""
        return self._body("text_completion", (written,), usage, note)

    def _body(
        self,
        kind: str,
        choices: tuple[_Choice, ...],
        usage: Usage | msgspec.UnsetType,
        note: WorkerNote | msgspec.UnsetType,
    ) -> bytes:
        return _encoder.encode(
            _Body(
                id=self._id,
                object=kind,
                created=self._created,
                model=self._model,
                choices=choices,
                usage=usage,
                worker=note,
            )
        )
