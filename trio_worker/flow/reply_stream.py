"""Answering one caller: numbered messages, ended by exactly one terminal message.

Rule 1: after the terminal message nothing is sent.
Rule 2: sending is synchronous. Whatever cancels a request's task, the terminal message is put
into the outbox in one step, which no cancellation can cut in two; the broker, closed last,
delivers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from trio_worker.errors import MessageTooLarge, PayloadTooLarge, WorkerError
from trio_worker.flow.reply import without_details
from trio_worker.ports import Outlet
from trio_worker.protocol.turn import RequestId
from trio_worker.wire.dialect import Dialect

BACKLOG_BYTES_MAX = 256 * 2**10
"""What one request may hold unpublished while the broker cannot be reached."""


class OpensOutlets(Protocol):
    """The broker, or who stands before it."""

    def open_outlet(
        self, subject: str, *, reply: str | None = None, headers: Mapping[str, str]
    ) -> Outlet:
        """As `Broker.open_outlet`."""


class ReplyStream:
    """The messages of one answer."""

    def __init__(
        self,
        broker: OpensOutlets,
        *,
        dialect: Dialect,
        subject: str,
        control_subject: str | None,
        request_id: RequestId,
        worker_id: str,
        sequence: int = 0,
    ) -> None:
        """`sequence` is the number of its first message."""
        self.dialect = dialect
        self._outlet = broker.open_outlet(
            subject,
            reply=control_subject,
            headers=dialect.common_headers(request_id=request_id, worker_id=worker_id),
        )
        self._request_id = request_id
        self.sequence = sequence
        """The number of the next message."""
        self.ended = False

    @property
    def backlogged(self) -> bool:
        return self._outlet.unpublished_bytes > BACKLOG_BYTES_MAX

    def send(self, body: bytes) -> None:
        """One message that is not the last. Raises `PayloadTooLarge`; then nothing was sent.

        An empty body is what a dialect has no words for: there is no message.
        """
        if body:
            self._publish(body, terminal=False)

    def finish(self, body: bytes) -> None:
        """The terminal message of a request that was served. Raises `PayloadTooLarge`."""
        self._publish(body, terminal=True)

    def fail(self, error: WorkerError, *, retry_after_ms: int | None = None) -> None:
        """The terminal message of a request that was not served, or not to its end."""
        try:
            self._publish(
                self.dialect.error_body(error, retry_after_ms), terminal=True, error=error
            )
        except PayloadTooLarge as too_large:
            short = without_details(error, too_large)
            self._publish(
                self.dialect.error_body(short, retry_after_ms), terminal=True, error=short
            )

    def discard_unsent(self) -> None:
        """Forget what could not be published yet; numbering goes on, so the gap shows."""
        self._outlet.discard()

    def _publish(self, body: bytes, *, terminal: bool, error: WorkerError | None = None) -> None:
        assert not self.ended, f"a second terminal message for {self._request_id}"
        try:
            self._outlet.publish(
                body,
                self.dialect.headers(sequence=self.sequence, terminal=terminal, error=error),
            )
        except MessageTooLarge as exc:
            raise PayloadTooLarge(
                f"a message of this answer has {exc.size} bytes with its headers; "
                f"the server takes {exc.limit}: ask for a stream, or for fewer tokens",
                details={"bytes": exc.size, "limit": exc.limit},
            ) from exc
        self.sequence += 1
        self.ended = terminal
