"""The headers of the messages of an answer, of errors too."""

from __future__ import annotations

from trio_worker.errors import WorkerError
from trio_worker.protocol.turn import RequestId

HEADER_REQUEST_ID = "Request-Id"
HEADER_WORKER_ID = "Worker-Id"
HEADER_SEQUENCE = "Sequence"
HEADER_TERMINAL = "Terminal"
HEADER_ERROR = "Nats-Service-Error"
HEADER_ERROR_NUMBER = "Nats-Service-Error-Code"


def headers(
    *,
    request_id: RequestId,
    worker_id: str,
    sequence: int,
    terminal: bool,
    error: WorkerError | None = None,
) -> dict[str, str]:
    """The headers of one message of an answer; `sequence` counts 0, 1, 2 and so on."""
    values = {
        HEADER_REQUEST_ID: request_id,
        HEADER_WORKER_ID: worker_id,
        HEADER_SEQUENCE: str(sequence),
    }
    if terminal:
        values[HEADER_TERMINAL] = "error" if error else "done"
    if error:
        values[HEADER_ERROR_NUMBER] = str(error.number)
        values[HEADER_ERROR] = f"{error.code}: {error.message}"[:512]
    return values
