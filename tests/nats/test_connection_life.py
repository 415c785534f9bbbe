"""The life of a connection: what follows what, and who is told."""

from __future__ import annotations

import itertools

import pytest

from trio_worker.nats.connection_life import (
    STANDING,
    TRANSITIONS,
    USELESS,
    ConnectionLife,
    Event,
    State,
)

FIRST, SECOND = PermissionError("first"), ConnectionError("second")


def after(*events: Event) -> ConnectionLife:
    life = ConnectionLife()
    for event in events:
        life.advance(event)
    return life


def test_nats_py_may_call_back_at_any_time() -> None:
    assert set(TRANSITIONS) == set(itertools.product(State, Event))


def test_every_state_can_be_reached() -> None:
    reached = {State.CONNECTING}
    while more := {TRANSITIONS[state, event] for state in reached for event in Event} - reached:
        reached |= more
    assert reached == set(State)


@pytest.mark.parametrize("state", State)
def test_leaving_is_possible_always_and_for_ever(state: State) -> None:
    assert TRANSITIONS[state, Event.LEFT] is State.CLOSED
    assert all(TRANSITIONS[State.CLOSED, event] is State.CLOSED for event in Event)


@pytest.mark.parametrize("state", [State.FAILED, State.LOST])
def test_what_has_ended_comes_back_by_nothing(state: State) -> None:
    assert {TRANSITIONS[state, event] for event in Event} == {state, State.CLOSED}


@pytest.mark.parametrize("state", State)
def test_a_connection_stands_only_when_it_was_established(state: State) -> None:
    for event in Event:
        following = TRANSITIONS[state, event]
        assert following not in STANDING or event is Event.ESTABLISHED or state in STANDING
    assert TRANSITIONS[state, Event.BROKEN] not in STANDING


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], State.CONNECTING),
        ([Event.BROKEN], State.CONNECTING),
        ([Event.DEAFENED], State.CONNECTING),
        ([Event.ESTABLISHED], State.CONNECTED),
        ([Event.REFUSED], State.FAILED),
        ([Event.ENDED], State.FAILED),
        ([Event.ESTABLISHED, Event.REFUSED], State.CONNECTED),
        ([Event.ESTABLISHED, Event.BROKEN], State.RECONNECTING),
        ([Event.ESTABLISHED, Event.BROKEN, Event.BROKEN], State.RECONNECTING),
        ([Event.ESTABLISHED, Event.BROKEN, Event.REFUSED], State.RECONNECTING),
        ([Event.ESTABLISHED, Event.BROKEN, Event.ESTABLISHED], State.CONNECTED),
        ([Event.ESTABLISHED, Event.BROKEN, Event.ENDED], State.LOST),
        ([Event.ESTABLISHED, Event.BROKEN, Event.DEAFENED], State.RETURNING_DEAF),
        ([Event.ESTABLISHED, Event.BROKEN, Event.DEAFENED, Event.BROKEN], State.RECONNECTING),
        ([Event.ESTABLISHED, Event.BROKEN, Event.DEAFENED, Event.ESTABLISHED], State.DEAF),
        ([Event.ESTABLISHED, Event.BROKEN, Event.DEAFENED, Event.ENDED], State.LOST),
        ([Event.ESTABLISHED, Event.DEAFENED], State.DEAF),
        ([Event.ESTABLISHED, Event.DEAFENED, Event.BROKEN], State.DEAF_RECONNECTING),
        ([Event.ESTABLISHED, Event.DEAFENED, Event.BROKEN, Event.ESTABLISHED], State.DEAF),
        ([Event.ESTABLISHED, Event.DEAFENED, Event.BROKEN, Event.ENDED], State.LOST),
        ([Event.ESTABLISHED, Event.ENDED], State.LOST),
    ],
)
def test_what_follows(events: list[Event], state: State) -> None:
    life = after(*events)
    assert life.state is state
    assert life.stands is (state in {State.CONNECTED, State.DEAF})
    assert (state in USELESS) is (state in {State.DEAF, State.DEAF_RECONNECTING, State.LOST})


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([Event.REFUSED], id="the first attempts"),
        pytest.param([Event.ESTABLISHED, Event.DEAFENED], id="deaf"),
        pytest.param([Event.ESTABLISHED, Event.ENDED], id="lost"),
        pytest.param([Event.ESTABLISHED, Event.BROKEN, Event.ENDED], id="lost over an outage"),
    ],
)
def test_the_first_reason_is_told_and_no_other(events: list[Event]) -> None:
    *before, last = events
    life = after(*before)
    assert life.advance(last, FIRST)
    assert life.reason is FIRST
    for event in Event:
        assert not life.advance(event, SECOND)
        assert life.reason is FIRST


def test_deafness_over_an_outage_is_told_when_something_can_still_be_said() -> None:
    life = after(Event.ESTABLISHED, Event.BROKEN)
    assert not life.advance(Event.DEAFENED, FIRST)
    assert life.advance(Event.ESTABLISHED)
    assert life.reason is FIRST


def test_an_end_over_an_outage_has_the_reason_of_the_end() -> None:
    life = after(Event.ESTABLISHED, Event.BROKEN)
    life.advance(Event.DEAFENED, FIRST)
    assert life.advance(Event.ENDED, SECOND)
    assert life.reason is SECOND


def test_the_next_server_may_permit_more() -> None:
    life = after(Event.ESTABLISHED, Event.BROKEN)
    life.advance(Event.DEAFENED, FIRST)
    life.advance(Event.BROKEN)
    assert life.reason is None
    assert not life.advance(Event.ESTABLISHED)
    assert life.reason is None


def test_what_changes_nothing_leaves_no_reason() -> None:
    life = after(Event.ESTABLISHED)
    assert not life.advance(Event.REFUSED, FIRST)
    assert life.reason is None
