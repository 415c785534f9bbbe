"""What happened in one run, as it was seen from outside of the code that did it.

Everything here only writes down. What cannot be seen afterwards (a bound that was passed for a
moment) is noted as a violation on the spot; what can, `checkers.py` looks for in the end.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import trio

from trio_worker.core.admission import Admission
from trio_worker.core.memory import Pressure
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Sequence
from trio_worker.flow import serving
from trio_worker.ports import Message


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the log."""

    at: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:10.4f}  {self.who:<14} {self.what}"


@dataclass(slots=True, eq=False)
class Published:
    """Everything put into one outlet."""

    messages: list[tuple[float, Message]] = field(default_factory=list)
    discarded: bool = False

    @property
    def inbox(self) -> str:
        return self.messages[0][1].subject

    @property
    def is_admitted(self) -> bool:
        """Messages of an admitted request name its control subject."""
        return self.messages[0][1].reply is not None

    @property
    def terminals(self) -> list[tuple[float, Message]]:
        return [each for each in self.messages if "Terminal" in each[1].headers]


@dataclass(slots=True, eq=False)
class Admitted:
    """One request, from the door on."""

    sequence: Sequence
    at: float
    order: int
    """Among everything that is counted in this run."""
    used_bytes: int
    """What the probe had said last."""
    queued_order: int | None = None
    entered_at: float | None = None
    entered_order: int | None = None
    ended_at: float | None = None
    pressed: bool = False
    """Memory pressure was not normal at some time between its admission and its batch."""

    @property
    def deadline(self) -> float:
        return self.sequence.arrived_at + self.sequence.request.timeout_s


@dataclass(frozen=True, slots=True)
class Share:
    """What callers have been given by the time a turn was booked; accounts are of a level each."""

    waiting: frozenset[tuple[int, str]]
    """Who has had requests in the queue ever since the last turn."""
    served: dict[tuple[int, str], int]
    """Tokens, of prompts and answers, that have been computed for each."""
    begun: dict[int, int]
    """How many rows of each level have been in the batch and have not ended."""


class Record:
    """The log, the ledgers, and the parts of the worker that are looked at."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.turns: list[tuple[float, tuple[str, ...]]] = []
        """When each turn began and who was aboard."""
        self.violations: list[str] = []
        self.published: list[Published] = []
        self.delivered: list[tuple[float, Message]] = []
        """Requests that reached the worker."""
        self.admitted: list[Admitted] = []
        """For each request, that of its first choice."""
        self.shares: list[Share] = []
        self.longest_row = 0
        """The most tokens that a row may come to have, prompt included."""
        self.received: dict[str, list[tuple[float, Message]]] = {}
        """What callers got, by inbox."""
        self.tokenised = 0
        self.losses = 0
        """How often a turn ended in the loss of the engine."""
        self.longest_turn_s = 0.0
        """From its begin, behind others that were under way."""
        self.most_under_way = 0
        """Turns at a time."""
        self.used_bytes = 0
        self.critical_bytes = 0
        self.engine_bytes_most = 0
        """The most that the engine said it held after a turn."""
        self.preemptions = 0
        self.is_ready = False
        self.stops_at: list[float] = []
        self.ended: str | None = None
        """How the worker ended: `ok` or the exception."""
        self.ended_at: float | None = None
        self.left_over: list[str] = []
        """Subscriptions and tasks that should be gone."""
        self.outbox_dropped = 0
        self.admission: Admission | None = None
        self.scheduler: Scheduler | None = None
        self.queue: RequestQueue | None = None
        self._live: dict[int, Admitted] = {}
        self._rows: list[Sequence] = []
        self._callers: set[str] = set()
        self._left_queue: set[tuple[int, str]] = set()
        """Whose last request in the queue has left it since the last turn."""
        self._count = 0
        self._changed = trio.Event()

    # --- writing --------------------------------------------------------------------------

    def log(self, who: str, what: str) -> None:
        self.entries.append(Entry(trio.current_time(), who, what))

    def violate(self, what: str) -> None:
        if what not in self.violations:
            self.violations.append(what)
            self.log("CHECK", what)

    def _next(self) -> int:
        self._count += 1
        return self._count

    @property
    def in_flight(self) -> int:
        return len(self._live)

    async def wait_quiet(self) -> None:
        """Return when no request is in flight, or the worker has ended."""
        while self._live and self.ended is None:
            self._changed = trio.Event()
            await self._changed.wait()

    def note_ready(self) -> None:
        self.is_ready = True
        self.log("worker", "ready")

    def note_end(self, how: str) -> None:
        self.ended = how
        self.ended_at = trio.current_time()
        self.log("worker", f"ended: {how}")
        self._changed.set()

    def digest(self) -> str:
        """A fingerprint of all that happened: who did what and when, and every byte sent."""
        trace = hashlib.sha256()
        parts: tuple[Iterable[object], ...] = (
            self.entries,
            self.turns,
            ((each.discarded, each.messages) for each in self.published),
            self.delivered,
            sorted(self.received.items()),
        )
        for part in parts:
            for each in part:
                trace.update(repr(each).encode())
        return trace.hexdigest()

    # --- watching -------------------------------------------------------------------------

    def watch_admission(self, admission: Admission) -> None:
        self.admission = admission
        hook(admission, "enter", after=self._entered_door)
        hook(admission, "leave", after=self._left_door)

    def watch_scheduler(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        hook(scheduler, "enter", after=self._entered_batch)
        hook(scheduler, "book", after=self._booked)
        hook(scheduler, "preempt", after=self._preempted)
        hook(scheduler, "abandon", after=self._batch_loop_failed)

    def watch_queue(self, queue: RequestQueue) -> None:
        self.queue = queue
        hook(queue, "add", after=self._queued)
        hook(queue, "remove", after=self._unqueued)

    def _batch_loop_failed(self) -> None:
        """No fault that a plan has in store makes the loop fail, though it would survive it."""
        fault = sys.exception()
        self.violate(f"the batch loop failed: {type(fault).__name__}: {fault}")

    def _entered_door(self, sequence: Sequence) -> None:
        for row in sequence.rows:
            self._live[id(row)] = Admitted(
                sequence=row,
                at=trio.current_time(),
                order=self._next(),
                used_bytes=self.used_bytes,
            )
            self._rows.append(row)
            self._callers.add(row.caller)
        self.admitted.append(self._live[id(sequence)])
        self._look_at_places_of(sequence.caller)
        self.log(sequence.request_id, f"admitted, level {sequence.level}, {sequence.stage}")

    def _look_at_places_of(self, caller: str) -> None:
        """A row holds one, or waits for one, until it enters the batch for the first time."""
        assert self.admission is not None
        live = [each.sequence for each in self._live.values()]
        count = sum(row.caller == caller and row.batched_at is None for row in live)
        most = self.admission.max_per_caller
        if most is not None and count > most:
            self.violate(f"places of {caller!r}: {count}, and {most} at most")

    def _unqueued(self, sequence: Sequence) -> None:
        assert self.queue is not None
        account = _account(sequence)
        if not any(_account(each) == account and each in self.queue for each in self._rows):
            self._left_queue.add(account)

    def _booked(self, _report: object) -> None:
        if self.queue is None or self.admission is None or len(self._callers) < 2:
            return
        waiting = {_account(each) for each in self._rows if each in self.queue}
        served: dict[tuple[int, str], int] = {}
        begun: dict[int, int] = {}
        for row in self._rows:
            account = _account(row)
            served[account] = served.get(account, 0) + row.computed + len(row.produced)
            self.longest_row = max(self.longest_row, len(row.prompt) + row.max_tokens)
            if row.batched_at is not None and id(row) in self._live:
                begun[row.level] = begun.get(row.level, 0) + 1
        # What pressure holds back does not compete for its share.
        is_pressed = self.admission.gauge.level is not Pressure.NORMAL
        waiting = set() if is_pressed else waiting - self._left_queue
        self._left_queue.clear()
        self.shares.append(Share(frozenset(waiting), served, begun))

    def _left_door(self, sequence: Sequence) -> None:
        for row in sequence.rows:
            admitted = self._live.pop(id(row), None)
            if admitted is None:
                self.violate(f"{row.request_id} left the door twice")
                return
            admitted.ended_at = trio.current_time()
        self._changed.set()

    def _queued(self, sequence: Sequence) -> None:
        admitted = self._live.get(id(sequence))
        if admitted is not None and admitted.queued_order is None:
            admitted.queued_order = self._next()
            self.log(sequence.request_id, "queued")

    def _entered_batch(self, sequence: Sequence) -> None:
        self.log(sequence.request_id, "entered the batch")
        if self.used_bytes >= self.critical_bytes:
            self.violate(f"{sequence.request_id} entered the batch while memory was critical")
        admitted = self._live.get(id(sequence))
        if admitted is None:
            self.violate(f"{sequence.request_id} entered the batch after its end")
        elif admitted.entered_order is None:
            admitted.entered_order = self._next()
            admitted.entered_at = trio.current_time()
            if trio.current_time() > admitted.deadline + 1e-6:
                self.violate(f"{sequence.request_id} entered the batch after its deadline")

    def _preempted(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.log(sequence.request_id, f"left the batch with {len(sequence.produced)} tokens")

    def look(self) -> None:
        """At the bounds, after every step of every task."""
        admission, scheduler, queue = self.admission, self.scheduler, self.queue
        if admission is None or scheduler is None or queue is None:
            return
        # Those that have been answered by the last turn, and whose tasks have yet to run, hold
        # nothing any more; those that gave their slot away wait beyond the places.
        held = len(scheduler.running) + len(queue) + admission.depth + admission.waiting
        for what, count, most in (
            ("places taken", admission.depth, admission.max_depth),
            ("waiting for a place", admission.waiting, admission.max_depth),
            ("running", len(scheduler.running), admission.slots),
            ("queued", len(queue), queue.max_size),
            ("held", held, queue.max_size + admission.slots + 2 * admission.max_depth),
        ):
            if count > most:
                self.violate(f"{what}: {count}, and {most} at most")
        if len(admission.in_flight) != len(self._live):
            self.violate("what is in flight is not what was admitted and has not ended")
        if admission.gauge.level is not Pressure.NORMAL:
            for each in self._live.values():
                if each.entered_order is None:
                    each.pressed = True


class Steps(trio.abc.Instrument):
    """Looks after every step. What it finds it writes down: an exception here would vanish."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self._record.look()


def _account(row: Sequence) -> tuple[int, str]:
    return (row.level, row.caller)


def hook(owner: object, name: str, *, after: Callable[..., None]) -> None:
    """Call `after` with the first argument, if any, of each call of a method that has returned."""
    method = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        after(*args[:1])
        return result

    setattr(owner, name, hooked)


@contextmanager
def watching_parts(watches: Mapping[str, Callable[[Any], None]]) -> Iterator[None]:
    """Show each part that a worker makes for itself, by its class's name, to its watcher."""
    with ExitStack() as stack:
        for name, watch in watches.items():
            made = partial(_make_watched, getattr(serving, name), watch)
            stack.enter_context(mock.patch.object(serving, name, made))
        yield


def _make_watched(
    real: Callable[..., Any], watch: Callable[[Any], None], *args: Any, **kwargs: Any
) -> Any:
    made = real(*args, **kwargs)
    watch(made)
    return made
