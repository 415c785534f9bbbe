"""Frames, cut out of a stream of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.protocol.framing import MAX_FRAME_BYTES, FrameBuffer, FrameError, framed


@given(st.lists(st.binary(max_size=300)), st.data())
def test_frames_come_out_whole_however_the_bytes_are_cut(
    bodies: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(framed(body) for body in bodies)
    buffer, got = FrameBuffer(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        buffer.feed(stream[:cut])
        stream = stream[cut:]
        while (body := buffer.take()) is not None:
            got.append(body)
    assert got == bodies
    assert buffer.take() is None


def test_a_length_beyond_the_limit_is_refused_before_the_bytes_arrive() -> None:
    buffer = FrameBuffer()
    buffer.feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(FrameError, match="limit"):
        buffer.take()


def test_the_limit_is_the_same_on_both_sides_and_may_be_another() -> None:
    frame = framed(b"seven b", most_bytes=7)
    buffer = FrameBuffer(most_bytes=7)
    buffer.feed(frame)
    assert buffer.take() == b"seven b"
    with pytest.raises(FrameError, match="8 bytes is over 7"):
        framed(b"eight by", most_bytes=7)
    buffer.feed(framed(b"eight by"))
    with pytest.raises(FrameError, match="8 bytes; the limit is 7"):
        buffer.take()
