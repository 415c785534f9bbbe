"""Who may come in: places, duplicates, and when this worker is worth asking at all.

A request holds a place from its admission until it enters the batch or ends; `depth` counts the
places taken. Taking a place and everything that speaks against it is one synchronous decision,
so nothing can overfill the queue between a check and an act.

The mapping of requests in flight is there to refuse duplicates, to find the scope a cancel
message means, and to be looked at. Nobody waits on it and no answer goes through it: the one who
waits for an answer is the request's own task.
"""

from __future__ import annotations

from sortedcontainers import SortedDict

from trio_worker.core.memory import MB, Pressure, PressureGauge
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Event, QueueKey, Sequence, Stage
from trio_worker.errors import (
    SHUTTING_DOWN,
    DuplicateRequest,
    QueueFull,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.protocol.turn import RequestId


class Admission:
    """All its state: who is in flight, who holds a place, who waits for one, and three facts."""

    def __init__(
        self,
        *,
        queue_enabled: bool,
        max_depth: int,
        reject_when_full: bool,
        slots: int,
        refuse_unmeetable: bool,
        gauge: PressureGauge,
        queue: RequestQueue,
        rate: ServiceRate,
        arrivals: ArrivalRate,
    ) -> None:
        self.max_depth = max_depth if queue_enabled else slots
        self.slots = slots
        self.gauge = gauge
        self.rate = rate
        self.arrivals = arrivals
        self.in_flight: dict[RequestId, Sequence] = {}
        """Bound: max_depth + slots; with `reject_when_full: false` 2 × max_depth + slots."""
        self.engine_ready = False
        self.draining = False
        self._queue = queue
        self._queue_enabled = queue_enabled
        self._refuse_unmeetable = refuse_unmeetable
        self._max_waiting = 0 if reject_when_full or not queue_enabled else max_depth
        self._placed: set[RequestId] = set()
        self._waiting: SortedDict[QueueKey, Sequence] = SortedDict()
        self._accepting = False

    @property
    def depth(self) -> int:
        return len(self._placed)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether the next request would not get a place."""
        live = len(self.in_flight) - self.waiting
        if self._queue_enabled:
            # Preempted requests hold no place, but the queue has to have room for them.
            return self.depth >= self.max_depth or live >= self.max_depth + self.slots
        return live >= self.slots

    def refusal(self, sequence: Sequence) -> WorkerError | None:
        """What speaks against taking this request now, if anything does."""
        request_id = sequence.request_id
        if self.draining:
            return WorkerDraining(SHUTTING_DOWN)
        if request_id in self.in_flight:
            return DuplicateRequest(
                f"a request with the id {request_id} is in flight on this worker",
                details={"request_id": request_id},
            )
        if self.gauge.level is Pressure.CRITICAL:
            used_mb = round(self.gauge.used / MB)
            return ResourceLimitExceeded(
                f"Worker at capacity (memory: {used_mb} MB)",
                details={
                    "memory_mb": used_mb,
                    "critical_memory_mb": round(self.gauge.critical_bytes / MB),
                },
            )
        if self.is_full and self.waiting >= self._max_waiting:
            return QueueFull(
                f"Request queue full (depth: {self.depth})",
                details={"depth": self.depth, "max_depth": self.max_depth},
            )
        return self._unmeetable(sequence) if self._refuse_unmeetable else None

    def _unmeetable(self, sequence: Sequence) -> WorkerError | None:
        """Whether the deadline would pass even if all went as well as it ever did of late.

        Those that stand before it take as long as the mean request, shared by all slots; it
        takes itself as long as the quickest.
        """
        mean_s, quickest_s = self.rate.mean_service_s, self.rate.quickest_service_s
        if mean_s is None or quickest_s is None:
            return None
        estimate_s = self._queue.ahead_of(sequence.key) * mean_s / self.slots + quickest_s
        timeout_s = sequence.request.timeout_s
        if estimate_s <= timeout_s:
            return None
        return RequestTimeout(
            f"the deadline of {timeout_s:g} s cannot be met: an answer would take about "
            f"{estimate_s:.1f} s",
            details={
                "stage": "admission",
                "tokens": 0,
                "timeout_ms": round(1000 * timeout_s),
                "estimate_ms": round(1000 * estimate_s),
            },
        )

    def enter(self, sequence: Sequence) -> None:
        """Take in a request that nothing speaks against, with a place or waiting for one."""
        if self.is_full:
            sequence.stage = Stage.WAITING
            self._waiting[sequence.key] = sequence
        else:
            self._placed.add(sequence.request_id)
        self.in_flight[sequence.request_id] = sequence
        self.arrivals.record(sequence.arrived_at)

    def batched(self, sequence: Sequence) -> Sequence | None:
        """The request has entered the batch and gives its place up; returns who gets it."""
        return self._free_place(sequence)

    def leave(self, sequence: Sequence) -> Sequence | None:
        """The request has ended; returns who gets its place, if it held one."""
        del self.in_flight[sequence.request_id]
        if self._waiting.get(sequence.key) is sequence:
            del self._waiting[sequence.key]
            return None
        return self._free_place(sequence)

    def _free_place(self, sequence: Sequence) -> Sequence | None:
        self._placed.discard(sequence.request_id)
        if not self._waiting or self.is_full:
            return None
        following: Sequence = self._waiting.popitem(0)[1]
        following.advance(Event.PLACED)
        self._placed.add(following.request_id)
        return following

    def assess(self) -> bool:
        """Whether callers should come here: with some room in hand, and with hysteresis.

        False from a depth of max_depth less a batch (at most a quarter of it) on, and true again
        at half of that.
        """
        if not self._can_accept:
            self._accepting = False
        elif not self._queue_enabled:
            self._accepting = not self.is_full
        else:
            high = self.max_depth - min(self.slots, self.max_depth // 4)
            if self.depth >= high:
                self._accepting = False
            elif self.depth <= high // 2:
                self._accepting = True
        return self._accepting

    @property
    def _can_accept(self) -> bool:
        return self.engine_ready and not self.draining and self.gauge.level is not Pressure.CRITICAL

    def why_not_accepting(self) -> str:
        """One sentence for people, when `assess` says no."""
        if self.draining:
            return "draining: the worker is shutting down"
        if not self.engine_ready:
            return "loading: the engine is not ready"
        if self.gauge.level is Pressure.CRITICAL:
            return f"memory: {round(self.gauge.used / MB)} MB is over the critical limit"
        return f"queue: {self.depth} of {self.max_depth} places are taken"

    def retry_after_ms(self) -> int:
        return self.rate.retry_after_ms(waiting=self.depth + self.waiting, slots=self.slots)
