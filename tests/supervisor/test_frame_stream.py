"""The worker's end of a line, over a real socket pair."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_worker.protocol.frames import LoadFailed, Tokenised, encode
from trio_worker.protocol.framing import HungUp
from trio_worker.protocol.prompt import Prompt
from trio_worker.supervisor.frame_stream import FrameStream

LARGE = encode(Tokenised(prompt=Prompt(tokens=tuple(range(1_000_000)))))
"""More than a socket pair holds."""


@pytest.fixture
async def pair() -> AsyncIterator[tuple[FrameStream, socket.socket]]:
    ours, theirs = socket.socketpair()
    with FrameStream(ours) as stream, theirs:
        yield stream, theirs


async def test_what_the_socket_does_not_take_at_once_is_sent_by_the_flush(
    pair: tuple[FrameStream, socket.socket],
) -> None:
    stream, theirs = pair
    other = FrameStream(theirs)
    stream.send_now(LARGE)
    stream.send_now(encode(LoadFailed(message="behind it")))
    with trio.move_on_after(0) as given_up:
        await stream.flush()
    assert given_up.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.flush)
        first, second = await other.receive(), await other.receive()
    assert isinstance(first, Tokenised)
    assert len(first.prompt.tokens) == 1_000_000
    assert second == LoadFailed(message="behind it")


async def test_a_frame_that_is_there_is_received_with_a_checkpoint_and_survives_a_cancel(
    pair: tuple[FrameStream, socket.socket],
) -> None:
    stream, theirs = pair
    theirs.sendall(encode(LoadFailed(message="one")) + encode(LoadFailed(message="two")))
    assert await stream.receive() == LoadFailed(message="one")
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.receive()
    assert scope.cancelled_caught
    with assert_checkpoints():
        assert await stream.receive() == LoadFailed(message="two")


async def test_half_a_frame_is_kept_for_who_asks_next(
    pair: tuple[FrameStream, socket.socket],
) -> None:
    stream, theirs = pair
    frame = encode(LoadFailed(message="in two pieces"))
    theirs.sendall(frame[:7])
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive)
            await wait_all_tasks_blocked()
            scope.cancel()
    theirs.sendall(frame[7:])
    assert await stream.receive() == LoadFailed(message="in two pieces")


async def test_the_other_ends_end_is_told_to_who_receives_and_to_who_sends(
    pair: tuple[FrameStream, socket.socket],
) -> None:
    stream, theirs = pair
    theirs.close()
    with pytest.raises(HungUp):
        await stream.receive()
    with pytest.raises(HungUp):
        stream.send_now(LARGE)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_the_end_of_a_line_is_told_once_also_while_much_is_unsent(
    pair: tuple[FrameStream, socket.socket], whose: str
) -> None:
    stream, theirs = pair
    stream.send_now(LARGE)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError if whose == "ours" else HungUp):
                await stream.receive()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        if whose == "ours":
            stream.close()
        else:
            theirs.close()


async def test_closing_ends_a_wait_for_a_frame_and_every_later_one(
    pair: tuple[FrameStream, socket.socket],
) -> None:
    stream, _ = pair
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        stream.close()
    stream.close()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive()
