"""What a dialect is: one way to spell requests and their answers. Pure: bytes in, bytes out.

A package below `wire/` is one, by functions of these names; the native one lends its types to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from trio_worker.core.request import Request
from trio_worker.errors import WorkerError
from trio_worker.protocol.prompt import Piece
from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob
from trio_worker.wire.native.answer import Usage, WorkerNote
from trio_worker.wire.native.fields import RequestLimits
from trio_worker.wire.native.request import Fields
from trio_worker.wire.native.whole_choice import WholeChoice


class AnswerWriter(Protocol):
    """Writes the bodies of one request's answer."""

    def opening(self, choice: int = 0, /) -> bytes:
        """The first message of a choice in a stream: the request has been admitted."""

    def keep_alive(self, choice: int = 0, /) -> bytes:
        """The request is alive and nothing can be shown yet."""

    def chunk(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        beside: Sequence[Piece] = (),
        choice: int = 0,
        /,
    ) -> bytes:
        """What one token shows."""

    def ending(self, finish: FinishReason, choice: int = 0, /) -> bytes:
        """The last message of a choice, where something follows in the stream."""

    def closing(self, finish: FinishReason, usage: Usage, note: WorkerNote, /) -> bytes:
        """The last message of a stream with one choice, where it is not a summary."""

    def summary(self, usage: Usage, note: WorkerNote, /) -> bytes:
        """The last message of a stream whose choices have all ended before."""

    def whole(
        self,
        choices: Sequence[WholeChoice],
        usage: Usage,
        note: WorkerNote,
        /,
        *,
        with_logprobs: bool = False,
    ) -> bytes:
        """The only message of an answer that is not streamed."""


class MakeWriter(Protocol):
    """`created` is in seconds since the epoch; `chat` says that `messages` were sent."""

    def __call__(
        self, *, request_id: RequestId, model: str, created: int, chat: bool, choices: int = 1
    ) -> AnswerWriter: ...


class Dialect(Protocol):
    """How requests are read, and how what becomes of them is written."""

    @property
    def AnswerWriter(self) -> MakeWriter:  # noqa: N802 - a class has this name
        """For one request."""

    def parse_body(self, body: bytes, limits: RequestLimits, /) -> Fields:
        """The fields of a request under their canonical names. Raises `WorkerError`."""

    def request_id_of(self, fields: Fields, /) -> RequestId | None:
        """The request's id if it has one that may be used as a subject token."""

    def to_request(
        self,
        fields: Fields,
        limits: RequestLimits,
        /,
        *,
        request_id: RequestId,
        draw_seed: Callable[[], int],
    ) -> Request:
        """The checked request. Raises `WorkerError`."""

    def error_body(self, error: WorkerError, retry_after_ms: int | None, /) -> bytes:
        """What a request is answered that was not served."""

    def common_headers(self, *, request_id: RequestId, worker_id: str) -> dict[str, str]:
        """The headers that all messages of an answer have."""

    def headers(
        self, *, sequence: int, terminal: bool, error: WorkerError | None = None
    ) -> dict[str, str]:
        """What else one message has."""
