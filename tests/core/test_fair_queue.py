"""Who is served when several callers wait: against a model, and by the bounds that are stated."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace
from support.factories import make_report, make_sequence

from trio_worker.core import fair_shares
from trio_worker.core.fair_shares import FairShares, LevelShares
from trio_worker.core.memory import ReservationLedger
from trio_worker.core.prefill import PrefillBudget
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.core.sequence import Event, Sequence, Stage
from trio_worker.protocol.turn import FinishReason, Prefill

LEVELS = 3
SIZE = 40
CALLERS = (None, "ada", "bob", "cy")
times = st.floats(0, 100, allow_nan=False)
levels = st.integers(0, LEVELS - 1)
callers = st.sampled_from(CALLERS)


class FairQueueMachine(RuleBasedStateMachine):
    """The queue against a list that is looked through, and counters that are never forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = FairShares()
        self.queue = RequestQueue(max_size=SIZE, shares=self.shares)
        self.model: list[Sequence] = []
        self.served: Counter[tuple[int, str]] = Counter()
        self.floors: Counter[int] = Counter()
        self.names = itertools.count()

    @precondition(lambda self: len(self.model) < SIZE)
    @rule(level=levels, at=times, caller=callers, is_begun=st.sampled_from((False, False, True)))
    def add(self, level: int, at: float, caller: str | None, is_begun: bool) -> None:  # noqa: FBT001 - drawn by name
        sequence = make_sequence(f"r{next(self.names)}", level=level, at=at, caller=caller)
        if is_begun:
            sequence.batched_at = at
        if not self._line(level, sequence.caller):
            account = (level, sequence.caller)
            self.served[account] = max(self.served[account], self.floors[level])
        self.queue.add(sequence)
        self.model.append(sequence)
        self._raise_floor(level)

    @rule(level=levels, caller=callers, tokens=st.integers(-5, 50))
    def charge(self, level: int, caller: str | None, tokens: int) -> None:
        account = (level, caller or "")
        tokens = max(tokens, -self.served[account])
        self.shares.charge(level, caller or "", tokens)
        if not tokens:
            return
        if account not in self.served:
            self.served[account] = self.floors[level]
        self.served[account] += tokens
        self._raise_floor(level)

    @precondition(lambda self: self.model)
    @rule()
    def take_the_first(self) -> None:
        expected = self._first()
        assert self.queue.take() is expected
        assert expected is not None
        self._gone(expected)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.model))
        assert self.queue.remove(sequence)
        self._gone(sequence)

    def _gone(self, sequence: Sequence) -> None:
        self.model.remove(sequence)
        self._raise_floor(sequence.level)

    @rule(level=levels, after=times)
    def look_past_the_latest_of_a_level(self, level: int, after: float) -> None:
        expected = self._first(hold_level=level, held_after=after)
        assert self.queue.first(hold_level=level, held_after=after) is expected

    def _line(self, level: int, caller: str) -> list[Sequence]:
        mine = [each for each in self.model if (each.level, each.caller) == (level, caller)]
        return sorted(mine, key=lambda each: each.key)

    def _raise_floor(self, level: int) -> None:
        waiting = [self.served[level, each.caller] for each in self.model if each.level == level]
        self.floors[level] = max(self.floors[level], min(waiting, default=0))

    def _first(self, hold_level: int = -1, held_after: float = 0.0) -> Sequence | None:
        there = [
            each for each in self.model if each.level != hold_level or each.arrived_at <= held_after
        ]
        if not there:
            return None
        level = min(there, key=lambda each: each.key).level
        there = [each for each in there if each.level == level]
        waiting = {each.caller for each in self.model if each.level == level}
        if len(waiting) == 1:
            return min(there, key=lambda each: each.key)
        begun = [each for each in there if each.batched_at is not None]
        if begun:
            return min(begun, key=lambda each: each.key)

        def rank(each: Sequence) -> tuple[object, ...]:
            first = self._line(level, each.caller)[0]
            return (self.served[level, each.caller], first.key, each.key)

        return min(there, key=rank)

    @invariant()
    def they_agree(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.first() is self._first()
        assert all(each in self.queue for each in self.model)
        assert self.queue.by_level() == Counter(each.level for each in self.model)
        assert self.queue.callers() == len({each.caller for each in self.model})
        for (level, caller), served in self.served.items():
            waits = bool(self._line(level, caller))
            expected = served if waits else max(served, self.floors[level])
            assert self.shares.levels[level].served(caller) == expected


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


# --- the bounds -----------------------------------------------------------------------------

LONGEST = 30
"""Tokens of the longest prompt with its answer."""


@dataclass
class Shop:
    """A queue, a scheduler, and an engine that does as it is told; each turn fills the batch."""

    slots: int = 3
    chunk: int = 8
    """Prompt tokens that a row computes in a turn."""
    shares: FairShares = field(default_factory=FairShares)
    served: Counter[str] = field(default_factory=Counter)
    """What has been computed for each caller, counted by the engine."""
    entered: list[str] = field(default_factory=list)
    most_begun: int = 0

    def __post_init__(self) -> None:
        ledger = ReservationLedger(limit_bytes=10**9)
        ledger.bytes_per_token = 1
        budget = PrefillBudget(chunk_max=64, gap_target_s=0.2)
        self.queue = RequestQueue(max_size=5000, shares=self.shares)
        self.scheduler = Scheduler(
            slots=self.slots, prefill=budget, ledger=ledger, shares=self.shares
        )
        self.names = itertools.count()
        self.now = 0.0
        self.cached: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.rows: dict[str, Sequence] = {}
        self.all_rows: list[Sequence] = []

    def ask(
        self, caller: str, *, prompt: int = 2, answer: int = 10, cached: int = 0, level: int = 1
    ) -> Sequence:
        self.now += 0.001
        row = make_sequence(
            f"{caller}{next(self.names)}",
            level=level,
            at=self.now,
            caller=caller,
            stage=Stage.QUEUED,
        )
        row.prompt, row.max_tokens = tuple(range(prompt)), answer
        self.cached[row.request_id] = cached
        self.all_rows.append(row)
        self.queue.add(row)
        return row

    def fill(self) -> None:
        while self.scheduler.free_slots and (head := self.queue.first()) is not None:
            self.queue.take(head)
            self.scheduler.enter(head, now=self.now)
            self.entered.append(head.caller)
        assert not (self.queue and self.scheduler.free_slots), "one waits while a slot is free"
        self.all_rows = [each for each in self.all_rows if each.stage is not Stage.ENDED]
        begun = sum(each.batched_at is not None for each in self.all_rows)
        self.most_begun = max(self.most_begun, begun)

    def preempt(self) -> None:
        if self.scheduler.running:
            row = next(iter(self.scheduler.running.values()))
            self.scheduler.preempt(row)
            self.queue.add(row)

    def withdraw(self) -> None:
        if self.scheduler.running:
            self._end(next(iter(self.scheduler.running.values())))

    def _end(self, row: Sequence) -> None:
        self.scheduler.withdraw(row)
        row.advance(Event.END)

    def turn(self) -> None:
        self.fill()
        work = self.scheduler.plan()
        for gone in work.remove:
            self.rows.pop(gone, None)
        for admit in work.admit:
            self.rows[admit.request_id] = self.scheduler.running[admit.request_id]
            cached = self.cached[admit.request_id]
            self.done[admit.request_id] = cached
        progress, outputs = [], []
        for name, row in list(self.rows.items()):
            if self.done[name] < len(row.prompt) + len(row.produced):
                progress.append(self._prefill(name, row))
                continue
            self.served[row.caller] += 1
            self.done[name] += 1
            is_last = len(row.produced) + 1 == row.max_tokens
            outputs.append((name, FinishReason.LENGTH if is_last else None))
            if is_last:
                del self.rows[name]
        report = replace(make_report(outputs, residents=set(self.rows)), prefills=tuple(progress))
        for sequence, output, _ in self.scheduler.book(report, now=self.now):
            if getattr(output, "finish", None) is not None:
                sequence.advance(Event.END)

    def _prefill(self, name: str, row: Sequence) -> Prefill:
        total = len(row.prompt) + len(row.produced)
        before, after = self.done[name], min(total, self.done[name] + self.chunk)
        self.done[name] = after
        # What a row that was preempted computes again is on nobody's account.
        fresh = min(after, len(row.prompt)) - max(before, row.computed + self.cached[name])
        self.served[row.caller] += max(0, fresh)
        return Prefill(request_id=row.request_id, done=after, total=total, cached=self.cached[name])

    def waiting(self) -> set[str]:
        return {each.caller for each in self.all_rows if each in self.queue}


requests = st.tuples(
    st.sampled_from("abc"), st.integers(1, 20), st.integers(1, 10), st.integers(0, 19)
)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    chunk=st.integers(1, 20),
    steps=st.lists(
        st.tuples(
            st.lists(requests, max_size=6), st.sampled_from(("", "", "", "preempt", "withdraw"))
        ),
        min_size=5,
        max_size=60,
    ),
)
def test_what_two_callers_who_wait_are_served_differs_by_the_bound(
    slots: int, chunk: int, steps: list[tuple[list[tuple[str, int, int, int]], str]]
) -> None:
    """Counters by U, what is served from any time on by 2 × U, and all of it is booked."""
    shop = Shop(slots=slots, chunk=chunk)
    level = shop.shares.levels[1]
    since: dict[tuple[str, str], list[int]] = defaultdict(list)
    """For two who wait, by how much one was ahead at each time since both do."""
    for asked, event in steps:
        for caller, prompt, answer, cached in asked:
            shop.ask(caller, prompt=prompt, answer=answer, cached=min(cached, prompt - 1))
        {"": lambda: None, "preempt": shop.preempt, "withdraw": shop.withdraw}[event]()
        shop.turn()
        bound = shop.most_begun * LONGEST
        waiting = shop.waiting()
        for pair in itertools.combinations("abc", 2):
            if not waiting.issuperset(pair):
                since.pop(pair, None)
                continue
            one, other = pair
            assert abs(level.served(one) - level.served(other)) <= bound
            since[pair].append(shop.served[one] - shop.served[other])
            assert max(since[pair]) - min(since[pair]) <= 2 * bound


def test_floods_of_two_callers_share_the_slots_from_the_first_look_on() -> None:
    shop = Shop(slots=4)
    for caller in ("a", "b"):
        for _ in range(50):
            shop.ask(caller)
    shop.fill()
    assert sorted(shop.entered) == ["a", "a", "b", "b"]
    for _ in range(100):
        shop.turn()
        assert abs(shop.served["a"] - shop.served["b"]) <= 4 * 12
    assert shop.served["a"] > 150


def test_who_sends_longer_requests_is_served_fewer_of_them() -> None:
    shop = Shop(slots=2)
    for _ in range(200):
        shop.ask("short", prompt=2, answer=3)
        shop.ask("long", prompt=10, answer=20)
    for _ in range(400):
        shop.turn()
    assert abs(shop.served["short"] - shop.served["long"]) <= 2 * LONGEST
    assert shop.entered.count("short") > 4 * shop.entered.count("long")


def test_one_request_beside_the_flood_of_another_waits_for_about_one() -> None:
    shop = Shop(slots=1)
    for _ in range(1000):
        shop.ask("flood")
    for _ in range(200):
        shop.turn()
    before = len(shop.entered)
    shop.ask("guest")
    for _ in range(50):
        shop.turn()
    assert shop.entered[before:].index("guest") <= 1


def test_having_been_idle_saves_nothing_up() -> None:
    shop = Shop(slots=1)
    shop.ask("guest")
    for _ in range(500):
        shop.ask("busy")
    for _ in range(1000):
        shop.turn()
    begun = len(shop.entered)
    for _ in range(30):
        shop.ask("guest")
    for _ in range(200):
        shop.turn()
    counts = Counter(shop.entered[begun:])
    assert abs(counts["guest"] - counts["busy"]) <= 2


def test_what_the_cache_had_costs_nothing() -> None:
    shop = Shop(slots=1)
    for _ in range(100):
        shop.ask("cached", prompt=20, answer=5, cached=19)
        shop.ask("plain", prompt=1, answer=5)
    for _ in range(300):
        shop.turn()
    counts = Counter(shop.entered)
    assert abs(counts["cached"] - counts["plain"]) <= 2


def test_every_choice_of_a_request_is_booked() -> None:
    shop = Shop(slots=2)
    request = make_sequence("r", choices=2, caller="a", stage=Stage.QUEUED)
    for row in request.rows:
        row.max_tokens = 5
        shop.cached[row.request_id] = 0
        shop.all_rows.append(row)
        shop.queue.add(row)
    for _ in range(20):
        shop.turn()
    assert shop.shares.levels[1].served("a") == shop.served["a"] == 2 * (3 + 5)


def test_whoever_gave_its_slot_away_comes_back_before_others_begin() -> None:
    shop = Shop(slots=1)
    first = shop.ask("busy", prompt=20, answer=10)
    shop.turn()
    for _ in range(3):
        shop.ask("guest")
    shop.preempt()
    assert shop.shares.levels[1].served("guest") < shop.shares.levels[1].served("busy")
    assert shop.queue.first() is first


def test_what_is_computed_again_is_booked_once() -> None:
    shop = Shop(slots=1, chunk=4)
    row = shop.ask("a", prompt=10, answer=5)
    shop.turn()
    shop.preempt()
    assert shop.shares.levels[1].served("a") == row.computed == 4
    for _ in range(6):
        shop.turn()
    shop.preempt()
    for _ in range(12):
        shop.turn()
    assert row.stage is Stage.ENDED
    assert shop.shares.levels[1].served("a") == 15


def test_a_prompt_that_is_not_computed_is_given_back() -> None:
    shop = Shop(slots=1, chunk=4)
    shop.ask("a", prompt=20)
    shop.fill()
    assert shop.shares.levels[1].served("a") == 20
    shop.turn()
    shop.withdraw()
    assert shop.shares.levels[1].served("a") == 4
    shop.ask("b", prompt=20, cached=15)
    shop.fill()
    assert shop.shares.levels[1].served("b") == 20
    shop.turn()
    assert shop.shares.levels[1].served("b") == 5


def test_levels_have_shares_of_their_own() -> None:
    shop = Shop(slots=1)
    for _ in range(100):
        shop.ask("batch", level=2)
    for _ in range(500):
        shop.turn()
    shop.ask("batch", level=0)
    shop.ask("guest", level=0)
    first = shop.queue.first()
    assert first is not None
    assert first.caller == "batch"


@given(
    st.lists(st.tuples(times, levels, callers, st.integers(0, 40)), min_size=2, max_size=30),
    st.floats(0.1, 10),
)
def test_a_level_is_passed_over_only_for_one_with_an_earlier_request(
    arrivals: list[tuple[float, int, str | None, int]], aging_s: float
) -> None:
    """The bound of levels: while another is served, it has a request that came in time.

    That is (levels - 1) × aging after one of the least urgent level at most.
    """
    shares = FairShares()
    queue = RequestQueue(max_size=len(arrivals), shares=shares)
    waiting = []
    for number, (at, level, caller, served) in enumerate(arrivals):
        sequence = make_sequence(str(number), level=level, at=at, aging_s=aging_s, caller=caller)
        shares.charge(level, caller or "", served)
        queue.add(sequence)
        waiting.append(sequence)
    while waiting:
        taken = queue.take()
        others = [each for each in waiting if each.level == taken.level]
        for each in waiting:
            if each.level != taken.level:
                earliest = min(one.arrived_at for one in others)
                assert earliest <= each.arrived_at + (each.level - taken.level) * aging_s + 1e-9
        waiting.remove(taken)


# --- what an arrival may expect ------------------------------------------------------------


def test_the_flood_of_another_does_not_stand_before_a_newcomer() -> None:
    queue = RequestQueue(max_size=100)
    for number in range(50):
        queue.add(make_sequence(f"f{number}", caller="flood", at=number))
    guest = make_sequence("g", caller="guest", at=60)
    assert queue.ahead_of(guest) == 1
    assert queue.ahead_of(make_sequence("f", caller="flood", at=60)) == 50
    queue.add(make_sequence("high", level=0, at=30))
    # It may be served on the claim of the flood's first, before the one that is more urgent.
    assert queue.ahead_of(guest) == 1
    queue.add(make_sequence("old", level=0, at=-20, caller="old"))
    assert queue.ahead_of(guest) == 2
    assert queue.ahead_of(make_sequence("low", level=2, at=60, caller="guest")) == 52


def test_callers_who_went_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_shares, "REMEMBERED_MAX", 3)
    shares = LevelShares()
    for number in range(10):
        shares.charge(f"c{number}", 10 + number)
    assert len(shares) == 3
    assert [shares.served(f"c{number}") for number in range(6, 10)] == [0, 17, 18, 19]
    shares.wait("c9", (0, 0.0, 0))
    assert shares.served("c0") == shares.floor == 19
    shares.leave("c9")
    # Whom the floor has passed is forgotten before those above it, and loses nothing by it.
    shares.charge("c8", 100)
    shares.charge("new", 5)
    assert (shares.served("c7"), shares.served("c8"), shares.served("new")) == (19, 118, 24)
