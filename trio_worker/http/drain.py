"""The end of a server, told to all its connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Drain:
    """Whether the end has begun. Its state is that event, and the waits that it ends."""

    def __init__(self) -> None:
        self._begun = trio.Event()
        # One a connection, so bounded as they are; the one that has waited longest is the first.
        # An event to race against would cost a nursery and a task for every request.
        self._idle: dict[trio.CancelScope, None] = {}

    @property
    def is_begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        """Close the listeners and what is idle; what is being answered goes on. Once is enough."""
        self._begun.set()
        for scope in self._idle:
            scope.cancel(reason="the server ends")

    def end_longest_idle(self) -> bool:
        """Close the connection that has been idle for longest; whether there was one."""
        for scope in self._idle:
            del self._idle[scope]
            scope.cancel(reason="another one needs the place")
            return True
        return False

    async def wait_begun(self) -> None:
        await self._begun.wait()

    @contextmanager
    def idle(self, idle_s: float) -> Iterator[trio.CancelScope]:
        """What is inside is cancelled after `idle_s`, and when a drain has begun."""
        with trio.move_on_after(idle_s) as scope:
            if self.is_begun:
                scope.cancel(reason="the server ends")
            self._idle[scope] = None
            try:
                yield scope
            finally:
                self._idle.pop(scope, None)
