"""The life of one request inside the worker: its stage, its tokens, its times.

A request of several choices has a sequence, a row of the batch, for each of them. All are of one
task and one scope: they are admitted together, and leave together when the last has ended.

Rule 1: `Sequence.stage` changes in `advance` and nowhere else, along `TRANSITIONS`.
Rule 2: the queue's key is fixed when the request is admitted and never changes.
Rule 3: what ends one sequence of a request before its answer is complete ends all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

from trio_worker.core.request import Request
from trio_worker.protocol.prompt import FREE, Form
from trio_worker.protocol.turn import Output, RequestId, Sampling, SequenceFailure

QueueKey: TypeAlias = tuple[float, float, int]


class Stage(StrEnum):
    """Where a request is, in the order of the pipeline."""

    WAITING = "waiting"
    """For a place; only with `reject_when_full: false`."""
    TOKENISING = "tokenising"
    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    RESUMING = "resuming"
    """The engine was lost with the request aboard; it returns to the batch."""
    ENDED = "ended"


class Event(StrEnum):
    """What moves a request from one stage to the next."""

    PLACED = "placed"
    TOKENISED = "tokenised"
    BATCHED = "batched"
    DECODED = "decoded"
    ENGINE_LOST = "engine lost"
    PREEMPTED = "preempted"
    END = "end"


TRANSITIONS: dict[tuple[Stage, Event], Stage] = {
    (Stage.WAITING, Event.PLACED): Stage.TOKENISING,
    (Stage.TOKENISING, Event.TOKENISED): Stage.QUEUED,
    (Stage.QUEUED, Event.BATCHED): Stage.PREFILL,
    (Stage.PREFILL, Event.DECODED): Stage.DECODE,
    (Stage.DECODE, Event.DECODED): Stage.DECODE,
    (Stage.PREFILL, Event.ENGINE_LOST): Stage.RESUMING,
    (Stage.DECODE, Event.ENGINE_LOST): Stage.RESUMING,
    (Stage.RESUMING, Event.ENGINE_LOST): Stage.RESUMING,
    (Stage.RESUMING, Event.BATCHED): Stage.PREFILL,
    (Stage.PREFILL, Event.PREEMPTED): Stage.QUEUED,
    (Stage.DECODE, Event.PREEMPTED): Stage.QUEUED,
    (Stage.RESUMING, Event.PREEMPTED): Stage.QUEUED,
    **{(stage, Event.END): Stage.ENDED for stage in Stage if stage is not Stage.ENDED},
}

RUNNING = frozenset({Stage.PREFILL, Stage.DECODE, Stage.RESUMING})


class Ending(StrEnum):
    """Why a request was ended by something other than its own answer or deadline."""

    CANCELLED = "cancelled"
    CALLER_GONE = "caller gone"
    BACKLOG = "backlog"
    """Too much of its answer could not be published."""
    DRAINING = "draining"
    FAULT = "fault"
    """A fault of the batch loop, with this request aboard."""
    TOO_LARGE = "too large"
    """Its cache would not fit even if it ran alone, as was learnt while it waited."""


class Cancellable(Protocol):
    """A cancel scope, as far as this module knows."""

    def cancel(self, reason: str | None = None) -> None: ...


class OutputSink(Protocol):
    """Where a request's tokens go: its answer, as far as this module knows."""

    def take(self, output: Output | SequenceFailure, /) -> None:
        """Never waits, and never raises."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One choice of a request in flight.

    Owned by the request's own task; the scheduler writes tokens and stages.
    """

    request: Request
    choice: int = 0
    """Which of the request's it is; that of the first stands for the request."""
    leader: Sequence | None = None
    """That of the first choice; None for itself."""
    siblings: tuple[Sequence, ...] = ()
    """Those of the other choices, where this is the first."""
    request_id: RequestId = field(init=False)
    """The request's; of a further choice one that no caller can send, with a dot in it."""
    sampling: Sampling = field(init=False)
    reply_subject: str
    arrival: int
    """Counts sequences; breaks ties between equal keys."""
    arrived_at: float
    """On the monotonic clock, in seconds, as every `_at` below."""
    scope: Cancellable
    """Cancelling it ends the request at whatever stage it is."""
    key: QueueKey
    """The earliest key is served first."""
    stage: Stage = Stage.TOKENISING
    ending: Ending | None = None
    subject: str = ""
    """Where the request came in."""
    is_opened: bool = False
    """Its caller has heard of it already, from another worker that has passed it on."""
    elsewhere: Callable[[], bool] | None = None
    """Has another worker take the request over, while it has no token; False where none will."""

    prompt: tuple[int, ...] = ()
    form: Form = FREE
    max_tokens: int = 0
    produced: list[int] = field(default_factory=list)
    outputs: OutputSink | None = None
    handed_out: int = 0
    """How many of `produced` have been taken by `outputs`."""
    concluded: bool = False
    """The last of its outputs, or its failure, has been taken by `outputs`."""
    prefilled: int = 0
    """Prompt tokens computed so far in the present prefill."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache."""
    computed: int = 0
    """Prompt tokens computed for it, each counted once however often it was."""
    booked: int = 0
    """Prompt tokens that its caller's share has been charged with for it."""

    queued_at: float | None = None
    batched_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    left_at: float | None = None
    """When its task ended; its slot is free a turn later."""

    degraded: list[str] = field(default_factory=list)
    """The steps of degradation that changed its answer."""
    preempted: int = 0
    """How often a more urgent request took its slot."""
    resumed: int = 0
    """How often the engine was lost while this request was aboard."""
    crashes: int = 0
    """How many engine crashes in a row it was aboard of; it is a suspect from the second on."""
    faults: int = 0
    """How many faults of the batch loop it was aboard of."""

    def __post_init__(self) -> None:
        request_id = self.request.request_id
        self.request_id = RequestId(f"{request_id}.{self.choice}") if self.choice else request_id
        self.sampling = self.request.sampling_of(self.choice)

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """All sequences of the request, in the order of its choices."""
        first = self.leader or self
        return (first, *first.siblings)

    @property
    def level(self) -> int:
        return self.request.priority

    @property
    def caller(self) -> str:
        """Whose share of its level it is served from; all requests without a caller have one."""
        return self.request.caller or ""

    @property
    def is_batchable(self) -> bool:
        """Whether it waits for the batch or is in it, and has not come to its end."""
        is_there = self.stage is Stage.QUEUED or self.stage in RUNNING
        return is_there and not self.concluded and self.ending is None

    @property
    def is_whole(self) -> bool:
        """Whether its caller gets every token that it has: then it may go on from there."""
        return self.handed_out == len(self.produced)

    def advance(self, event: Event) -> None:
        """Go to the next stage. An event that does not fit the stage is a programmer's error."""
        following = TRANSITIONS.get((self.stage, event))
        assert following is not None, f"{event} at stage {self.stage} of {self.request_id}"
        self.stage = following

    def end(self, ending: Ending) -> None:
        """Ask the request's task to end it; the first reason given is the one that counts."""
        if self.ending is None and self.stage is not Stage.ENDED:
            for row in self.rows:
                row.ending = ending
            self.scope.cancel(reason=ending)


def sequences_of(
    request: Request,
    *,
    reply_subject: str,
    subject: str,
    arrivals: Iterator[int],
    arrived_at: float,
    aging_s: float | None,
    scope: Cancellable,
) -> Sequence:
    """The sequence of a request's first choice, with those of the others at its side.

    Their keys follow each other.
    """

    def sequence(choice: int, leader: Sequence | None) -> Sequence:
        arrival = next(arrivals)
        return Sequence(
            request=request,
            choice=choice,
            leader=leader,
            subject=subject,
            reply_subject=reply_subject,
            arrival=arrival,
            arrived_at=arrived_at,
            scope=scope,
            key=queue_key(
                enqueued_at=arrived_at, level=request.priority, aging_s=aging_s, arrival=arrival
            ),
        )

    first = sequence(0, None)
    first.siblings = tuple(sequence(choice, first) for choice in range(1, request.choices))
    return first


def queue_key(*, enqueued_at: float, level: int, aging_s: float | None, arrival: int) -> QueueKey:
    """The static key: with aging, waiting `aging_s` is worth one level; without, levels are strict.

    Both times grow alike for every waiting request, so their order never changes while they wait
    and nothing has to be sorted again. With aging, a request of the lowest of n levels has a later
    key only than requests that arrive within (n - 1) × aging_s after it.
    """
    if aging_s is None:
        return (level, enqueued_at, arrival)
    return (0, enqueued_at + level * aging_s, arrival)
