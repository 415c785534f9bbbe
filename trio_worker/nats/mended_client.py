"""nats-py's client without the ways in which it goes deaf.

Each override says what it is for; each has a test that fails without it. Nothing else in the
package knows of nats-py's private names.
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
from nats.protocol.parser import Parser

_LINE_BYTES = 64 * 1024
"""The longest control line taken from the server; an INFO of a large cluster fits."""


class PlainServer(nats_errors.Error):  # type: ignore[misc]
    """The server does not offer the TLS that is configured."""

    def __str__(self) -> str:
        return "the server does not offer TLS"


class MendedClient(Client):  # type: ignore[misc]
    """nats-py's client without the ways in which it goes deaf.

    Each override says what it is for; each has a test that fails without it.
    """

    def __init__(self, wants_tls: bool, on_lost: Callable[[str], None]) -> None:  # noqa: FBT001
        super().__init__()
        self._ps = StrictParser(self)
        self._wants_tls = wants_tls
        self._on_lost = on_lost

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

    def release_waiters(self) -> None:
        """Let go whoever waits for an answer on a connection that has gone."""
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(ConnectionResetError("the connection broke"))
                pong.exception()
        self._pongs.clear()
        if self._flush_queue is not None:
            while not self._flush_queue.empty():
                flushed = self._flush_queue.get_nowait()
                if not flushed.done():
                    flushed.set_result(None)

    async def send_unsubscribe(self, subscription: Any) -> None:
        if self.is_connected:
            await self._send_unsubscribe(subscription._id)

    async def join(self, subscription: Any) -> None:
        """Return when the callback has had everything that has arrived."""
        await subscription._pending_queue.join()

    def forget(self, subscription: Any) -> bool:
        """Neither deliver nor renew `subscription` from now on; False if that was so before."""
        known = subscription._id in self._subs
        self._remove_sub(subscription._id)
        subscription._stop_processing()
        return known

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # nats-py writes a PING past the commands that wait to be written, so its answer would
        # say nothing about them. The keep-alive (no future) must not wait for a hung server.
        if future is not None:
            await self._flush_pending(force_flush=True)
            if not self.is_connected:
                raise ConnectionResetError("the connection broke")
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        # Setting the result of a cancelled future would end the read loop.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_msg(self, *args: Any) -> None:
        # Subjects that are not UTF-8 and malformed header blocks come through the server; what
        # they raise would end the read loop.
        try:
            await super()._process_msg(*args)
        except (ValueError, IndexError) as exc:
            await self._error_cb(nats_errors.Error(f"a malformed message was ignored: {exc!r}"))

    async def _process_connect_init(self) -> None:
        # Without these nats-py takes half a greeting for a connection, or a reconnection
        # attempt ends with an exception that nobody sees.
        greeted = False
        try:
            await super()._process_connect_init()
            greeted = self.is_connected
        except ssl.SSLError:  # some of them are ValueErrors too
            raise
        except ValueError as exc:
            raise nats_errors.Error(f"what answered does not speak NATS: {exc}") from exc
        finally:
            if not greeted:
                self.abort()  # nats-py would leave the socket to the garbage collector
        if not greeted:
            for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
                task.cancel()
            raise nats_errors.Error("the server closed the connection while greeting")

    async def _attempt_reconnect(self) -> None:
        # nats-py would first wait until a hung server has read what is in the socket's buffer.
        self.abort()
        try:
            await super()._attempt_reconnect()
        except Exception as exc:  # noqa: BLE001 - nobody awaits this task: it must not end unheard
            self._err = exc
            await self._close(Client.CLOSED)

    def _connect_command(self) -> bytes:
        # nats-py would send the credentials in the clear if the server does not offer TLS.
        if self._wants_tls and not self._server_info.get("tls_required"):
            raise PlainServer
        command: bytes = super()._connect_command()
        return command

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT001, FBT002
        # `closed_cb` is not called for an error of the server while connecting.
        if status == Client.CLOSED:
            self._on_lost(str(self.last_error or "it was closed"))
        await super()._close(status, do_cbs)


class StrictParser(Parser):  # type: ignore[misc]
    """nats-py's parser with the server's idea of white space: a space, and nothing else.

    Its own takes vertical tabs for white space too. A server passes them on inside subjects,
    so with it any client could break the connection of any other.
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
