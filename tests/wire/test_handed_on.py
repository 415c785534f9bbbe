"""What one worker says to another of a request that it passes on."""

from __future__ import annotations

import pytest

from trio_worker.protocol.turn import RequestId
from trio_worker.wire.handed_on import Hop, read_hop, with_hop

FORWARDED = "inference.w1.fwd.17"


@pytest.mark.parametrize(
    "hop",
    [
        Hop(reply_to="_INBOX.a", route=("w1",)),
        Hop(reply_to="_INBOX.a", route=("w1", "w2", "w1"), caller="shop"),
        Hop(
            reply_to="_INBOX.a",
            route=("w1",),
            request_id=RequestId("r1"),
            sequence=3,
            left_ms=12_345,
        ),
        Hop(reply_to=None, route=("w1",)),
    ],
)
def test_it_comes_over_as_it_was(hop: Hop) -> None:
    assert read_hop(FORWARDED, with_hop({}, hop)) == hop


def test_the_callers_own_headers_come_along_but_not_what_only_workers_say() -> None:
    headers = {"Trace": "t", "Caller": "forged", "Route": "w9", "Sequence": "7", "Left-Ms": "1"}
    passed = with_hop(headers, Hop(reply_to="_INBOX.a", route=("w1",)))
    assert passed == {"Trace": "t", "Route": "w1", "Reply-To": "_INBOX.a"}


@pytest.mark.parametrize(
    ("reply", "headers"),
    [
        (None, {"Route": "w1"}),
        ("_INBOX.a", {"Route": "w1", "Reply-To": "_INBOX.b"}),
        (FORWARDED, {}),
        (FORWARDED, {"Reply-To": "_INBOX.b"}),
        ("inference.w1.ctl.17", {"Route": "w1"}),
        ("inference.w1.fwd.x", {"Route": "w1"}),
        ("inference.w1.fwd.17.more", {"Route": "w1"}),
        ("_INBOX.inference.w1.fwd.17", {"Route": "w1"}),
    ],
)
def test_what_a_caller_sends_is_not_passed_on_by_a_worker(
    reply: str | None, headers: dict[str, str]
) -> None:
    assert read_hop(reply, headers) is None


def test_what_makes_no_sense_is_passed_over() -> None:
    headers = {"Route": ",w1,,", "Request-Id": "a b", "Sequence": "-1", "Left-Ms": "9" * 12}
    assert read_hop(FORWARDED, headers) == Hop(reply_to=None, route=("w1",))
