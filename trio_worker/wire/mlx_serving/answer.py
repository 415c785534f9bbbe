"""Writes the bodies of an answer: a message for each token that shows something, and the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import msgspec

from trio_worker.protocol.prompt import Piece
from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob
from trio_worker.wire.native.answer import Usage, WorkerNote

_SILENCE = b""


class _Token(msgspec.Struct, frozen=True, tag_field="type", tag="token", rename="camel"):
    request_id: str
    token: str
    index: int


class _Done(msgspec.Struct, frozen=True, tag_field="type", tag="done", rename="camel"):
    request_id: str
    total_tokens: int
    latency_ms: float


_encode = msgspec.json.Encoder().encode


class AnswerWriter:
    """Writes the bodies of one request's answer. An empty one is not to be sent.

    Its state: how many tokens it has written.
    """

    def __init__(
        self, *, request_id: RequestId, model: str, created: int, chat: bool, choices: int = 1
    ) -> None:
        """Only the id is told to a controller, whose requests have one choice."""
        del model, created, chat
        assert choices == 1, "a controller's request has one choice"
        self._request_id = request_id
        self._written = 0

    def opening(self, _choice: int = 0, /) -> bytes:
        """Nothing: a controller counts messages for tokens."""
        return _SILENCE

    def keep_alive(self, _choice: int = 0, /) -> bytes:
        """Nothing, likewise."""
        return _SILENCE

    def chunk(
        self,
        text: str,
        _logprobs: Sequence[TokenLogprob] = (),
        _beside: Sequence[Piece] = (),
        _choice: int = 0,
        /,
    ) -> bytes:
        """A token's text, with its place among those that had any."""
        if not text:
            return _SILENCE
        body = _encode(_Token(self._request_id, text, self._written))
        self._written += 1
        return body

    def ending(self, _finish: FinishReason, _choice: int = 0, /) -> bytes:
        """Nothing: only the end of the whole answer is told, and no reason."""
        return _SILENCE

    def closing(self, _finish: FinishReason, usage: Usage, note: WorkerNote, /) -> bytes:
        """The end, with at least one token, which the controller's schema asks for."""
        latency_ms = note.queue_ms + note.prefill_ms + note.decode_ms
        return _encode(
            _Done(self._request_id, max(1, usage.completion_tokens), round(latency_ms, 3))
        )

    def summary(self, *_args: object, **_options: object) -> NoReturn:
        """A controller's request has one choice, whose end is the answer's."""
        raise AssertionError("a summary of an answer to a controller")

    def whole(self, *_args: object, **_options: object) -> NoReturn:
        """A controller's request is always streamed."""
        raise AssertionError("an answer in one message to a controller")
