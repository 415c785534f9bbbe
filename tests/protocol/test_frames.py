"""The frames between the worker and its engine."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.protocol.frames import (
    MAX_FRAME_BYTES,
    FrameBuffer,
    FrameError,
    Hello,
    Loaded,
    Tokenise,
    Turn,
    decode_from_engine,
    decode_to_engine,
    encode,
)

FRAMES = (
    Hello(
        model="m",
        model_name=None,
        max_batch_size=8,
        prewarm=True,
        prewarm_prompt="Hello",
        prewarm_max_tokens=1,
        prefix_cache_bytes=0,
    ),
    Turn(admit=(), remove=("a", "b"), prefill_tokens=7),
    Tokenise(prompt=None, messages=(("user", "h\u00e9\U0001f600"),)),
    Tokenise(prompt="\0", messages=None),
)


@given(st.lists(st.sampled_from(FRAMES)), st.data())
def test_frames_come_out_whole_however_the_bytes_are_cut(frames: Any, data: Any) -> None:
    stream = b"".join(encode(frame) for frame in frames)
    buffer, got = FrameBuffer(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        buffer.feed(stream[:cut])
        stream = stream[cut:]
        while (body := buffer.take()) is not None:
            got.append(decode_to_engine(body))
    assert got == frames
    assert buffer.take() is None


@given(st.binary())
def test_bytes_that_are_no_frame_raise_a_frame_error_and_nothing_else(body: Any) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with suppress(FrameError):
            decode(body)


def test_a_frame_of_the_other_direction_is_refused() -> None:
    frame = Loaded(
        model="m",
        context_length=1,
        cache_bytes_per_token=1,
        vocabulary_size=2,
        device="cpu",
        accelerator="cpu",
    )
    body = encode(frame)[4:]
    assert decode_from_engine(body) == frame
    with pytest.raises(FrameError):
        decode_to_engine(body)


def test_a_length_beyond_the_limit_is_refused_before_the_bytes_arrive() -> None:
    buffer = FrameBuffer()
    buffer.feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(FrameError, match="limit"):
        buffer.take()


def test_a_frame_beyond_the_limit_is_not_sent() -> None:
    with pytest.raises(FrameError):
        encode(Tokenise(prompt="x" * MAX_FRAME_BYTES, messages=None))
