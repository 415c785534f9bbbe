"""Beats: what is read, and what is taken for none."""

from __future__ import annotations

import msgspec
import pytest

from trio_worker.wire import beats
from trio_worker.wire.beats import Beat

BEAT = Beat(
    id="w1",
    model="m",
    slots=8,
    in_flight=3,
    queued=1,
    accepting=True,
    version="1.2.3",
)


def test_a_beat_comes_back_as_it_was() -> None:
    assert beats.decode("worker.w1.beat", beats.encode(BEAT)) == BEAT
    leaving = msgspec.structs.replace(BEAT, leaving=True)
    assert beats.decode("worker.w1.beat", beats.encode(leaving)) == leaving


def test_a_later_version_may_say_more() -> None:
    body = msgspec.json.encode({**msgspec.to_builtins(BEAT), "speed": 1.5})
    assert beats.decode("worker.w1.beat", body) == BEAT


def test_it_is_small() -> None:
    assert len(beats.encode(BEAT)) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 5000,
        b"{}",
        beats.encode(msgspec.structs.replace(BEAT, id="w2")),
        beats.encode(msgspec.structs.replace(BEAT, slots=0)),
        beats.encode(msgspec.structs.replace(BEAT, in_flight=-1)),
        beats.encode(BEAT).replace(b'"slots":8', b'"slots":"8"'),
    ],
)
def test_what_is_no_beat_of_this_worker_is_none(body: bytes) -> None:
    assert beats.decode("worker.w1.beat", body) is None
