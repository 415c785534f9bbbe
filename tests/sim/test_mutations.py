"""Bugs planted on purpose: each is found by a named seed, scene or checkpoint.

A check that finds nothing may be a check that cannot find anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import msgspec
import pytest
import trio

from sim.checkers import violations
from sim.plan import Happening, Plan, make_plan
from sim.scenes import call, rubbish, scene
from sim.sweep import one_request, sweep, whole_run
from sim.world import simulate
from trio_worker.core import sequence as sequence_module
from trio_worker.core.admission import Admission
from trio_worker.core.fair_shares import FairShares, LevelShares
from trio_worker.core.memory import ReservationLedger
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Ending, Sequence
from trio_worker.errors import DuplicateRequest, ResourceLimitExceeded, WorkerError
from trio_worker.flow.answer import Answer
from trio_worker.flow.reception import Reception
from trio_worker.flow.reply_stream import ReplyStream
from trio_worker.flow.request_channel import PrioritySendChannel
from trio_worker.protocol.turn import Report
from trio_worker.simulated.engine import Faults, SimulatedEngine
from trio_worker.stages import control, respond
from trio_worker.worker import tasks, tree

Patch = AbstractContextManager[object]


# --- the bugs -----------------------------------------------------------------------------


class _LateReply:
    """Sends the error only after one more checkpoint."""

    def __init__(self, reply: ReplyStream) -> None:
        self._reply = reply
        self.late: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reply, name)

    def fail(self, error: WorkerError, *, retry_after_ms: int | None = None) -> None:
        self.late = lambda: self._reply.fail(error, retry_after_ms=retry_after_ms)


def terminal_message_after_an_await() -> Patch:
    async def careless(sequence: Sequence, scope: Any, reply: ReplyStream, **more: Any) -> None:
        late = _LateReply(reply)
        try:
            await respond.respond(sequence, scope, late, **more)
        finally:
            await trio.lowlevel.checkpoint()  # noqa: ASYNC102 - this is the bug
            if late.late is not None:
                late.late()

    return mock.patch.object(tasks, "respond", careless)


def scheduler_withdraw_forgotten() -> Patch:
    return mock.patch.object(Scheduler, "withdraw", return_value=None)


def queue_withdraw_forgotten() -> Patch:
    return mock.patch.object(PrioritySendChannel, "withdraw", return_value=False)


def place_leaked_on_cancel() -> Patch:
    leave = Admission.leave

    def leaking(self: Admission, sequence: Sequence) -> list[Sequence]:
        held = sequence.request_id in self._placed and sequence.ending is not None
        following = leave(self, sequence)
        if held:
            self._placed.add(sequence.request_id)
        return following

    return mock.patch.object(Admission, "leave", leaking)


def terminal_message_twice() -> Patch:
    finish = ReplyStream.finish

    def twice(self: ReplyStream, body: bytes) -> None:
        finish(self, body)
        self.ended = False
        finish(self, body)

    return mock.patch.object(ReplyStream, "finish", twice)


def message_after_the_terminal_one() -> Patch:
    finish = ReplyStream.finish

    def chatty(self: ReplyStream, body: bytes) -> None:
        finish(self, body)
        self.ended = False
        self.send(body)

    return mock.patch.object(ReplyStream, "finish", chatty)


def deadline_ignored_in_the_queue() -> Patch:
    enter = Scheduler.enter

    async def patient(sequence: Sequence, scope: Any, reply: ReplyStream, **more: Any) -> None:
        scope.deadline = float("inf")
        await respond.respond(sequence, scope, reply, **more)

    def restoring(self: Scheduler, sequence: Sequence, *, now: float) -> None:
        scope: Any = sequence.scope
        scope.deadline = sequence.arrived_at + sequence.request.timeout_s
        enter(self, sequence, now=now)

    return _both(
        mock.patch.object(tasks, "respond", patient),
        mock.patch.object(Scheduler, "enter", restoring),
    )


def aging_off_by_one_level() -> Patch:
    def off(*, enqueued_at: float, level: int, aging_s: float | None, arrival: int) -> Any:
        if aging_s is None:
            return (level, enqueued_at, arrival)
        return (0, enqueued_at + (level + (level > 0)) * aging_s, arrival)

    return mock.patch.object(sequence_module, "queue_key", off)


def duplicate_id_accepted() -> Patch:
    return _refusing_all_but(DuplicateRequest)


def admission_while_critical() -> Patch:
    return _refusing_all_but(ResourceLimitExceeded)


def _refusing_all_but(ignored: type[WorkerError]) -> Patch:
    refusal = Admission.refusal

    def lax(self: Admission, sequence: Sequence) -> WorkerError | None:
        error = refusal(self, sequence)
        return None if isinstance(error, ignored) else error

    return mock.patch.object(Admission, "refusal", lax)


def full_a_place_too_early() -> Patch:
    def early(self: Admission, places: int) -> bool:
        return self.depth + places < self.max_depth

    return mock.patch.object(Admission, "_has_room", early)


def stranger_s_503_accepted() -> Patch:
    def lax(self: control.Control, request_id: Any, _subject: str | None) -> None:
        sequence = self._door.admission.in_flight.get(request_id)
        if sequence is not None:
            sequence.end(Ending.CALLER_GONE)

    return mock.patch.object(control.Control, "_caller_gone", lax)


def residents_kept_on_finish() -> Patch:
    finish = SimulatedEngine.finish

    def forgetful(self: SimulatedEngine, turn: Any) -> Report:
        before = set(self.residents)
        report = finish(self, turn)
        finished = {each.request_id for each in report.outputs if each.finish is not None}
        return msgspec.structs.replace(report, residents=report.residents | (finished & before))

    return mock.patch.object(SimulatedEngine, "finish", forgetful)


def keep_alive_numbers_reused() -> Patch:
    keep_alive = Answer.keep_alive

    def reusing(self: Any) -> None:
        before = self.reply.sequence
        keep_alive(self)
        self.reply.sequence = before

    return mock.patch.object(Answer, "keep_alive", reusing)


def drain_forgets_the_waiting() -> Patch:
    return mock.patch.object(tree, "_end_without_a_token")


def preempted_loses_its_tokens() -> Patch:
    preempt = Scheduler.preempt

    def losing(self: Scheduler, sequence: Sequence) -> None:
        preempt(self, sequence)
        sequence.produced.clear()

    return mock.patch.object(Scheduler, "preempt", losing)


def resumed_loses_its_tokens() -> Patch:
    lost = Scheduler.lost

    def losing(self: Scheduler, *, blameless: bool) -> Any:
        for each in self.running.values():
            del each.produced[-1:]
        return lost(self, blameless=blameless)

    return mock.patch.object(Scheduler, "lost", losing)


def outputs_of_earlier_turns_taken() -> Patch:
    return mock.patch.object(Scheduler, "_is_coming", return_value=False)


def reservation_never_released() -> Patch:
    return mock.patch.object(ReservationLedger, "release", return_value=None)


def refusal_names_a_control_subject() -> Patch:
    init = ReplyStream.__init__

    def naming(self: ReplyStream, outlet: Any, **more: Any) -> None:
        init(self, outlet, **{**more, "control_subject": f"inference.w1.ctl.{more['request_id']}"})

    return mock.patch.object(ReplyStream, "__init__", naming)


def rubbish_is_not_answered() -> Patch:
    refuse = Reception.refuse

    def silent(self: Any, arrival: Any, error: Any, *rest: Any) -> None:
        if error.number != 400:
            refuse(self, arrival, error, *rest)

    return mock.patch.object(Reception, "refuse", silent)


def shares_not_booked() -> Patch:
    return mock.patch.object(FairShares, "charge", return_value=None)


def floods_go_first() -> Patch:
    def newest(self: LevelShares) -> Iterator[str]:
        return iter(reversed(list(self._waiting.values())))

    return mock.patch.object(LevelShares, "in_order", newest)


def another_callers_requests_out_of_order() -> Patch:
    first = RequestQueue.first

    def last_of_its_caller(self: RequestQueue, **more: Any) -> Sequence | None:
        head = first(self, **more)
        if head is None:
            return None
        return list(self._levels[head.level]._of_caller(head.caller))[-1]

    return mock.patch.object(RequestQueue, "first", last_of_its_caller)


def callers_not_bounded() -> Patch:
    return mock.patch.object(Admission, "_no_places", return_value=None)


def places_of_a_caller_leaked() -> Patch:
    return mock.patch.object(Admission, "_claim_less", return_value=None)


def nothing_planted() -> Patch:
    return nullcontext()


@contextmanager
def _both(*patches: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


# --- where they show ----------------------------------------------------------------------

ONE_SLOT = "worker.continuous_batching.max_batch_size=1"

CROWDED = scene(
    ONE_SLOT,
    calls=(
        call(0.01, "running", max_tokens=30),
        call(0.02, "cancelled", cancel="control", cancel_after_s=0.1),
        call(0.02, "late", timeout_ms=100),
        call(0.03, "twice", copies=2),
        call(0.04, "stranger", cancel="stranger", cancel_after_s=0.1, max_tokens=20),
        rubbish(0.05),
        call(0.06, "last"),
    ),
)
"""One slot; the others are cancelled, time out, or come twice while they wait for it."""

CANCELLED = scene(
    calls=(
        call(0.01, "victim", max_tokens=50, cancel="broadcast", cancel_after_s=0.2),
        call(0.01, "other", max_tokens=20),
    ),
)
"""One of two running requests is cancelled."""

FILLED = scene(
    ONE_SLOT,
    "worker.request_queue.max_depth=2",
    calls=(
        call(0.01, "running", max_tokens=30),
        call(0.10, "first"),
        call(0.10, "second"),
    ),
)
"""As many requests wait as there are places."""

BACK_AT_ONCE = scene(
    ONE_SLOT,
    "worker.engine.lead_ms=1000",
    calls=(
        call(0.01, "low", priority=2, max_tokens=60),
        call(0.15, "urgent", priority=0, max_tokens=20, cancel="control", cancel_after_s=0.035),
    ),
)
"""One is preempted and comes back while turns are under way that were begun with it aboard."""

SILENT = scene(
    ONE_SLOT,
    calls=(
        call(0.01, "long", max_tokens=700, timeout_ms=60_000),
        call(0.02, "patient", stream=True, timeout_ms=60_000),
    ),
)
"""A streaming caller waits for fourteen seconds."""

PREEMPTED = scene(
    ONE_SLOT,
    calls=(
        call(0.01, "low", priority=2, max_tokens=30),
        call(0.20, "high", priority=0),
    ),
)
"""An urgent request takes the slot of a less urgent one."""

LOST = scene(
    calls=(call(0.01, "first", max_tokens=30), call(0.01, "second", max_tokens=30, stream=True)),
    happenings=(Happening(at=0.3, what="crash"),),
)
"""The engine ends once, with two requests aboard."""

STOPPED = scene(
    ONE_SLOT,
    calls=(call(0.01, "running", max_tokens=60), call(0.02, "waiting", max_tokens=60)),
    happenings=(Happening(at=0.2, what="stop"),),
)
"""A stop while one request runs and one waits."""

CRITICAL = scene(
    "worker.resource_limits.check_interval_ms=100",
    calls=(call(0.01, "before"), call(0.5, "during"), call(1.5, "after")),
    happenings=(
        Happening(at=0.3, what="memory", value=10_300),
        Happening(at=1.0, what="memory", value=100),
    ),
)
"""Memory is critical from 0.3 s to 1.0 s."""

AGED = scene(
    ONE_SLOT,
    "worker.request_queue.priority_levels=2",
    "worker.request_queue.aging_ms=1000",
    "worker.continuous_batching.preempt=false",
    calls=(
        call(0.01, "running", max_tokens=100, priority=0),
        call(0.10, "low", priority=1),
        call(1.50, "late", priority=0),
    ),
    levels=2,
    aging_s=1.0,
)
"""A request of the lower level has waited for longer than one level is worth."""


TWO_CALLERS = scene(
    ONE_SLOT,
    calls=tuple(
        call(at + number / 1000, f"{caller}{number}", max_tokens=10, caller=caller)
        for at, caller in ((0.01, "ada"), (0.03, "bob"))
        for number in range(15)
    ),
)
"""Two callers send many requests each, one before the other."""

BOUNDED = scene(
    ONE_SLOT,
    "worker.request_queue.max_per_caller=1",
    calls=(
        call(0.01, "running", max_tokens=20, caller="ada"),
        call(0.10, "waiting", caller="ada"),
        call(0.11, "refused", caller="ada"),
        call(0.12, "another", caller="bob"),
        call(1.00, "later", caller="ada"),
    ),
)
"""One caller is at its bound for a while."""


@dataclass(frozen=True)
class Found:
    bug: Callable[[], Patch]
    by: Plan
    says: str
    """Part of what is then said."""


FOUND = (
    Found(scheduler_withdraw_forgotten, CANCELLED, "at stage ended of victim"),
    Found(queue_withdraw_forgotten, CROWDED, "at stage ended"),
    Found(place_leaked_on_cancel, CROWDED, "places: 1"),
    Found(terminal_message_twice, CANCELLED, "2 terminal messages"),
    Found(message_after_the_terminal_one, CANCELLED, "messages after the terminal one"),
    Found(deadline_ignored_in_the_queue, CROWDED, "after its deadline"),
    Found(aging_off_by_one_level, AGED, "the bound is 1 s"),
    Found(duplicate_id_accepted, CROWDED, "not what was admitted"),
    Found(admission_while_critical, CRITICAL, "was admitted at 10300 MB"),
    Found(full_a_place_too_early, FILLED, "QUEUE_FULL"),
    Found(stranger_s_503_accepted, CROWDED, "CANCELLED"),
    Found(residents_kept_on_finish, CANCELLED, "the engine holds"),
    Found(keep_alive_numbers_reused, SILENT, "was sent the numbers"),
    Found(drain_forgets_the_waiting, STOPPED, "went on to wait"),
    Found(preempted_loses_its_tokens, PREEMPTED, "was told"),
    Found(resumed_loses_its_tokens, LOST, "was told"),
    Found(outputs_of_earlier_turns_taken, BACK_AT_ONCE, "was told"),
    Found(reservation_never_released, PREEMPTED, "holds a reservation already"),
    Found(refusal_names_a_control_subject, CROWDED, "admitted"),
    Found(rubbish_is_not_answered, CROWDED, "were answered"),
    Found(shares_not_booked, TWO_CALLERS, "'ada' and 'bob' of level"),
    Found(floods_go_first, TWO_CALLERS, "'ada' and 'bob' of level"),
    Found(another_callers_requests_out_of_order, TWO_CALLERS, "entered the batch before"),
    Found(callers_not_bounded, BOUNDED, "places of 'ada': 2, and 1 at most"),
    Found(places_of_a_caller_leaked, BOUNDED, "QUEUE_FULL"),
    Found(
        nothing_planted,
        replace(CANCELLED, faults=Faults(wrong_token=0.2), seed=7),
        "was told",
    ),
    Found(
        nothing_planted,
        replace(CANCELLED, faults=Faults(duplicate_output=0.2), seed=7),
        "was told",
    ),
)


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.bug.__name__)
def test_a_planted_bug_is_found_and_without_it_there_is_nothing_to_find(found: Found) -> None:
    with found.bug():
        said = "\n".join(violations(found.by, simulate(found.by)))
    assert found.says in said
    healthy = replace(found.by, faults=Faults())
    assert not violations(healthy, simulate(healthy))


SEEDS_THAT_FIND = {
    terminal_message_twice: range(3),
    queue_withdraw_forgotten: range(12),
    place_leaked_on_cancel: range(12),
    duplicate_id_accepted: range(12),
    deadline_ignored_in_the_queue: range(12),
    scheduler_withdraw_forgotten: range(12),
}
"""The commoner bugs need no scene of their own."""


@pytest.mark.parametrize("bug", SEEDS_THAT_FIND, ids=lambda bug: bug.__name__)
def test_a_common_bug_is_found_by_the_first_seeds(bug: Callable[[], Patch]) -> None:
    with bug():
        for seed in SEEDS_THAT_FIND[bug]:
            plan = make_plan(seed)
            if violations(plan, simulate(plan)):
                return
    pytest.fail("no seed finds it")


@pytest.mark.parametrize("pick", [one_request(0), whole_run], ids=["one request", "whole run"])
def test_a_terminal_message_after_an_await_is_found_by_cancelling_everywhere(pick: Any) -> None:
    """Nothing but a cancel of the whole run shows it: a request's own scope has ended by then."""
    plan = replace(CANCELLED, disturbed=True)
    with terminal_message_after_an_await():
        found = [k for k, wrong in sweep(plan, pick, stride=3) if wrong]
    assert bool(found) is (pick is whole_run)
