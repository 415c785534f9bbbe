"""What was passed on of late: how long it is kept, and how much of it."""

from __future__ import annotations

from trio_worker.flow.passed_on import (
    KEPT_S,
    PASSED_ON_BYTES_MAX,
    PASSED_ON_MAX,
    Passed,
    PassedOn,
)
from trio_worker.ports import Message
from trio_worker.protocol.turn import RequestId
from trio_worker.wire.handed_on import Hop


def passed(name: str, *, at: float = 0.0, size: int = 1) -> Passed:
    return Passed(
        message=Message(subject="inference", body=b"x" * size),
        hop=Hop(reply_to="_INBOX.a"),
        target="w2",
        request_id=RequestId(name),
        at=at,
    )


def keep(ring: PassedOn, one: Passed) -> int:
    number = ring.next_number()
    ring.keep(number, one)
    return number


def test_it_is_taken_by_its_number_once() -> None:
    ring, one = PassedOn(), passed("a")
    keep(ring, passed("b"))
    number = keep(ring, one)
    assert ring.latest == number
    assert ring.take(number) is one
    assert ring.take(number) is None
    assert len(ring) == 1


def test_what_nothing_was_said_about_is_forgotten() -> None:
    ring = PassedOn()
    old, young = keep(ring, passed("a", at=10.0)), keep(ring, passed("b", at=10.5))
    ring.forget(10.0 + KEPT_S)
    assert ring.take(old) is None
    assert ring.take(young) is not None


def test_without_a_connection_nothing_grows_old() -> None:
    ring = PassedOn()
    number = keep(ring, passed("a", at=10.0))
    ring.keep_all(20.0)
    ring.forget(20.5)
    assert ring.take(number) is not None


def test_the_oldest_make_room() -> None:
    ring = PassedOn()
    numbers = [keep(ring, passed(str(each))) for each in range(PASSED_ON_MAX + 2)]
    assert len(ring) == PASSED_ON_MAX
    assert ring.take(numbers[1]) is None
    assert ring.take(numbers[2]) is not None


def test_so_many_bytes_are_kept() -> None:
    ring, size = PassedOn(), PASSED_ON_BYTES_MAX // 2
    first, second = keep(ring, passed("a", size=size)), keep(ring, passed("b", size=size))
    assert len(ring) == 2
    third = keep(ring, passed("c", size=1))
    assert ring.take(first) is None
    assert ring.take(second) is not None
    keep(ring, passed("d", size=size))
    assert ring.take(third) is not None


def test_a_cancel_finds_the_latest_of_its_id_once() -> None:
    ring = PassedOn()
    first, latest = keep(ring, passed("a")), keep(ring, passed("a"))
    assert ring.cancel(RequestId("a"))
    assert not ring.cancel(RequestId("a"))
    assert not ring.cancel(RequestId("b"))
    one, other = ring.take(first), ring.take(latest)
    assert one is not None
    assert other is not None
    assert (one.cancelled, other.cancelled) == (False, True)
