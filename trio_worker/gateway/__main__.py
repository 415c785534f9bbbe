"""The gateway's process beside a worker: told what to do by it, and gone when it is gone.

On standard input come a line with the configuration and, when the worker has ended, the end. The
sockets to listen on are the worker's. What is logged goes to standard error, in JSON.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial

import msgspec
import trio

from trio_worker.cli.exit_statuses import exit_status_of
from trio_worker.errors import ExitStatus
from trio_worker.launch_gateway import Hello, launch_gateway
from trio_worker.logs import set_up_logging


def main() -> int:
    """Serve until told to stop, or until the worker has ended; returns the exit status."""
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="trio_worker.gateway")
    parser.add_argument("--listen-fd", type=int, action="append", required=True)
    numbers = parser.parse_args().listen_fd
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return ExitStatus.OK
    hello = msgspec.json.decode(line, type=Hello)
    set_up_logging(log_format="json", level=hello.log_level)
    return exit_status_of(partial(_run, hello, numbers))


def _run(hello: Hello, numbers: Sequence[int]) -> int:
    trio.run(_serve, hello, numbers)
    return ExitStatus.OK


async def _serve(hello: Hello, numbers: Sequence[int]) -> None:
    listeners = [
        trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=number)))
        for number in numbers
    ]
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_with_the_worker, nursery.cancel_scope)
            await launch_gateway(hello.config, stops=signals, listeners=listeners)
            nursery.cancel_scope.cancel(reason="the gateway has ended")


async def _end_with_the_worker(gateway: trio.CancelScope) -> None:
    """Cancel it when the worker is gone, whatever it was that ended it."""
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as worker:
        while await worker.receive_some():
            pass
    gateway.cancel(reason="the worker has ended")


if __name__ == "__main__":
    sys.exit(main())
