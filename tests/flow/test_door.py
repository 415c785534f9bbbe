"""The door: what it decides is core's; that everybody hears of it at once is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from support.factories import Scope, make_admission, make_sequence
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from trio_worker.core.memory import MB, MemoryReading, PressureGauge
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Ending, Event, Stage
from trio_worker.errors import QueueFull, WorkerDraining
from trio_worker.flow.door import Door
from trio_worker.protocol.turn import RequestId


def make_door(*, max_depth: int = 1, reject: bool = False, ready: bool = True) -> Door:
    door = Door(
        make_admission(
            max_depth=max_depth,
            reject_when_full=reject,
            slots=1,
            gauge=PressureGauge(soft_bytes=100 * MB, critical_bytes=200 * MB),
            queue=RequestQueue(max_size=10),
        )
    )
    if ready:
        door.set_engine_ready(ready=True)
    return door


def use_memory(door: Door, mb: int) -> None:
    door.admission.gauge.read(MemoryReading(used=mb * MB, available=10**12, total=10**12))


def test_the_state_follows_whatever_decides_about_it_at_once() -> None:
    door = make_door(max_depth=4, ready=False)
    first = make_sequence("a")
    story: list[tuple[str, str]] = [("new", door.state.value)]

    def happens(what: str, change: Callable[[], object]) -> None:
        before = door.changed
        change()
        assert before.is_set(), what
        assert not door.changed.is_set(), "a new event for the next change"
        story.append((what, door.state.value))

    happens("ready", lambda: door.set_engine_ready(ready=True))
    happens("lost", lambda: door.set_engine_ready(ready=False))
    happens("back", lambda: door.set_engine_ready(ready=True))
    use_memory(door, 300)
    happens("critical", door.pressure_changed)
    use_memory(door, 50)
    happens("normal", door.pressure_changed)
    happens("one in", lambda: door.admit(first))
    for name in ("b", "c"):
        happens("more in", lambda name=name: door.admit(make_sequence(name)))  # type: ignore[misc]
    happens("in the batch", lambda: door.batched(first))
    happens("gone", lambda: door.leave(door.admission.in_flight[RequestId("b")]))
    happens("gone", lambda: door.leave(first))
    happens("closed", door.close)
    happens("lost", lambda: door.set_engine_ready(ready=False))
    assert story == [
        ("new", "paused"),
        ("ready", "open"),
        ("lost", "paused"),
        ("back", "open"),
        ("critical", "paused"),
        ("normal", "open"),
        ("one in", "open"),
        ("more in", "open"),
        ("more in", "paused"),
        ("in the batch", "paused"),
        ("gone", "open"),
        ("gone", "open"),
        ("closed", "closed"),
        ("lost", "closed"),
    ]


def test_who_is_refused_leaves_no_trace() -> None:
    door = make_door(reject=True)
    door.admit(make_sequence("a"))
    with pytest.raises(QueueFull):
        door.admit(make_sequence("b"))
    door.close()
    with pytest.raises(WorkerDraining):
        door.admit(make_sequence("c"))
    assert list(door.admission.in_flight) == ["a"]
    assert door._places == {}


async def test_who_waits_for_a_place_goes_on_when_it_has_one(autojump_clock: MockClock) -> None:
    door = make_door()
    holder, urgent, patient = (
        make_sequence(name, level=level) for name, level in (("h", 1), ("u", 0), ("p", 2))
    )
    for sequence in (holder, urgent):
        door.admit(sequence)
    door.leave(urgent)
    door.admit(patient)
    assert list(door._places) == ["p"], "who holds a place waits for none, who left neither"
    with assert_checkpoints():
        await door.wait_place(holder)
    placed: list[str] = []

    async def wait() -> None:
        await door.wait_place(patient)
        placed.append(patient.request_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert placed == []
        door.batched(holder)
    assert placed == ["p"]
    assert patient.stage is Stage.TOKENISING
    assert door._places == {}
    await door.wait_place(patient)


async def test_a_request_that_ends_gives_its_place_to_the_next(autojump_clock: MockClock) -> None:
    door = make_door()
    holder, waiting = make_sequence("h"), make_sequence("w")
    door.admit(holder)
    door.admit(waiting)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.wait_place, waiting)
        await wait_all_tasks_blocked()
        door.leave(holder)
    assert door.admission.depth == 1


def test_only_a_request_in_flight_can_be_ended_and_only_once() -> None:
    door = make_door(max_depth=4)
    sequence, over = make_sequence("a"), make_sequence("over")
    door.admit(sequence)
    door.admit(over)
    over.advance(Event.END)
    assert door.end(RequestId("nobody"), Ending.CANCELLED) is False
    assert door.end(RequestId("over"), Ending.CANCELLED) is False
    assert door.end(RequestId("a"), Ending.BACKLOG) is True
    assert (sequence.ending, over.ending) == (Ending.BACKLOG, None)
    assert isinstance(sequence.scope, Scope)
    assert sequence.scope.reasons == ["backlog"]
