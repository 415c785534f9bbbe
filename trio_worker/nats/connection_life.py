"""The life of a connection to NATS: its states, and what leads from one to the next.

Rule 1: `ConnectionLife.state` changes in `advance` and nowhere else, along `TRANSITIONS`.
Rule 2: the table is total: nats-py calls back when it likes, also after the end.
Rule 3: who has been told why a connection is of no use is told no other reason later.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a connection is."""

    CONNECTING = "connecting"
    """Its first attempts are under way."""
    FAILED = "failed"
    """They have been given up: another one would end as the last."""
    CONNECTED = "connected"
    """It stands, and the server knows our subscriptions."""
    RECONNECTING = "reconnecting"
    RETURNING_DEAF = "returning deaf"
    """As reconnecting; the server that is being greeted refuses a subscription of ours."""
    DEAF = "deaf"
    """It stands, but without a subscription that it had: whoever waits for the end is told."""
    DEAF_RECONNECTING = "deaf, reconnecting"
    LOST = "lost"
    """It has ended for good, and whoever waits for that is told."""
    CLOSED = "closed"
    """We are leaving, or have left."""


class Event(StrEnum):
    """What leads from one state to another."""

    ESTABLISHED = "established"
    REFUSED = "refused"
    """For a reason that does not go away by itself, such as wrong credentials."""
    BROKEN = "broken"
    """The line; nats-py tries to get another one."""
    DEAFENED = "deafened"
    """The server does not let us receive any longer what it let us receive."""
    ENDED = "ended"
    """nats-py has given up."""
    LEFT = "left"


STANDING = frozenset({State.CONNECTED, State.DEAF})
"""What is published now leaves."""
USELESS = frozenset({State.DEAF, State.DEAF_RECONNECTING, State.LOST})
"""Whoever waits for the end of the connection has been told why."""
_TOLD = USELESS | {State.FAILED}

TRANSITIONS: dict[tuple[State, Event], State] = {
    # What is not said below changes nothing.
    **{(state, event): state for state in State for event in Event},
    (State.CONNECTING, Event.ESTABLISHED): State.CONNECTED,
    (State.CONNECTING, Event.REFUSED): State.FAILED,
    (State.CONNECTING, Event.ENDED): State.FAILED,
    (State.CONNECTED, Event.BROKEN): State.RECONNECTING,
    (State.CONNECTED, Event.DEAFENED): State.DEAF,
    (State.RECONNECTING, Event.ESTABLISHED): State.CONNECTED,
    (State.RECONNECTING, Event.DEAFENED): State.RETURNING_DEAF,
    # The next server may permit more.
    (State.RETURNING_DEAF, Event.BROKEN): State.RECONNECTING,
    # Told when it stands: then what is still to be said can be said.
    (State.RETURNING_DEAF, Event.ESTABLISHED): State.DEAF,
    (State.DEAF, Event.BROKEN): State.DEAF_RECONNECTING,
    (State.DEAF_RECONNECTING, Event.ESTABLISHED): State.DEAF,
    **{
        (state, Event.ENDED): State.LOST
        for state in State
        if state not in {State.CONNECTING, State.FAILED, State.CLOSED}
    },
    **{(state, Event.LEFT): State.CLOSED for state in State},
}


@dataclass(slots=True)
class ConnectionLife:
    """One connection. Its state, and why it is of no use if it is not."""

    state: State = State.CONNECTING
    reason: Exception | None = None

    @property
    def stands(self) -> bool:
        return self.state in STANDING

    def advance(self, event: Event, reason: Exception | None = None) -> bool:
        """Go to the next state; returns whether it is one that somebody has to be told of.

        `reason` goes with the events that make a connection useless.
        """
        before = self.state
        self.state = TRANSITIONS[before, event]
        if self.state is before or before in _TOLD:
            return False
        if event is not Event.ESTABLISHED:
            self.reason = reason
        return self.state in _TOLD
