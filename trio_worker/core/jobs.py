"""Which jobs a worker asks for, when, and what becomes of one that was not answered."""

from __future__ import annotations

from hashlib import blake2b

from trio_worker.core.priority import NAMES
from trio_worker.core.request import SEED_END
from trio_worker.errors import ErrorCode, WorkerError

ROUND = 8
"""Of so many rounds of asking, one begins with each of the lower levels."""
PRIORITY_MAX = 9

_LATER = frozenset(
    {ErrorCode.QUEUE_FULL, ErrorCode.RESOURCE_LIMIT_EXCEEDED, ErrorCode.DUPLICATE_REQUEST}
)


class Rounds:
    """In which order the levels are asked. Its state: how often they have been."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> tuple[str, ...]:
        """The most urgent level first; once in `ROUND` the lowest, and once the one between.

        So whatever comes on the levels above, of `ROUND` jobs that a worker takes one is the
        oldest of each lower level that has any: who is the k-th to wait there is taken after at
        most `ROUND` × k jobs of any worker that asks.
        """
        self._count += 1
        high, medium, low = NAMES
        match self._count % ROUND:
            case 0:
                return (low, medium, high)
            case 4:
                return (medium, high, low)
            case _:
                return NAMES


def free_slots(*, slots: int, in_flight: int, beside: int) -> int:
    """How many jobs would begin at once.

    `in_flight` counts what runs or waits here, direct requests too; `beside` the jobs that this
    worker has and that are in neither state, since they are looked up or stored.
    """
    return max(0, slots - in_flight - beside)


def pull_priority(has: int) -> int:
    """Of a pull by a worker that has so many requests and jobs: the freest is served first."""
    return min(PRIORITY_MAX, has)


def seed_of(request_id: str) -> int:
    """The seed of a job that names none: whoever does it, and however often, says the same."""
    digest = blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % SEED_END


def is_for_later(error: WorkerError) -> bool:
    """Whether it says that this worker has no room just now: the job has not been tried."""
    return error.code in _LATER and (error.retryable or error.code is ErrorCode.DUPLICATE_REQUEST)


def is_no_answer(error: WorkerError) -> bool:
    """Whether a job that ended with it goes back: the fault is not the job's, nor its time."""
    return error.retryable and error.code in {ErrorCode.WORKER_DRAINING, ErrorCode.INTERNAL}
