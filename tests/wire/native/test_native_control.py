"""The control subjects: who is to end, and what came of it."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native


@given(st.binary(max_size=100))
def test_any_bytes_on_the_cancel_subject_are_survived(body: bytes) -> None:
    native.cancelled_id(body)


def test_a_cancel_names_its_request_or_nobody() -> None:
    assert native.cancelled_id(b'{"request_id": "r", "why": "bored"}') == "r"
    for body in (b"", b"cancel", b"{}", b"[]", b'{"request_id": 5}', b"\xff", b"[" * 100_000):
        assert native.cancelled_id(body) is None


def test_a_cancel_is_answered_with_what_came_of_it() -> None:
    for cancelled in (True, False):
        reply = native.cancel_reply(RequestId("r"), cancelled=cancelled)
        assert msgspec.json.decode(reply) == {"request_id": "r", "cancelled": cancelled}
