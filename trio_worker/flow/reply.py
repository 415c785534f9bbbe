"""Where one request's answer goes, as far as its task knows: messages, of which one is the last."""

from __future__ import annotations

from typing import Protocol

from trio_worker.errors import WorkerError
from trio_worker.protocol.turn import RequestId
from trio_worker.wire.dialect import Dialect


class Reply(Protocol):
    """The messages of one answer, in order, ended by exactly one terminal message.

    Everything here is synchronous: whatever cancels a request's task, its terminal message is
    handed over in one step, which no cancellation can cut in two.
    """

    @property
    def dialect(self) -> Dialect:
        """How the bodies are written."""

    @property
    def ended(self) -> bool:
        """Whether the terminal message has been handed over; then nothing may follow."""

    @property
    def backlogged(self) -> bool:
        """Whether so much of it waits to be sent that the request is to be given up."""

    def send(self, body: bytes) -> None:
        """One message that is not the last. Raises `PayloadTooLarge`; then nothing was sent."""

    def finish(self, body: bytes) -> None:
        """The terminal message of a request that was served. Raises `PayloadTooLarge`."""

    def fail(self, error: WorkerError, *, retry_after_ms: int | None = None) -> None:
        """The terminal message of a request that was not served, or not to its end."""

    def discard_unsent(self) -> None:
        """Forget what could not be sent yet."""


def without_details(error: WorkerError, too_large: WorkerError) -> WorkerError:
    """The same, as short as it can be: with its details, such as the text so far, it is too large.

    `too_large` says so.
    """
    short = type(error)(error.message[:256], retryable=error.retryable)
    short.details["details_omitted"] = too_large.message
    return short


class OpenReply(Protocol):
    """Opens the answer to one request; `is_admitted` says that there will be a task for it."""

    def __call__(self, request_id: RequestId, *, is_admitted: bool) -> Reply: ...
