"""Who may come in: places, duplicates, and when this worker is worth asking at all.

A request holds a place for each of its choices, from its admission until that enters the batch or
the request ends; `depth` counts the places taken. It gets all of them or none. Taking them and
everything that speaks against it is one synchronous decision, so nothing can overfill the queue
between a check and an act. Whoever has to wait for places is not overtaken by a later key, however
few places that may need.

`max_per_caller` bounds the places that one caller holds and waits for. It refuses that caller and
nobody else: whether others should come here does not hang on it.

The mapping of requests in flight is there to refuse duplicates, to find the scope a cancel
message means, and to be looked at. Nobody waits on it and no answer goes through it: the one who
waits for an answer is the request's own task.
"""

from __future__ import annotations

from collections import Counter

from sortedcontainers import SortedDict

from trio_worker.core.memory import MB, Pressure, PressureGauge
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Event, QueueKey, Sequence, Stage
from trio_worker.errors import (
    SHUTTING_DOWN,
    DuplicateRequest,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.protocol.turn import RequestId


class Admission:
    """All its state: who is in flight, who holds a place, who waits for one, and three facts.

    Where it is given a request, or returns one, that is the sequence of the first choice.
    """

    def __init__(
        self,
        *,
        queue_enabled: bool,
        max_depth: int,
        max_per_caller: int | None,
        reject_when_full: bool,
        slots: int,
        refuse_unmeetable: bool,
        gauge: PressureGauge,
        queue: RequestQueue,
        rate: ServiceRate,
        arrivals: ArrivalRate,
    ) -> None:
        self.max_depth = max_depth if queue_enabled else slots
        self.max_per_caller = max_per_caller if queue_enabled else None
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
        """One for each request."""
        self.waiting = 0
        """How many places those who wait will take."""
        self._claimed: Counter[str] = Counter()
        """How many places each caller holds or waits for; bound: those who do."""
        self._accepting = False

    @property
    def depth(self) -> int:
        return len(self._placed)

    @property
    def is_full(self) -> bool:
        """Whether the next request would not get a place."""
        return self.is_full_for(1)

    def is_full_for(self, places: int) -> bool:
        """Whether a request for so many places would not get them now."""
        return self.waiting > 0 or not self._has_room(places)

    def _has_room(self, places: int) -> bool:
        live = len(self.in_flight) - self.waiting + places
        if self._queue_enabled:
            # Preempted requests hold no place, but the queue has to have room for them.
            return self.depth + places <= self.max_depth and live <= self.max_depth + self.slots
        return live <= self.slots

    def _gets_places(self, sequence: Sequence) -> bool:
        """Whether there are enough, and nobody has waited for them before it."""
        if self._waiting and self._waiting.peekitem(0)[0] < sequence.key:
            return False
        return self._has_room(len(sequence.rows))

    def refusal(self, sequence: Sequence) -> WorkerError | None:
        """What speaks against taking this request now, if anything does."""
        request_id, places = sequence.request_id, len(sequence.rows)
        if self.draining:
            return WorkerDraining(SHUTTING_DOWN)
        if request_id in self.in_flight:
            return DuplicateRequest(
                f"a request with the id {request_id} is in flight on this worker",
                details={"request_id": request_id},
            )
        most = min(self.max_depth, self.max_per_caller or self.max_depth)
        if places > most:
            return InvalidRequest(
                f"n: {places} choices at a time are more than this worker has places for, {most}",
                details={"field": "n", "limit": most},
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
        if (refusal := self._no_places(sequence)) is not None:
            return refusal
        return self._unmeetable(sequence) if self._refuse_unmeetable else None

    def _no_places(self, sequence: Sequence) -> QueueFull | None:
        """Whether it neither gets places nor may wait for them, for the reason that it is told."""
        places, claimed = len(sequence.rows), self._claimed[sequence.caller]
        if self.max_per_caller is not None and claimed + places > self.max_per_caller:
            who = f"caller {sequence.caller}" if sequence.caller else "requests without a caller"
            return QueueFull(
                f"Request queue full for {who} ({claimed} of {self.max_per_caller} places)",
                details={
                    "caller": sequence.request.caller,
                    "places": claimed,
                    "limit": self.max_per_caller,
                },
            )
        if self._gets_places(sequence) or self.waiting + places <= self._max_waiting:
            return None
        return QueueFull(
            f"Request queue full (depth: {self.depth})",
            details={"depth": self.depth, "max_depth": self.max_depth},
        )

    def _unmeetable(self, sequence: Sequence) -> WorkerError | None:
        """Whether the deadline would pass even if all went as well as it ever did of late.

        Those that stand before it take as long as the mean request, shared by all slots; it
        takes itself as long as the quickest.
        """
        mean_s, quickest_s = self.rate.mean_service_s, self.rate.quickest_service_s
        if mean_s is None or quickest_s is None:
            return None
        estimate_s = self._queue.ahead_of(sequence) * mean_s / self.slots + quickest_s
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
        """Take in a request that nothing speaks against, with its places or waiting for them."""
        rows = sequence.rows
        if self._gets_places(sequence):
            self._placed.update(row.request_id for row in rows)
        else:
            for row in rows:
                row.stage = Stage.WAITING
            self._waiting[sequence.key] = sequence
            self.waiting += len(rows)
        self._claimed[sequence.caller] += len(rows)
        self.in_flight.update((row.request_id, row) for row in rows)
        self.arrivals.record(sequence.arrived_at)

    def batched(self, row: Sequence) -> list[Sequence]:
        """A choice has entered the batch and gives its place up; returns who gets places."""
        self._give_up_place(row)
        return self._followers()

    def leave(self, sequence: Sequence) -> list[Sequence]:
        """The request has ended; returns who gets places, its own or those that it waited for."""
        for row in sequence.rows:
            del self.in_flight[row.request_id]
            self._give_up_place(row)
        if self._waiting.get(sequence.key) is sequence:
            del self._waiting[sequence.key]
            self.waiting -= len(sequence.rows)
            self._claim_less(sequence.caller, len(sequence.rows))
        return self._followers()

    def _give_up_place(self, row: Sequence) -> None:
        """If it holds one: not when it comes back into the batch."""
        if row.request_id in self._placed:
            self._placed.remove(row.request_id)
            self._claim_less(row.caller, 1)

    def _claim_less(self, caller: str, places: int) -> None:
        self._claimed[caller] -= places
        if not self._claimed[caller]:
            del self._claimed[caller]

    def _followers(self) -> list[Sequence]:
        """Give the free places to those who wait, the earliest first, as far as they go."""
        followers = []
        while self._waiting:
            first: Sequence = self._waiting.peekitem(0)[1]
            if not self._has_room(len(first.rows)):
                break
            del self._waiting[first.key]
            self.waiting -= len(first.rows)
            for row in first.rows:
                row.advance(Event.PLACED)
                self._placed.add(row.request_id)
            followers.append(first)
        return followers

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
