"""Which workers there are: what is remembered, for how long, and how much of it."""

from __future__ import annotations

from support.factories import make_beat

from trio_worker.core.hand_on import Place
from trio_worker.flow.live_set import WORKERS_MAX, LiveSet


def live_set() -> LiveSet:
    return LiveSet(own_id="w1", model="tiny", forget_after_s=3)


def ids(live: LiveSet, now: float) -> list[str]:
    return sorted(each.id for each in live.places(now))


def test_who_is_silent_for_too_long_is_forgotten() -> None:
    live = live_set()
    assert live.heard(make_beat("w2"), 10.0)
    assert live.heard(make_beat("w3"), 11.0)
    assert not live.heard(make_beat("w2"), 12.0)
    assert ids(live, 14.0) == ["w2", "w3"]
    assert ids(live, 14.1) == ["w2"]
    assert live.has_others(15.0)
    assert not live.has_others(15.1)
    assert live.heard(make_beat("w2"), 16.0), "it is new again"


def test_ones_own_beat_is_passed_over() -> None:
    live = live_set()
    assert not live.heard(make_beat("w1"), 0.0)
    assert not live.has_others(0.0)


def test_a_place_is_what_the_last_beat_says() -> None:
    live = live_set()
    live.heard(make_beat("w2"), 0.0)
    live.heard(make_beat("w2", slots=4, in_flight=3, queued=1, accepting=False), 1.0)
    assert live.places(1.0) == [Place(id="w2", slots=4, in_flight=3, accepting=False)]


def test_what_was_sent_counts_until_the_next_beat() -> None:
    live = live_set()
    live.heard(make_beat("w2", in_flight=1), 0.0)
    live.sent("w2", 2)
    live.sent("w2", 1)
    live.sent("nobody", 1)
    assert [each.in_flight for each in live.places(0.1)] == [4]
    live.heard(make_beat("w2", in_flight=3), 0.2)
    assert [each.in_flight for each in live.places(0.3)] == [3]


def test_one_that_leaves_or_serves_another_model_is_known_and_no_place() -> None:
    live = live_set()
    live.heard(make_beat("w2", leaving=True), 0.0)
    live.heard(make_beat("w3", model="other"), 0.5)
    assert live.places(1.0) == []
    assert live.has_others(1.0)
    assert [(beat.id, age) for beat, age in live.others(1.0)] == [("w2", 1.0), ("w3", 0.5)]


def test_one_that_nobody_listens_for_is_gone_until_it_is_heard_of() -> None:
    live = live_set()
    live.heard(make_beat("w2"), 0.0)
    live.gone("w2")
    live.gone("w2")
    assert ids(live, 0.0) == []
    assert live.heard(make_beat("w2"), 0.1)
    assert ids(live, 0.1) == ["w2"]


def test_so_many_are_remembered() -> None:
    live = live_set()
    for number in range(WORKERS_MAX + 1):
        live.heard(make_beat(f"x{number}"), 0.001 * number)
    found = ids(live, 1.1)
    assert len(found) == WORKERS_MAX
    assert "x0" not in found


def test_one_that_comes_back_after_its_goodbye_knows_nobody_yet() -> None:
    live = live_set()
    assert live.heard(make_beat("w2"), 0.0)
    assert not live.heard(make_beat("w2", leaving=True), 1.0)
    assert live.heard(make_beat("w2"), 2.0)
    assert not live.heard(make_beat("w2"), 2.1)
