"""The answer to a job: kept in whole, until it has been stored."""

from __future__ import annotations

from trio_worker.errors import PayloadTooLarge, WorkerError
from trio_worker.flow.reply import without_details
from trio_worker.protocol.turn import RequestId
from trio_worker.wire.dialect import Dialect

HEADERS_ROOM = 4096
"""What a message may need beside its body, the headers of the stream included."""


class KeptReply:
    """Implements `Reply`. Its state: the terminal message, once there is one."""

    def __init__(
        self, *, dialect: Dialect, request_id: RequestId, worker_id: str, max_payload: int
    ) -> None:
        self.dialect = dialect
        self.backlogged = False
        self.body = b""
        self.headers: dict[str, str] = {}
        """Of the terminal message; empty until then."""
        self.error: WorkerError | None = None
        """What the request has failed with, if it has."""
        self.retry_after_ms: int | None = None
        self._common = dialect.common_headers(request_id=request_id, worker_id=worker_id)
        self._limit = max(1, max_payload - HEADERS_ROOM)

    @property
    def ended(self) -> bool:
        return bool(self.headers)

    def send(self, body: bytes) -> None:
        """There is no such message: a job is answered as a whole."""
        raise AssertionError(f"a message that is not the last, of {len(body)} bytes")

    def finish(self, body: bytes) -> None:
        """The answer. Raises `PayloadTooLarge`; then nothing is kept."""
        self._keep(body, None)

    def fail(self, error: WorkerError, *, retry_after_ms: int | None = None) -> None:
        """What the job was not done for."""
        self.retry_after_ms = retry_after_ms
        try:
            self._keep(self.dialect.error_body(error, retry_after_ms), error)
        except PayloadTooLarge as too_large:
            short = without_details(error, too_large)
            self._keep(self.dialect.error_body(short, retry_after_ms), short)

    def discard_unsent(self) -> None:
        """Nothing is sent from here."""

    def _keep(self, body: bytes, error: WorkerError | None) -> None:
        assert not self.ended, "a second terminal message"
        if len(body) > self._limit:
            raise PayloadTooLarge(
                f"this answer has {len(body)} bytes; the server takes {self._limit}: "
                "ask for fewer tokens",
                details={"bytes": len(body), "limit": self._limit},
            )
        self.body, self.error = body, error
        self.headers = self._common | self.dialect.headers(sequence=0, terminal=True, error=error)
