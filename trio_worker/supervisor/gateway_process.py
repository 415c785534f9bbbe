"""A gateway beside the worker, in a child process that is started again whenever it ends.

1. It comes on top: whatever becomes of it, the worker serves NATS, and the log says so.
2. The worker holds the listening sockets for as long as a child may be started again. So the port
   stays the same, and who connects in between waits instead of being refused.
3. What a child has to know comes through its standard input, since there are secrets in it. That
   stays open as long as the worker lives, and its end is the child's.
4. Once the worker is asked to stop, the child drains; it is waited for, within a bound. When the
   context ends, however it ends, nothing of it is left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio
from loguru import logger
from trio_util import AsyncValue, move_on_when

from trio_worker.exception_groups import sole_exceptions
from trio_worker.http.listening import PortTaken, address_of, open_listeners
from trio_worker.machine.child_process import how_it_ended, kill_group, read_lines, start_group
from trio_worker.supervisor.gateway_log import LINE_BYTES, relay
from trio_worker.supervisor.restart_budget import RestartBudget

# -P: no module comes from where we were started, which may be a model's folder.
GATEWAY_PROGRAM = (sys.executable, "-P", "-m", "trio_worker.gateway")

BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
PORT_RETRY_S = 5.0
"""Nothing tells when a port is free again."""
CLOSING_S = 4.0
"""What a drain takes beside its own time: the close of the connection to NATS."""
KILL_GRACE_S = 0.5
"""A killed child is gone in milliseconds; this bounds the wait for the system to say so."""
LOG_GRACE_S = 0.2
"""How long to read what a dead child had still written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What is the same in every life."""

    host: str
    port: int
    """0 is any free one."""
    drain_timeout_s: float
    hello: bytes = field(repr=False)
    """The line that a child reads first."""
    program: Sequence[str] = GATEWAY_PROGRAM
    """The command that serves; the numbers of the sockets to listen on are appended."""


class GatewayProcess:
    """See above. Its state: the sockets that are listened on; none if the port is taken."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._budget = RestartBudget(max_restarts=MAX_RESTARTS, window_s=RESTART_WINDOW_S)
        self._listeners: list[trio.SocketListener] = []

    @property
    def address(self) -> str | None:
        """Where it can be called; None while somebody else has the port, and after the end."""
        return address_of(self._settings.host, self._listeners) if self._listeners else None

    @asynccontextmanager
    async def running(self, stops: AsyncValue[int]) -> AsyncIterator[None]:
        """A gateway for as long as the block.

        The first of `stops` begins its drain, the second one cuts that short. Entered when callers
        can connect, or when somebody else has the port, which is then tried again and again.
        Leaving waits for the end of the drain. Cancelled: the child is killed.

        Raises:
            ConfigError: if the address cannot be listened on, other than for being taken.
        """
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                await nursery.start(self._supervise, stops)
                yield

    async def _supervise(  # noqa: ASYNC128 - what it calls reports the start
        self, stops: AsyncValue[int], *, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            await self._listen(stops, task_status)
            while self._listeners and not stops.value:
                returncode = await self._live_once(stops)
                if not stops.value:
                    await self._recover(how_it_ended(returncode), stops)
        finally:
            self._close_listeners()

    async def _listen(self, stops: AsyncValue[int], task_status: trio.TaskStatus[None]) -> None:
        """Until there are sockets to listen on, or the worker is asked to stop."""
        settings, is_first = self._settings, True
        async with move_on_when(stops.wait_value, _once):
            while not self._listeners:
                try:
                    self._listeners = await open_listeners(
                        settings.host, settings.port, section="cluster.gateway"
                    )
                except PortTaken as error:
                    if is_first:
                        logger.warning("{}. Until it is free, this worker serves NATS only", error)
                        task_status.started()
                    is_first = False
                    await trio.sleep(PORT_RETRY_S)
        if is_first:
            task_status.started()

    async def _live_once(self, stops: AsyncValue[int]) -> int | None:
        """From start to end; returns the exit status. Cancelled: within a second, too."""
        process = await self._start()
        async with trio.open_nursery() as logs:
            logs.start_soon(_read_log, process)
            try:
                async with trio.open_nursery() as life:
                    life.start_soon(self._tell, process)
                    life.start_soon(self._stop, process, stops)
                    await process.wait()
                    life.cancel_scope.cancel(reason="the gateway has ended")
            finally:
                if process.returncode is None:
                    kill_group(process)
                assert process.stdin is not None
                with trio.move_on_after(KILL_GRACE_S, shield=True):
                    await process.wait()
                    await process.stdin.aclose()
            logs.cancel_scope.deadline = trio.current_time() + LOG_GRACE_S
        return process.returncode

    async def _start(self) -> trio.Process:
        numbers = [listener.socket.fileno() for listener in self._listeners]
        return await start_group(
            [
                *self._settings.program,
                *(part for number in numbers for part in ("--listen-fd", str(number))),
            ],
            stdin=subprocess.PIPE,
            pass_fds=numbers,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    async def _tell(self, process: trio.Process) -> None:
        assert process.stdin is not None
        # One that has ended does not take it; that is noticed by its end.
        with suppress(trio.BrokenResourceError):
            await process.stdin.send_all(self._settings.hello)

    async def _stop(self, process: trio.Process, stops: AsyncValue[int]) -> None:
        """Have it drain once the worker is asked to stop, and killed when that takes too long."""
        await stops.wait_value(_once)
        # The child closes its own; while one of the two is open, callers would still connect.
        self._close_listeners()
        process.terminate()
        with trio.move_on_after(self._settings.drain_timeout_s + CLOSING_S):
            await stops.wait_value(_twice)
            process.terminate()
            await trio.sleep(CLOSING_S)
        logger.warning("the gateway did not end in time and is killed")
        kill_group(process)

    async def _recover(self, how: str, stops: AsyncValue[int]) -> None:
        """Wait before the next life, or give up."""
        if not self._budget.spend(trio.current_time()):
            logger.error(
                "the gateway ended {} times within {:g} s, at last with {}: it is not started "
                "again, and this worker serves NATS only",
                self._budget.spent,
                RESTART_WINDOW_S,
                how,
            )
            self._close_listeners()
            return
        logger.warning("the gateway ended ({}) and is started again", how)
        backoff_s = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** (self._budget.spent - 1))
        async with move_on_when(stops.wait_value, _once):
            await trio.sleep(backoff_s)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.socket.close()
        self._listeners = []


async def _read_log(process: trio.Process) -> None:
    await read_lines(process, relay, longest_bytes=LINE_BYTES)


def _once(count: int) -> bool:
    return count >= 1


def _twice(count: int) -> bool:
    return count >= 2
