"""The headers of the messages of an answer, of errors too."""

from __future__ import annotations

from enum import StrEnum

from trio_worker.errors import WorkerError
from trio_worker.protocol.turn import RequestId


class Header(StrEnum):
    """Every header of an answer."""

    REQUEST_ID = "Request-Id"
    WORKER_ID = "Worker-Id"
    SEQUENCE = "Sequence"
    """The number of the message within the answer: 0, 1, 2 and so on."""
    TERMINAL = "Terminal"
    """On the last message alone: `done` or `error`."""
    ERROR = "Nats-Service-Error"
    """With the next one, on an error; both are named as the tools of NATS expect it."""
    ERROR_NUMBER = "Nats-Service-Error-Code"


_SEQUENCE = Header.SEQUENCE.value
"""In every message; a member takes longer to hash than what it stands for."""
_ERROR_MAX = 512
"""Characters of the error in its header."""


def common_headers(*, request_id: RequestId, worker_id: str) -> dict[str, str]:
    """The headers that all messages of an answer have."""
    return {Header.REQUEST_ID: request_id, Header.WORKER_ID: worker_id}


def headers(*, sequence: int, terminal: bool, error: WorkerError | None = None) -> dict[str, str]:
    """What else one message has; `error` is what a terminal message answers, if it is one."""
    values: dict[str, str] = {_SEQUENCE: str(sequence)}
    if terminal:
        values[Header.TERMINAL] = "error" if error else "done"
    if error:
        values[Header.ERROR_NUMBER] = str(error.number)
        values[Header.ERROR] = f"{error.code}: {error.message}"[:_ERROR_MAX]
    return values
