"""nats-py's client without the ways in which it goes deaf, hangs or ends unheard.

Every mend has a comment that begins with "Without this" and says what breaks, and names a test
that fails without it. Nothing else in the package knows of nats-py's private names.
"""

# ruff: noqa: SLF001 - nats-py's own parts

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.protocol import command as protocol_command
from nats.protocol.parser import Parser

_LINE_BYTES = 64 * 1024
"""The longest control line taken from the server; an INFO of a large cluster fits."""

_WHITE_SPACE = " \t\r\n\x0b\x0c"
"""Of ASCII, around the name and the value of a header."""


class PlainServer(nats_errors.Error):  # type: ignore[misc]
    """The server does not offer the TLS that is configured."""

    def __str__(self) -> str:
        return "the server does not offer TLS"


class MendedClient(Client):  # type: ignore[misc]
    """nats-py's client; what is public here is all that others use beside its public names."""

    def __init__(self, *, wants_tls: bool, on_ended: Callable[[Exception | None], None]) -> None:
        """`on_ended` is called, with the last error, when there will be no other connection."""
        super().__init__()
        self._ps = StrictParser(self)
        self._wants_tls = wants_tls
        self._on_ended = on_ended

    # --- what nats-py lacks -------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether `write` would send: there is a connection, and it is not full.

        Full is what holds more than asyncio's own limit: 64 KiB, or 512 KiB behind TLS.
        """
        if not self.is_connected:
            return False
        transport = self._transport._io_writer.transport
        _, full_bytes = transport.get_write_buffer_limits()
        return not transport.is_closing() and transport.get_write_buffer_size() <= full_bytes

    def write(self, frames: bytes) -> None:
        """Send behind all that was sent before, at once; only while `is_writable`.

        Synchronous, and legal in Trio's tasks. Never raises: a line that turns out to have broken
        loses what is written, and nothing of it comes again over the next one.
        """
        # The commands that wait for nats-py's own flusher, which then finds nothing left to do.
        self._transport.write(b"".join((*self._pending, frames)))
        self._pending.clear()
        self._pending_data_size = 0

    async def wait_written(self) -> None:
        """Return when the connection is not full; raises `OSError` when it breaks."""
        await self._transport.drain()

    async def ping(self) -> None:
        """A round trip that may be cancelled; raises `OSError` when the connection breaks."""
        pong = asyncio.get_running_loop().create_future()
        await self._send_ping(pong)
        await pong

    def abort(self) -> None:
        """Close the socket now; what has not been written is lost."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def withdraw(self, subscription: Any) -> None:
        """Tell the server that we no longer want it, before anything that is sent later.

        Synchronous, and legal in Trio's tasks; without a connection there is nobody to tell.
        """
        if self.is_connected:
            self._pending.append(protocol_command.unsub_cmd(subscription._id, 0))
            self._pending_data_size += len(self._pending[-1])
            if self._flush_queue.empty():
                self._flush_queue.put_nowait(self._flusher_task.get_loop().create_future())

    def forget(self, subscription: Any) -> None:
        """Neither deliver nor renew `subscription` from now on."""
        self._remove_sub(subscription._id)
        subscription._stop_processing()

    async def join(self, subscription: Any) -> None:
        """Return when the callback has had everything that has arrived."""
        await subscription._pending_queue.join()

    # --- cancellation -------------------------------------------------------------------------

    async def _flush_pending(self, force_flush: bool = False) -> Any:  # noqa: FBT001, FBT002
        # Without this a cancelled wait for a hung server swallows the cancellation and goes on:
        # test_waits_on_a_hung_server_end_with_their_scopes.
        flushed = await super()._flush_pending(force_flush)
        _raise_if_cancelled()
        return flushed

    async def _send_subscribe(self, subscription: Any) -> None:
        # Without this a subscription whose caller was cancelled here would be renewed for ever:
        # test_a_subscription_that_is_cancelled_while_it_is_sent_leaves_nothing.
        try:
            await super()._send_subscribe(subscription)
        except asyncio.CancelledError:
            self.forget(subscription)
            self.withdraw(subscription)
            raise

    async def _connect_to_server(self, server: Any) -> None:
        # Without this, before Python 3.12, a cancellation that comes just when an attempt fails is
        # swallowed by `wait_for`, and nats-py makes attempts for ever:
        # test_connecting_ends_when_it_is_cancelled_as_an_attempt_fails.
        _raise_if_cancelled()
        await super()._connect_to_server(server)

    # --- connecting ---------------------------------------------------------------------------

    async def _process_connect_init(self) -> None:
        greeted = False
        try:
            await super()._process_connect_init()
            greeted = self.is_connected
        except ssl.SSLError:  # some of them are ValueErrors too
            raise
        except ValueError as exc:
            # Without this an endless line from what is no nats-server ends all attempts with an
            # exception that nobody expects: test_what_is_not_a_nats_server_is_given_up_in_time.
            raise nats_errors.Error(f"what answered does not speak NATS: {exc}") from exc
        finally:
            if not greeted:
                # Without this the socket is left open until it is collected as garbage:
                # test_a_socket_that_was_not_greeted_is_closed.
                self.abort()
        if not greeted:
            # Without this a server that hangs up while it greets counts as a reconnection, and
            # leaves a keep-alive task behind each time:
            # test_a_server_that_hangs_up_while_it_greets_is_no_connection.
            for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
                task.cancel()
            raise nats_errors.Error("the server closed the connection while greeting")

    def _connect_command(self) -> bytes:
        # Without this the credentials go in the clear to a server that does not offer TLS:
        # test_nothing_is_sent_to_a_server_without_the_tls_that_was_configured.
        if self._wants_tls and not self._server_info.get("tls_required"):
            raise PlainServer
        command: bytes = super()._connect_command()
        return command

    # --- the round trip -----------------------------------------------------------------------

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # Without this a PING overtakes the commands that wait to be written, and its answer says
        # nothing about them: test_a_ping_does_not_overtake_what_it_is_to_confirm. The keep-alive
        # (no future) must not wait for a hung server.
        if future is not None:
            await self._flush_pending(force_flush=True)
            # Without this a round trip during an outage is never answered:
            # test_a_subscription_given_up_over_an_outage_does_not_come_back.
            if not self.is_connected:
                raise ConnectionResetError("the connection broke")
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        # Without this the answer to a cancelled PING ends the read loop:
        # test_flush_can_be_cancelled_and_the_connection_goes_on.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    def _release_waiters(self) -> None:
        # Without this whoever waits for an answer on a connection that has broken waits for ever:
        # test_a_flush_under_way_when_the_line_breaks_goes_on_over_the_next_one.
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(ConnectionResetError("the connection broke"))
                pong.exception()  # not all of them are waited for
        self._pongs.clear()
        # Likewise who waits to be written:
        # test_a_drain_that_waits_to_be_written_ends_when_the_line_breaks.
        if self._flush_queue is not None:
            while not self._flush_queue.empty():
                flushed = self._flush_queue.get_nowait()
                if not flushed.done():
                    flushed.set_result(None)

    # --- what arrives -------------------------------------------------------------------------

    async def _process_msg(self, *args: Any) -> None:
        # Without this a subject that is not UTF-8 or a malformed header block, which any client
        # can send and a server passes on, ends the read loop:
        # test_what_another_client_sends_costs_that_message_at_most.
        try:
            await super()._process_msg(*args)
        except (ValueError, IndexError) as exc:
            await self._error_cb(nats_errors.Error(f"a malformed message was ignored: {exc!r}"))

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        # Not a mend: nats-py's looks at each character of each name, which is a fifth of what
        # receiving a message of an answer costs. The outcome is the same:
        # test_headers_are_read_as_nats_py_reads_them.
        headers: dict[str, str] = {}
        for line in raw.decode(errors="replace").split("\r\n"):
            name, colon, value = line.partition(":")
            name = name.strip(_WHITE_SPACE)
            if colon and name.isascii() and name.split() == [name]:
                headers[name] = value.strip(_WHITE_SPACE)
        return headers

    # --- the end of a connection --------------------------------------------------------------

    async def _attempt_reconnect(self) -> None:
        # Without this a hung server is waited for until it has read what the socket holds:
        # test_a_server_that_hangs_for_long_is_given_up.
        self.abort()
        self._release_waiters()
        try:
            await super()._attempt_reconnect()
        except Exception as exc:  # noqa: BLE001 - see below
            # Without this the task, for which nobody waits, ends unheard, and the client stays
            # deaf: test_a_fault_while_reconnecting_is_told.
            self._err = exc
            await self._close(Client.CLOSED)

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT001, FBT002
        # Without this nobody is told of an end between the first greeting and its answer, where
        # nats-py calls no `closed_cb`: test_an_error_right_after_the_greeting_ends_it_at_once.
        if status == Client.CLOSED:
            self._on_ended(self.last_error)
        # Without this who waits for an answer outlives the connection:
        # test_a_drain_under_way_ends_with_the_connection.
        self._release_waiters()
        await super()._close(status, do_cbs)


def _raise_if_cancelled() -> None:
    """Raise `CancelledError` if that was asked for and somebody has swallowed it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class StrictParser(Parser):  # type: ignore[misc]
    """A parser with the server's idea of white space: a space, and nothing else.

    Without this any client can break the connection of any other, since nats-py's own takes
    vertical tabs for white space too, and a server passes them on inside subjects:
    test_what_another_client_sends_costs_that_message_at_most.
    """

    async def parse(self, data: bytes = b"") -> None:
        buffer = self.buf
        buffer.extend(data)
        # `reset` puts another buffer in the place of this one.
        while self.buf is buffer and (command := self._next(buffer)) is not None:
            await command

    def _next(self, buffer: bytearray) -> Awaitable[None] | None:
        """Take the first complete command out of `buffer`."""
        end = buffer.find(b"\r\n")
        if end < 0:
            if len(buffer) > _LINE_BYTES:
                raise nats_errors.ProtocolError
            return None
        verb, _, rest = bytes(buffer[:end]).partition(b" ")
        if verb in {b"MSG", b"HMSG"}:
            return self._next_message(buffer, end + 2, verb == b"HMSG", rest.split(b" "))
        del buffer[: end + 2]
        client = self.nc
        text = rest.decode(errors="replace")
        if verb == b"PING":
            command = client._process_ping()
        elif verb == b"PONG":
            command = client._process_pong()
        elif verb == b"+OK":
            command = asyncio.sleep(0)
        elif verb == b"-ERR":
            command = client._process_err(text.lower())
        elif verb == b"INFO":
            command = client._process_info(_info(text))
        else:
            raise nats_errors.ProtocolError
        return command  # type: ignore[no-any-return]

    def _next_message(
        self,
        buffer: bytearray,
        start: int,
        has_headers: bool,  # noqa: FBT001
        words: list[bytes],
    ) -> Awaitable[None] | None:
        sizes = 2 if has_headers else 1
        try:
            total = int(words[-1])
            header = int(words[-2]) if has_headers else 0
            subject, sid, *reply = words[:-sizes]
            number = int(sid)
        except (ValueError, IndexError):
            raise nats_errors.ProtocolError from None
        end = start + total
        if len(buffer) < end + 2:
            return None
        block = bytes(buffer[start : start + header])
        body = bytes(buffer[start + header : end])
        del buffer[: end + 2]
        return self.nc._process_msg(  # type: ignore[no-any-return]
            number, subject, reply[0] if reply else b"", body, block
        )


def _info(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise nats_errors.ProtocolError from None
