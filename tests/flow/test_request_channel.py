"""The request queue as a channel: its ends keep the promises of a Trio memory channel's."""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import pytest
import trio
import trio.testing
from support.factories import make_sequence
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Sequence
from trio_worker.flow.request_channel import (
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
    receive._state.queue.take(first)
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


async def test_what_is_shown_is_not_taken(ends: Ends) -> None:
    send, receive = ends
    assert receive.first() is None
    low, high = make_sequence("low", level=2), make_sequence("high", level=0)
    send.send_nowait(low)
    send.send_nowait(high)
    assert (receive.first(), receive.first(), len(receive)) == (high, high, 2)
    assert [(await take_first(receive)) for _ in range(2)] == [high, low]


async def test_a_change_is_told_once_by_an_event_of_its_own(ends: Ends) -> None:
    send, receive = ends
    events = [receive.changed]
    for change in (partial(send.send_nowait, make_sequence()), send.close, receive.close):
        assert not events[-1].is_set()
        change()
        assert events[-1].is_set()
        events.append(receive.changed)
    assert len(set(events)) == 4


async def test_a_closed_sender_is_told_before_an_absent_receiver(ends: Ends) -> None:
    send, receive = ends
    receive.close()
    send.close()
    with pytest.raises(trio.ClosedResourceError):
        send.send_nowait(make_sequence())


async def test_a_closed_receiver_takes_nothing_and_waits_for_nothing(ends: Ends) -> None:
    send, receive = ends
    send.send_nowait(make_sequence())
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await receive.wait_depth(2)

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        with receive:
            pass


async def test_a_receiver_of_a_sender_that_is_gone_is_told_that_there_will_be_none(
    ends: Ends,
) -> None:
    send, receive = ends
    send.close()
    with pytest.raises(trio.EndOfChannel):
        await receive.wait_depth(1)


async def test_with_a_closed_sender_what_is_there_is_all_there_will_be(
    ends: Ends, autojump_clock: MockClock
) -> None:
    send, receive = ends
    send.send_nowait(make_sequence())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive.wait_depth, 2)
        await wait_all_tasks_blocked()
        send.close()
    assert len(receive) == 1


async def test_a_wait_that_need_not_wait_is_a_checkpoint_all_the_same(ends: Ends) -> None:
    send, receive = ends
    send.send_nowait(make_sequence())
    with trio.testing.assert_checkpoints():
        await receive.wait_depth(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await receive.wait_depth(1)
    assert scope.cancelled_caught


def test_each_end_is_its_own_context(ends: Ends) -> None:
    for end in ends:
        with end as entered:
            assert entered is end
