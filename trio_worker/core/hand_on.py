"""Whether a request stays with the worker that it has come to, or which one it is passed to.

Rule 1: it goes to the first that has a free slot, in an order that all compute alike; one whose
prompt is short has no order, and stays where there is a slot.
Rule 2: where nobody has a slot it waits where the least is waiting.
Rule 3: whoever has passed it on is written on it. It goes to those that it has not been to, then
at most once more to one that seems to have room; who sees it for the second time keeps it if it
can. So it comes to an end: it is passed on at most twice by each, and `HOPS_MAX` times in all.
Rule 4: it is refused only by one that cannot keep it and knows of nobody else to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

HOPS_MAX = 32
"""How often a request is passed on at most, however large the fleet."""


class Reason(StrEnum):
    """Why a request is passed on."""

    NO_SLOT = "no_slot"
    """It would have had to wait here."""
    PREFIX = "prefix"
    """Another one is more likely to know how its prompt begins."""
    NO_ROOM = "no_room"
    """The queue is full, or the memory."""
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker where a request may go, as far as the one who chooses knows."""

    id: str
    slots: int
    in_flight: int
    accepting: bool
    """Whether callers should come there."""

    @property
    def load(self) -> float:
        return self.in_flight / self.slots

    def has_slot(self, rows: int) -> bool:
        """Whether a request of so many choices would not have to wait."""
        return self.accepting and self.in_flight + min(rows, self.slots) <= self.slots

    def is_better_than(self, other: Place, rows: int) -> bool:
        """Whether a request that has come to `other` gains by going here, where none has a slot."""
        if self.accepting != other.accepting:
            return self.accepting
        return (self.in_flight + rows) / self.slots < (other.in_flight + rows) / other.slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What the choice knows of a request."""

    rows: int
    rank: Mapping[str, int]
    """The place of each worker in the order, by id; where none is the right one, any order."""
    has_home: bool
    """Whether the order says where the beginning of its prompt may be known."""
    route: Sequence[str] = ()
    """Who has passed it on, from the first to the last."""


def next_hop(asking: Asking, own: Place, others: Sequence[Place], *, may_keep: bool) -> str | None:
    """The id of the worker that the request is passed to; None: it stays, or is refused, here.

    `may_keep` says that nothing speaks against taking it in here, maybe with a wait.
    """
    rows, route = asking.rows, asking.route
    has_slot_here = may_keep and own.has_slot(rows)
    if (
        len(route) >= HOPS_MAX
        or (may_keep and own.id in route)
        or (has_slot_here and not asking.has_home)
    ):
        return None
    fresh = [each for each in others if each.id not in route]
    again = [each for each in others if route.count(each.id) == 1 and each.accepting]
    target = _with_slot(asking, [own, *fresh] if has_slot_here else fresh)
    target = target or _with_slot(asking, again)
    if target is None and may_keep:
        best = _least_loaded(asking, fresh)
        target = best if best is not None and best.is_better_than(own, rows) else None
    elif target is None:
        target = _where_room_may_be(asking, fresh, again)
    return None if target is None or target is own else target.id


def _where_room_may_be(
    asking: Asking, fresh: Sequence[Place], again: Sequence[Place]
) -> Place | None:
    """Whom to ask where nobody has a slot; also those who say that they are full, but once."""
    accepting = [each for each in fresh if each.accepting]
    return _least_loaded(asking, accepting or again or fresh)


def _with_slot(asking: Asking, places: Sequence[Place]) -> Place | None:
    """The first that has a free slot; of those without an order, the least loaded."""
    free = [each for each in places if each.has_slot(asking.rows)]
    if not asking.has_home:
        return _least_loaded(asking, free)
    return min(free, key=lambda each: asking.rank[each.id], default=None)


def _least_loaded(asking: Asking, places: Sequence[Place]) -> Place | None:
    return min(
        places,
        key=lambda each: (not each.accepting, each.load, asking.rank[each.id]),
        default=None,
    )
