"""The request queue as a channel: its ends keep the promises of a Trio memory channel's."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import trio
from factories import make_sequence
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Sequence
from trio_worker.priority_channel import (
    PriorityReceiveChannel,
    PrioritySendChannel,
    open_priority_channel,
)

Ends: TypeAlias = tuple[PrioritySendChannel, PriorityReceiveChannel]


@pytest.fixture
def ends() -> Ends:
    return open_priority_channel(RequestQueue(max_size=3))


async def take_first(receive: PriorityReceiveChannel) -> Sequence:
    """As the batcher does: wait, look, take."""
    await receive.wait_depth(1)
    first = receive.first()
    assert first is not None
    receive.take_nowait(first)
    return first


async def test_the_most_urgent_is_taken_first(ends: Ends) -> None:
    send, receive = ends
    for name, level in [("low", 2), ("high", 0), ("medium", 1)]:
        send.send_nowait(make_sequence(name, level=level))
    assert [(await take_first(receive)).request_id for _ in range(3)] == ["high", "medium", "low"]
    assert receive.first() is None


async def test_a_waiting_receiver_is_woken_by_what_is_sent(
    ends: Ends, autojump_clock: MockClock
) -> None:
    send, receive = ends
    with trio.move_on_after(1) as nobody:
        await receive.wait_depth(1)
    assert nobody.cancelled_caught
    got: list[Sequence] = []

    async def take() -> None:
        got.append(await take_first(receive))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sequence = make_sequence("a")
        send.send_nowait(sequence)
    assert got == [sequence]


async def test_closing_the_sender_ends_the_receiver_once_it_is_empty(ends: Ends) -> None:
    send, receive = ends
    send.send_nowait(make_sequence("last"))
    send.close()
    assert (await take_first(receive)).request_id == "last"
    with pytest.raises(trio.EndOfChannel):
        await receive.wait_depth(1)
    with pytest.raises(trio.ClosedResourceError):
        send.send_nowait(make_sequence())


async def test_closing_wakes_a_waiting_receiver(ends: Ends) -> None:
    send, receive = ends
    async with trio.open_nursery() as nursery:

        async def take() -> None:
            with pytest.raises(trio.EndOfChannel):
                await receive.wait_depth(1)

        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        with send:
            pass


async def test_sending_to_nobody_is_told(ends: Ends) -> None:
    send, receive = ends
    with receive:
        pass
    with pytest.raises(trio.BrokenResourceError):
        send.send_nowait(make_sequence())


async def test_a_sequence_can_be_taken_out_wherever_it_stands(ends: Ends) -> None:
    send, receive = ends
    sequences = [make_sequence(str(index)) for index in range(3)]
    for sequence in sequences:
        send.send_nowait(sequence)
    assert send.withdraw(sequences[1])
    assert not send.withdraw(sequences[1])
    assert [(await take_first(receive)) for _ in range(2)] == [sequences[0], sequences[2]]


async def test_wait_depth_waits_for_company(ends: Ends, autojump_clock: MockClock) -> None:
    send, receive = ends
    send.send_nowait(make_sequence("a"))
    with trio.move_on_after(1) as alone:
        await receive.wait_depth(2)
    assert alone.cancelled_caught
    send.send_nowait(make_sequence("b"))
    await receive.wait_depth(2)
    assert len(receive) == 2


async def test_more_than_the_bound_is_a_fault(ends: Ends) -> None:
    send, _ = ends
    for _ in range(3):
        send.send_nowait(make_sequence())
    with pytest.raises(AssertionError):
        send.send_nowait(make_sequence())
