"""The request queue as a channel: core's sorted queue with two ends like a Trio memory channel's.

`send_nowait` never has to wait, because a place was taken at admission; closing the sending end
ends the receiving one with `EndOfChannel` once the queue is empty. Unlike a memory channel it
hands nothing out: whoever receives waits for a depth, and what is then taken, or left, or put
back, is decided on the queue itself (core/batching.py). A sequence that ends early is withdrawn
wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self, final

import trio

from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Sequence


class _State:
    """What the two ends share: the queue, who is parked, and whether the ends are open."""

    def __init__(self, queue: RequestQueue, on_put: Callable[[], None]) -> None:
        self.queue = queue
        self.on_put = on_put
        self.parked = trio.lowlevel.ParkingLot()
        self.next_change: trio.Event | None = None
        """Where somebody has asked for it."""
        self.send_open = True
        self.receive_open = True

    def wake(self) -> None:
        self.parked.unpark_all()
        if self.next_change is not None:
            self.next_change.set()
            self.next_change = None


class _End:
    """One end: closed when its `with` block is left."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@final
class PrioritySendChannel(_End):
    """The end that puts sequences in, and takes them out again when they end early."""

    def send_nowait(self, sequence: Sequence) -> None:
        """Put a sequence into its place. Raises `ClosedResourceError` or `BrokenResourceError`."""
        if not self._state.send_open:
            raise trio.ClosedResourceError
        if not self._state.receive_open:
            raise trio.BrokenResourceError
        self._state.queue.add(sequence)
        self._state.wake()
        self._state.on_put()

    def withdraw(self, sequence: Sequence) -> bool:
        """Take a sequence out wherever it stands; False if it is not (or no longer) queued."""
        return self._state.queue.remove(sequence)

    def close(self) -> None:
        self._state.send_open = False
        self._state.wake()


@final
class PriorityReceiveChannel(_End):
    """The end of who takes sequences out of the queue, and waits until there are some."""

    def __len__(self) -> int:
        return len(self._state.queue)

    def first(self) -> Sequence | None:
        """The most urgent sequence, left where it is."""
        return self._state.queue.first()

    async def wait_depth(self, depth: int) -> None:
        """Return once at least `depth` sequences are queued; nothing is taken.

        When the sending end is closed, what is there is all there will be: then it returns with
        fewer, and raises `EndOfChannel` if there is none.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while len(self._state.queue) < depth:
            if not self._state.receive_open:
                raise trio.ClosedResourceError
            if not self._state.send_open:
                if len(self._state.queue):
                    break
                raise trio.EndOfChannel
            await self._state.parked.park()
        await trio.lowlevel.cancel_shielded_checkpoint()

    @property
    def changed(self) -> trio.Event:
        """Set when the next sequence has been put in, or the sending end closed."""
        if self._state.next_change is None:
            self._state.next_change = trio.Event()
        return self._state.next_change

    def close(self) -> None:
        self._state.receive_open = False
        self._state.wake()


def open_priority_channel(
    queue: RequestQueue, *, on_put: Callable[[], None] = lambda: None
) -> tuple[PrioritySendChannel, PriorityReceiveChannel]:
    """Two ends over `queue`; its `max_size` bounds them, and its counts are their statistics.

    `on_put` is called when a sequence has been sent, in the same synchronous section.
    """
    state = _State(queue, on_put)
    return PrioritySendChannel(state), PriorityReceiveChannel(state)
