"""How much pressure memory is under, step by step, and what may still be promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.core.memory import (
    DegradationStep,
    MemoryReading,
    Pressure,
    PressureGauge,
    ReservationLedger,
)
from trio_worker.protocol.turn import RequestId


def reading(used: int) -> MemoryReading:
    """Of a machine with memory enough."""
    return MemoryReading(used=used, available=10**9, total=10**9)


def read(gauge: PressureGauge, used: int, *, available: int = 500, total: int = 1000) -> None:
    gauge.read(MemoryReading(used=used, available=available, total=total))


def state(gauge: PressureGauge) -> tuple[str, int, int, int, int]:
    """Level, how many steps, memory used, memory available, readings to be acted upon."""
    steps = [step for step in DegradationStep if step in gauge.steps]
    assert steps == list(DegradationStep)[: len(steps)], "they begin in their order"
    return gauge.level.value, len(steps), gauge.used, gauge.available, gauge.readings


def test_the_words_for_pressure_and_its_steps() -> None:
    assert [each.value for each in Pressure] == ["normal", "soft", "critical"]
    assert [each.value for each in DegradationStep] == [
        *("trim_caches", "hold_low", "shrink_batch", "cap_tokens")
    ]


def test_a_day_of_readings() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    story = [state(gauge)]
    for used in (99, 100, 95, 94, 99, 125, 149, 150, 145, 144, 175, 199, 200, 100, 99, 0):
        read(gauge, used, available=1000 - used)
        story.append(state(gauge))
    assert story == [
        ("normal", 0, 0, 0, 0),
        ("normal", 0, 99, 901, 1),
        ("soft", 1, 100, 900, 2),
        ("soft", 1, 95, 905, 3),
        ("normal", 0, 94, 906, 4),
        ("normal", 0, 99, 901, 5),
        ("soft", 2, 125, 875, 6),
        ("soft", 2, 149, 851, 7),
        ("soft", 3, 150, 850, 8),
        ("soft", 3, 145, 855, 9),
        ("soft", 2, 144, 856, 10),
        ("soft", 4, 175, 825, 11),
        ("soft", 4, 199, 801, 12),
        ("critical", 4, 200, 800, 13),
        ("critical", 1, 100, 900, 14),
        ("normal", 1, 99, 901, 15),
        ("normal", 0, 0, 1000, 16),
    ]


def test_what_the_engine_counts_is_acted_upon_only_over_the_limit() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    read(gauge, 120)
    story = []
    for counted in (110, 199, 200, 130, 0):
        gauge.read_engine(counted)
        story.append(state(gauge))
    assert story == [
        ("soft", 1, 120, 500, 1),
        ("soft", 4, 199, 500, 1),
        ("critical", 4, 200, 500, 2),
        ("critical", 2, 130, 500, 2),
        ("critical", 2, 120, 500, 2),
    ]


def test_a_machine_without_memory_is_critical_until_it_has_twice_as_much() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    story = []
    for available in (20, 19, 20, 39, 40, 39, 20):
        read(gauge, 10, available=available)
        story.append((gauge.level.value, len(gauge.steps)))
    assert story == [
        *(("normal", 0), ("critical", 4), ("critical", 4), ("critical", 4)),
        *(("normal", 0), ("normal", 0), ("normal", 0)),
    ]


def test_nothing_used_is_no_pressure_even_without_a_soft_limit() -> None:
    gauge = PressureGauge(soft_bytes=0, critical_bytes=100)
    read(gauge, 0)
    assert gauge.steps == frozenset()
    read(gauge, 1)
    assert gauge.steps == {DegradationStep.TRIM_CACHES}


# --- promises -----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 2000), max_size=6),
    st.integers(0, 3000),
    st.integers(0, 20_000),
    st.integers(0, 900),
)
def test_what_fits_is_what_all_rows_as_long_as_the_longest_leave_room_for(
    promises: list[int], need: int, used: int, cached_tokens: int
) -> None:
    ledger = ReservationLedger(limit_bytes=15_000)
    ledger.bytes_per_token = 2
    for number, promise in enumerate(promises):
        ledger.reserve(RequestId(str(number)), promise)
    ledger.reconcile(used=used, cached_tokens=cached_tokens)
    beside = max(0, used - 2 * cached_tokens)
    rows = [*promises, need]
    assert ledger.reserved_bytes == len(promises) * max([0, *promises])
    assert ledger.fits(need) is (beside + len(rows) * max(rows) <= 15_000)
    assert ledger.room_ever() == 15_000 - beside
    for number in range(len(promises)):
        others = [*promises[:number], *promises[number + 1 :], need]
        fits = beside + len(others) * max(others) <= 15_000
        assert ledger.fits(need, instead_of=RequestId(str(number))) is fits


def test_who_leaves_makes_room_and_who_is_not_here_does_not() -> None:
    ledger = ReservationLedger(limit_bytes=900)
    assert [ledger.fits(need) for need in (900, 901)] == [True, False]
    ledger.reserve(RequestId("long"), 300)
    ledger.reserve(RequestId("short"), 100)
    assert [ledger.fits(need) for need in (300, 301)] == [True, False], "three rows"
    for leaving, most in (("long", 450), ("short", 450), ("nobody", 300)):
        fits = [ledger.fits(need, instead_of=RequestId(leaving)) for need in (most, most + 1)]
        assert fits == [True, False], leaving
    assert ledger.reserved_bytes == 600, "asking changes nothing"
    with pytest.raises(AssertionError, match="long holds a reservation already"):
        ledger.reserve(RequestId("long"), 1)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "expected"),
    [(0, 0, 0), (1, 0, 768), (100, 156, 768), (100, 157, 1536), (512, 512, 3072)],
)
def test_a_need_is_counted_in_whole_granules(prompt: int, max_tokens: int, expected: int) -> None:
    ledger = ReservationLedger(limit_bytes=1)
    assert ledger.need(prompt=prompt, max_tokens=max_tokens) == 0, "before the model is known"
    ledger.bytes_per_token = 3
    assert ledger.need(prompt=prompt, max_tokens=max_tokens) == expected


def test_what_could_ever_fit_goes_by_the_best_that_was_seen_of_this_engine() -> None:
    ledger = ReservationLedger(limit_bytes=1000)
    rooms = [ledger.room_ever()]
    for used in (300, 500, 200, 900):
        ledger.reconcile(used=used, cached_tokens=0)
        rooms.append(ledger.room_ever())
    assert rooms == [1000, 700, 700, 800, 800]
    ledger.engine_restarted()
    assert ledger.room_ever() == 1000
    ledger.reconcile(used=900, cached_tokens=0)
    assert [ledger.fits_ever(need) for need in (99, 100, 101)] == [True, True, False]
    assert not ledger.fits(101)
    assert ledger.fits(100)


def test_pressure_rises_at_a_limit_and_falls_only_clearly_below_it() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    levels = []
    for used in [50, 100, 96, 94, 200, 150, 101, 99, 100, 96]:
        gauge.read(reading(used))
        levels.append(gauge.level.value)
    assert levels == (
        ["normal", "soft", "soft", "normal"] + ["critical"] * 3 + ["normal", "soft", "soft"]
    ), "critical is left only below the soft limit"


def test_the_steps_of_degradation_begin_and_end_in_their_order() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    seen: list[list[str]] = []
    for used in [*range(90, 210, 2), *range(210, 90, -2)]:
        gauge.read(reading(used))
        steps = [step.value for step in DegradationStep if step in gauge.steps]
        if not seen or seen[-1] != steps:
            seen.append(steps)
    order = [each.value for each in DegradationStep]
    counts = [*range(len(order)), *range(len(order), -1, -1)]
    assert seen == [order[:count] for count in counts]


def test_a_step_does_not_flap_around_its_beginning() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    for used in (126, 124, 126, 121):
        gauge.read(reading(used))
        assert DegradationStep.HOLD_LOW in gauge.steps
    gauge.read(reading(119))
    assert DegradationStep.HOLD_LOW not in gauge.steps


def test_what_the_engine_counts_is_pressure_too_and_so_is_a_machine_without_memory() -> None:
    gauge = PressureGauge(soft_bytes=100, critical_bytes=200)
    gauge.read_engine(250)
    assert gauge.level is Pressure.CRITICAL
    gauge.read_engine(10)
    assert gauge.level.value == "normal"
    gauge.read(MemoryReading(used=10, available=19, total=1000))
    assert gauge.level is Pressure.CRITICAL
    gauge.read(MemoryReading(used=10, available=39, total=1000))
    assert gauge.level is Pressure.CRITICAL
    gauge.read(MemoryReading(used=10, available=40, total=1000))
    assert gauge.level.value == "normal"


def test_the_ledger_promises_what_is_left_beside_everything_else() -> None:
    ledger = ReservationLedger(limit_bytes=5000)
    assert ledger.need(prompt=50, max_tokens=100) == 0, "nothing is known before the model is"
    ledger.bytes_per_token = 2
    small, large = (ledger.need(prompt=1, max_tokens=size) for size in (100, 256))
    assert (small, large) == (512, 1024), "in granules of 256 tokens"
    ledger.reconcile(used=2000, cached_tokens=0)
    ledger.reserve(RequestId("a"), small)
    ledger.reserve(RequestId("b"), large)
    assert ledger.reserved_bytes == 2048, "all rows are as long as the longest"
    assert not ledger.fits(large)
    assert ledger.fits(large, instead_of=RequestId("a"))
    assert ledger.fits(4096) is False
    ledger.reconcile(used=2100, cached_tokens=100)
    assert ledger.fits(small) is (1900 + 3 * 1024 <= 5000)
    ledger.release(RequestId("b"))
    ledger.release(RequestId("b"))
    assert ledger.reserved_bytes == 512
    ledger.reconcile(used=4900, cached_tokens=0)
    assert not ledger.fits(small)
    assert ledger.room_ever() == 3100
    assert ledger.fits_ever(3100)
    assert not ledger.fits_ever(3101)
