"""Commands that Ctrl-C ends."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from trio_worker.exception_groups import sole_exceptions


async def until_interrupted(work: Callable[[], Awaitable[object]]) -> bool:
    """Do `work`; false if SIGINT or SIGTERM ended it, by cancelling. Raises what it raises."""
    is_done = False
    with sole_exceptions(), trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_at_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel(reason="interrupted")

            nursery.start_soon(cancel_at_signal)
            await work()
            is_done = True
            nursery.cancel_scope.cancel(reason="done")
    return is_done
