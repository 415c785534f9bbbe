"""Everything that can go wrong on purpose: the wire's error codes and the reasons to stop.

Two families. A `WorkerError` is answered to the caller who caused or met it, with its code;
there is one class per code, and two more that only a client raises. A `StopWorker` ends the
process with an exit status; there is one class per status. The two exceptions at the end never
leave the worker: the engine port raises them, and the batcher and the request's own task turn
them into one of the above.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import ClassVar, TypeAlias

Details: TypeAlias = "dict[str, str | int | float | bool | None]"


class ErrorCode(StrEnum):
    """The `code` of an error reply, in the order of the numbers that go with them."""

    INVALID_REQUEST = "INVALID_REQUEST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    DUPLICATE_REQUEST = "DUPLICATE_REQUEST"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    CANCELLED = "CANCELLED"
    ENGINE_FAILED = "ENGINE_FAILED"
    INTERNAL = "INTERNAL"
    RESOURCE_LIMIT_EXCEEDED = "RESOURCE_LIMIT_EXCEEDED"
    WORKER_DRAINING = "WORKER_DRAINING"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"


class WorkerError(Exception):
    """An error that is answered to the caller.

    Attributes:
        message: one sentence saying what was wrong, where, and what to do.
        details: plain values a program can act on.
        retryable: whether the same request may succeed later or elsewhere.
        retry_after_ms: in a client, when the worker thinks that it may.
    """

    code: ClassVar[ErrorCode]
    number: ClassVar[int]
    retryable: bool = False
    retry_after_ms: int | None = None

    def __init__(
        self, message: str, *, details: Details | None = None, retryable: bool | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details: Details = details or {}
        if retryable is not None:
            self.retryable = retryable


class InvalidRequest(WorkerError):
    """The caller sent something that is not a request; sending it again will not help."""

    code = ErrorCode.INVALID_REQUEST
    number = 400


class ContextLengthExceeded(WorkerError):
    """The caller's prompt and `max_tokens` do not fit the model together."""

    code = ErrorCode.CONTEXT_LENGTH_EXCEEDED
    number = 400


class ModelNotFound(WorkerError):
    """The caller asked for another model than the one served here."""

    code = ErrorCode.MODEL_NOT_FOUND
    number = 404


class DuplicateRequest(WorkerError):
    """The caller used a request id that is still in flight on this worker."""

    code = ErrorCode.DUPLICATE_REQUEST
    number = 409


class PayloadTooLarge(WorkerError):
    """A request over the configured size, or an answer over the server's limit."""

    code = ErrorCode.PAYLOAD_TOO_LARGE
    number = 413


class QueueFull(WorkerError):
    """Nobody is at fault: there is no place to wait in right now."""

    code = ErrorCode.QUEUE_FULL
    number = 429
    retryable = True


class RequestCancelled(WorkerError):
    """The caller, or someone who knows the request's id, asked to end it."""

    code = ErrorCode.CANCELLED
    number = 499


class EngineFailed(WorkerError):
    """This very request brings the engine down, or the engine cannot compute it."""

    code = ErrorCode.ENGINE_FAILED
    number = 500


class InternalError(WorkerError):
    """A fault of the worker's own; the log has its traceback."""

    code = ErrorCode.INTERNAL
    number = 500
    retryable = True


class ResourceLimitExceeded(WorkerError):
    """The worker's memory is at its limit, or the request could never fit into it."""

    code = ErrorCode.RESOURCE_LIMIT_EXCEEDED
    number = 503
    retryable = True


SHUTTING_DOWN = "this worker is shutting down; ask another one"


class WorkerDraining(WorkerError):
    """The worker is shutting down; another one may serve the request."""

    code = ErrorCode.WORKER_DRAINING
    number = 503
    retryable = True


class RequestTimeout(WorkerError):
    """The request's deadline passed."""

    code = ErrorCode.REQUEST_TIMEOUT
    number = 504
    retryable = True


BY_CODE: dict[str, type[WorkerError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        ContextLengthExceeded,
        ModelNotFound,
        DuplicateRequest,
        PayloadTooLarge,
        QueueFull,
        RequestCancelled,
        EngineFailed,
        InternalError,
        ResourceLimitExceeded,
        WorkerDraining,
        RequestTimeout,
    )
}


class NoWorker(RequestTimeout):
    """Nobody listened on the request's subject for too long. Only a client raises this."""


class MessageLost(InternalError):
    """A message of the answer is missing, as core NATS allows. Only a client raises this."""


class ExitStatus(IntEnum):
    """How `trio-worker run` ends, in the numbers of sysexits(3)."""

    OK = 0
    UNAVAILABLE = 69
    SOFTWARE = 70
    CONFIG = 78


class StopWorker(Exception):
    """Ends the process with `status`; the message is written for the person who started it."""

    status: ClassVar[ExitStatus]


class ConfigError(StopWorker):
    """What the person configured cannot work: a key, the model, the id, a port, credentials.

    Attributes:
        problems: every problem found, one sentence each.
    """

    status = ExitStatus.CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BrokerUnavailable(StopWorker):
    """NATS could not be reached in time when the worker started."""

    status = ExitStatus.UNAVAILABLE


class WorkerFault(StopWorker):
    """The worker cannot go on: its engine keeps dying, or a fault of its own ended a loop."""

    status = ExitStatus.SOFTWARE


class LossReason(StrEnum):
    """Why an engine was lost: a label for metrics."""

    CRASH = "crash"
    HANG = "hang"
    LOAD = "load"
    """It ended, or hung, before it was ready."""
    PLANNED = "planned"
    """Nobody's fault: it was to be replaced."""


class EngineLost(Exception):
    """The engine process ended or hung; whatever it held is gone. Raised by the engine port."""

    def __init__(self, message: str, *, reason: LossReason) -> None:
        super().__init__(message)
        self.reason = reason


class MessageTooLarge(Exception):
    """A message, headers included, is over the server's limit. Raised by the broker port."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a message of {size} bytes is over the server's limit of {limit}")
        self.size = size
        self.limit = limit
