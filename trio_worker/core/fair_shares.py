"""What each caller has been served, and who of those that wait has been served least.

The rule is the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024), for each level by itself. A caller's counter grows by the tokens that are computed for
it: those of its prompts that came from no cache, and those of its answers. Whoever waits with the
lowest counter is next.

Rule 1: a caller is backlogged while it has requests in the queue. One that begins to wait is
lifted to the floor, the highest that the lowest counter of those who wait has ever been. So whoever
was idle, or only ran, has saved nothing up, and whoever is new starts level with the others.
Rule 2: a prompt is booked in whole when it enters the batch, so that several free slots do not all
go to one caller. What the cache had of it is given back when that is known, and what was not
computed when it leaves.

Bound: while two callers wait, their counters differ by U = s × q tokens at most, and so what they
are served from any time on by 2 × U. Here q is the longest prompt with its answer, and s how many
rows of the level have begun and not ended: `max_batch_size` at most, and on top of that those that
wait to be resumed. The paper's theorem 4.4 has the same form: its U is max(w_p × longest prompt,
w_q × tokens of a batch), both weights are 1 here, and a batch has s × q tokens at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from sortedcontainers import SortedDict, SortedSet

from trio_worker.core.sequence import QueueKey

REMEMBERED_MAX = 1024
"""Of how many callers who do not wait a level keeps the counters.

The lowest are forgotten first. Up to the floor that changes nothing, since they would be lifted to
it; more than that is lost only where more callers than this are above it.
"""


class LevelShares:
    """The counters of one level. No operation costs more than O(log n) of its callers."""

    def __init__(self) -> None:
        self.floor = 0
        """What a newcomer's counter is at least; it never falls."""
        self._served: dict[str, int] = {}
        self._first: dict[str, QueueKey] = {}
        """The earliest request of each caller that waits."""
        self._waiting: SortedDict[tuple[int, QueueKey], str] = SortedDict()
        """Who waits: served least first, and then first come."""
        self._idle: SortedSet[tuple[int, str]] = SortedSet()
        """Who does not; bound: `REMEMBERED_MAX`."""

    def __len__(self) -> int:
        """Of how many callers there is a counter."""
        return len(self._served)

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._first)

    def first_of(self, caller: str) -> QueueKey | None:
        """The caller's earliest request in the queue; None if it has none."""
        return self._first.get(caller)

    def served(self, caller: str) -> int:
        """The counter that a request of this caller's would be ranked by now."""
        served = self._served.get(caller, 0)
        return served if caller in self._first else max(served, self.floor)

    def wait(self, caller: str, first: QueueKey) -> None:
        """The caller's earliest request in the queue is this one from now on."""
        if (before := self._first.get(caller)) is not None:
            del self._waiting[self._served[caller], before]
        else:
            lifted = self.served(caller)
            if caller in self._served:
                self._idle.remove((self._served[caller], caller))
            self._served[caller] = lifted
        self._first[caller] = first
        self._waiting[self._served[caller], first] = caller
        self._raise_floor()

    def leave(self, caller: str) -> None:
        """The caller has nothing in the queue any more."""
        served = self._served[caller]
        del self._waiting[served, self._first.pop(caller)]
        self._remember(caller, served)
        self._raise_floor()

    def charge(self, caller: str, tokens: int) -> None:
        """So many tokens have been computed for the caller; a negative number is given back."""
        if (first := self._first.get(caller)) is not None:
            served = self._served[caller]
            del self._waiting[served, first]
            self._served[caller] = served + tokens
            self._waiting[served + tokens, first] = caller
            self._raise_floor()
        elif caller in self._served:
            served = self._served[caller]
            self._idle.remove((served, caller))
            self._remember(caller, served + tokens)
        elif tokens > 0:
            self._remember(caller, self.floor + tokens)

    def in_order(self) -> Iterator[str]:
        """Those who wait, the one that has been served least first."""
        return iter(self._waiting.values())

    def ahead_of(self, caller: str, first: QueueKey) -> int:
        """How many callers go before this one; `first` is its earliest where it does not wait."""
        place = (self.served(caller), self._first.get(caller, first))
        return int(self._waiting.bisect_left(place))

    def _remember(self, caller: str, served: int) -> None:
        self._served[caller] = served
        self._idle.add((served, caller))
        if len(self._idle) > REMEMBERED_MAX:
            _, forgotten = self._idle.pop(0)
            del self._served[forgotten]

    def _raise_floor(self) -> None:
        if self._waiting:
            self.floor = max(self.floor, self._waiting.peekitem(0)[0][0])


class FairShares:
    """Those of every level; who books and who ranks have the same one."""

    def __init__(self) -> None:
        self.levels: defaultdict[int, LevelShares] = defaultdict(LevelShares)

    def charge(self, level: int, caller: str, tokens: int) -> None:
        """As `LevelShares.charge`."""
        if tokens:
            self.levels[level].charge(caller, tokens)
