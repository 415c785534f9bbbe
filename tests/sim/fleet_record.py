"""What happened in a run of a fleet, as it was seen from outside of the code that did it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import trio

from trio_worker.core.admission import Admission
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Sequence
from trio_worker.ports import Message

from .record import Entry, hook, watching_parts


@dataclass(slots=True, eq=False, kw_only=True)
class Span:
    """From when to when something was so; still is, while `ended` is None."""

    request_id: str
    worker: str
    began: float
    life: int = 0
    """Which run of which member; for what ran."""
    ended: float | None = None

    def overlaps(self, other: Span) -> bool:
        later, earlier = max(self, other, key=_began), min(self, other, key=_began)
        return earlier.ended is None or earlier.ended > later.began + 1e-9


def _began(span: Span) -> float:
    return span.began


@dataclass(slots=True, eq=False)
class Cut:
    """From when to when a member could not be heard."""

    worker: str
    why: str
    """`kill`, `disconnect`, `freeze` or `split`."""
    began: float
    ended: float = math.inf


class Stretches:
    """When something was so, as it is told after each step."""

    def __init__(self) -> None:
        self._past: list[tuple[float, float]] = []
        self._since: float | None = None

    def note(self, now: float, *, is_so: bool) -> None:
        if is_so and self._since is None:
            self._since = now
        elif not is_so and self._since is not None:
            self._past.append((self._since, now))
            self._since = None

    def cover(self, first: float, last: float) -> bool:
        """Whether it was so all that time."""
        now = [] if self._since is None else [(self._since, math.inf)]
        return any(began <= first and ended >= last for began, ended in (*self._past, *now))


@dataclass(slots=True, eq=False)
class Life:
    """One run of a member, from its start to its end."""

    worker: str
    started_at: float
    ready_at: float | None = None
    ended_at: float | None = None
    killed: bool = False
    how: str | None = None
    admission: Admission | None = None
    room: Stretches = field(default_factory=Stretches)
    """While it had room for one more."""
    door_open: Stretches = field(default_factory=Stretches)
    """While it was in the queue group."""
    running: dict[str, Span] = field(default_factory=dict)
    admitted: dict[str, Span] = field(default_factory=dict)


current_life: ContextVar[Life] = ContextVar("current_life")
"""Whose parts are being made."""


class FleetRecord:
    """The log and the ledgers of all members."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.violations: list[str] = []
        self.lives: list[Life] = []
        self.running: list[Span] = []
        """In a batch."""
        self.admitted: list[Span] = []
        self.published: list[tuple[float, Message]] = []
        """Everything that the message system routed that is about requests and jobs."""
        self.received: dict[str, list[tuple[float, Message]]] = {}
        """What callers got, by inbox."""
        self.cuts: list[Cut] = []
        self.results: dict[str, list[Message]] = {}
        """What the stream of results holds in the end, by job."""
        self.dead: list[Message] = []
        self.jobs_left = 0
        """Messages that the stream of jobs holds in the end."""
        self.left_over: list[str] = []

    def log(self, who: str, what: str) -> None:
        self.entries.append(Entry(trio.current_time(), who, what))

    def violate(self, what: str) -> None:
        if what not in self.violations:
            self.violations.append(what)
            self.log("CHECK", what)

    @property
    def in_flight(self) -> int:
        return sum(len(life.admitted) for life in self.lives)

    def begin_life(self, worker: str) -> Life:
        life = Life(worker, trio.current_time())
        self.lives.append(life)
        self.log(worker, "starts")
        return life

    def end_life(self, life: Life, how: str) -> None:
        now = trio.current_time()
        life.ended_at, life.how = now, how
        for span in (*life.running.values(), *life.admitted.values()):
            span.ended = now
        life.running.clear()
        life.admitted.clear()
        self.log(life.worker, f"ended: {how}")

    # --- watching -------------------------------------------------------------------------

    def watching(self) -> AbstractContextManager[None]:
        """Let each life know its parts as they are made."""
        return watching_parts(
            {"Admission": self._watch_admission, "Scheduler": self._watch_scheduler}
        )

    def _watch_admission(self, admission: Admission) -> None:
        life = current_life.get()
        life.admission = admission
        hook(admission, "enter", after=partial(self._entered, life))
        hook(admission, "leave", after=partial(self._left, life))

    def _watch_scheduler(self, scheduler: Scheduler) -> None:
        life = current_life.get()
        hook(scheduler, "enter", after=partial(self._runs, life))
        hook(scheduler, "_forget", after=partial(self._rests, life))
        hook(scheduler, "abandon", after=partial(self._rest_all, life))

    def _entered(self, life: Life, sequence: Sequence) -> None:
        request_id, now = sequence.request_id, trio.current_time()
        span = Span(request_id=request_id, worker=life.worker, began=now)
        life.admitted[request_id] = span
        self.admitted.append(span)
        self.log(request_id, f"admitted by {life.worker}")

    def _left(self, life: Life, sequence: Sequence) -> None:
        span = life.admitted.pop(sequence.request_id)
        span.ended = trio.current_time()

    def _runs(self, life: Life, sequence: Sequence) -> None:
        request_id = sequence.request_id
        span = Span(
            request_id=request_id,
            worker=life.worker,
            began=trio.current_time(),
            life=self.lives.index(life),
        )
        life.running[request_id] = span
        self.running.append(span)
        self.log(request_id, f"runs on {life.worker}")

    def _rests(self, life: Life, sequence: Sequence) -> None:
        life.running.pop(sequence.request_id).ended = trio.current_time()

    def _rest_all(self, life: Life) -> None:
        self.violate(f"the batch loop of {life.worker} failed")
        for span in life.running.values():
            span.ended = trio.current_time()
        life.running.clear()

    def was_cut(self, worker: str, first: float, last: float) -> bool:
        """Whether a member could not be heard, or was dead, at some time between."""
        return any(
            each.worker == worker and each.began <= last and each.ended >= first
            for each in self.cuts
        )

    def takes_messages(self, worker: str, at: float) -> bool:
        """Whether the server has somebody to give a message for this member; a frozen one is."""
        lives = any(
            life.worker == worker
            and life.ready_at is not None
            and life.ready_at <= at
            and (life.ended_at is None or at < life.ended_at)
            for life in self.lives
        )
        return lives and not any(
            each.worker == worker and each.why != "freeze" and each.began <= at < each.ended
            for each in self.cuts
        )


class Rooms(trio.abc.Instrument):
    """Keeps, after every step of every task, since when who has room."""

    def __init__(self, record: FleetRecord) -> None:
        self._record = record

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        for life in self._record.lives:
            admission = life.admission
            if admission is None or life.ended_at is not None:
                continue
            now, is_there = trio.current_time(), life.ready_at is not None
            is_open = is_there and admission.engine_ready and not admission.draining
            life.room.note(now, is_so=is_open and not admission.is_full)
            life.door_open.note(now, is_so=is_open and admission._accepting)
