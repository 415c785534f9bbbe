"""HTTP/1.1 on one stream: h11 reads and writes, and here is all that knows h11.

1. One task receives at a time: whoever waits for the head, reads the body, or watches the caller.
2. An answer that is not whole never looks whole: a stream that is closed before an answer's end
   is reset.
3. An answer is the last one, and says so, if a drain has begun or its request is not read to the
   end.
4. What sends raises CallerGone if the caller is, or does not read. Cancelled, it has sent a part,
   and the line is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus

import h11
import trio

from trio_worker.http.drain import Drain
from trio_worker.http.limits import Limits
from trio_worker.http.messages import (
    Answer,
    CallerGone,
    Refused,
    Request,
    http_date,
    request_of,
)
from trio_worker.http.sending import BoundedSender

READ_BYTES = 16 * 1024
AHEAD_BYTES = 64 * 1024
"""What is kept of the next requests while one is answered; one read more at most."""
LINGER_S = 1.0
LINGER_BYTES = 4 * 1024 * 1024
"""What is thrown away after a last answer, for its caller to read that before it is cut off."""
BODYLESS = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}
REASONS = {status.value: status.phrase for status in HTTPStatus}
"""Statuses that the standard does not know have none."""


class Line:
    """One caller's connection. Its state is h11's, and whether the body has been read."""

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        limits: Limits,
        drain: Drain,
        wall_clock: Callable[[], float],
    ) -> None:
        self._stream = stream
        self._limits = limits
        self._drain = drain
        self._wall_clock = wall_clock
        self._sender = BoundedSender(stream, limits.send_s)
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self._body_declared_bytes = 0
        self._is_head_wanted = False

    @property
    def has_bytes(self) -> bool:
        """Whether something has come that has not been looked at."""
        return bool(self._h11.trailing_data[0])

    async def receive(self) -> bool:
        """Wait for more of what the caller sends; false if that was all.

        Raises:
            CallerGone: if the caller has reset the connection.
        """
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise CallerGone from error
        self._h11.receive_data(bytes(data))
        return bool(data)

    def request_nowait(self) -> Request | None:
        """The next request, or nothing if its head is not complete.

        Raises:
            CallerGone: if the caller has closed its side, and will not ask any more.
            Refused: if this is no request that can be answered.
        """
        event = self._next_event()
        if isinstance(event, h11.ConnectionClosed):
            raise CallerGone
        if not isinstance(event, h11.Request):
            return None
        if event.http_version not in (b"1.0", b"1.1"):
            raise Refused(
                HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 is spoken here, and HTTP/1.0"
            )
        names = dict(event.headers)
        is_chunked = b"transfer-encoding" in names
        if is_chunked and b"content-length" in names:
            # Two servers in a row may disagree on where such a request ends.
            raise Refused(
                HTTPStatus.BAD_REQUEST, "Content-Length and Transfer-Encoding exclude each other"
            )
        self._body_declared_bytes = int(names.get(b"content-length", b"0"))
        self._is_head_wanted = event.method == b"HEAD"
        has_body = is_chunked or self._body_declared_bytes > 0
        if not has_body:
            self._next_event()
        return request_of(event.method, event.target, event.headers, has_body=has_body)

    async def read_body(
        self, *, limit_bytes: int | None = None, within_s: float | None = None
    ) -> bytes:
        """The body of the request, all of it. Cancelled: a part of it is lost.

        Without other bounds the server's hold.

        Raises:
            CallerGone: if the caller has reset the connection.
            Refused: if it is too long, comes too slowly, or ends early.
        """
        limit_bytes = self._limits.body_bytes if limit_bytes is None else limit_bytes
        within_s = self._limits.body_s if within_s is None else within_s
        too_large = f"the body is larger than the {limit_bytes} bytes that are taken here"
        if self._body_declared_bytes > limit_bytes:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
        if self._h11.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        body = bytearray()
        with trio.move_on_after(within_s):
            while not self._is_request_read:
                event = self._next_event()
                if event is h11.NEED_DATA:
                    await self.receive()
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > limit_bytes:
                        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
            return bytes(body)
        raise Refused(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the body did not come within {within_s:g} seconds",
        )

    async def wait_closed(self) -> None:
        """Return when the caller has closed its side; what it sends until then is kept.

        It is not noticed any more of a caller that has sent `AHEAD_BYTES` ahead.

        Raises:
            CallerGone: if the caller has reset the connection.
        """
        while len(self._h11.trailing_data[0]) < AHEAD_BYTES:
            if not await self.receive():
                return
        await trio.sleep_forever()

    async def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        headers = dict(answer.headers)
        if answer.status not in BODYLESS:
            headers["Content-Length"] = str(len(answer.body))
        await self._send(
            self._head(answer.status, headers), *self._data(answer.body), h11.EndOfMessage()
        )

    async def begin(self, status: int, headers: Mapping[str, str], piece: bytes) -> None:
        """Send the head and the first piece of a streamed answer."""
        await self._send(self._head(status, headers), *self._data(piece))

    async def send_piece(self, piece: bytes) -> None:
        """Send a piece more."""
        await self._send(*self._data(piece))

    async def end(self) -> None:
        """End a streamed answer as it should."""
        await self._send(h11.EndOfMessage())

    @property
    def is_broken(self) -> bool:
        """Whether a part of something was sent, and what follows would not be understood."""
        return self._h11.our_state is h11.ERROR

    @property
    def has_begun_to_answer(self) -> bool:
        return self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    def start_next_cycle(self) -> bool:
        """Whether another request may come on this connection; if so, be ready for it."""
        is_over = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        if is_over:
            self._h11.start_next_cycle()
        return is_over

    async def linger(self) -> None:
        """After a last answer, throw away what the caller still sends, for a moment.

        Closing on unread bytes resets the connection, and a caller that is told of that while it
        sends would not read why.
        """
        with trio.move_on_after(LINGER_S):
            try:
                await self._stream.send_eof()
                for _ in range(LINGER_BYTES // READ_BYTES):
                    if not await self._stream.receive_some(READ_BYTES):
                        break
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    def prepare_close(self) -> None:
        """Before the stream is closed: if an answer is not whole, that will be a reset."""
        if self._h11.our_state in (h11.SEND_BODY, h11.ERROR):
            self._sender.make_close_a_reset()

    @property
    def has_unread(self) -> bool:
        """Whether the caller has sent, or may still send, what nobody will read."""
        return not self._is_request_read or self.has_bytes

    @property
    def _is_request_read(self) -> bool:
        return self._h11.their_state not in (h11.IDLE, h11.SEND_BODY, h11.ERROR)

    def _next_event(self) -> object:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            raise Refused(status, self._complaint(status, str(error))) from error

    def _complaint(self, status: HTTPStatus, what: str) -> str:
        if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            return f"the headers are larger than the {self._limits.head_bytes} bytes taken here"
        if status is HTTPStatus.NOT_IMPLEMENTED:
            return "of the transfer encodings only `chunked` is known here"
        # What stands behind the colon is what the caller sent.
        return f"this is not HTTP/1.1: {what.partition(':')[0]}"

    def _head(self, status: int, headers: Mapping[str, str]) -> h11.Response:
        sent = [("Date", http_date(int(self._wall_clock()))), *headers.items()]
        if self._drain.is_begun or not self._is_request_read:
            sent.append(("Connection", "close"))
        return h11.Response(status_code=status, headers=sent, reason=REASONS.get(status, ""))

    def _data(self, piece: bytes) -> tuple[h11.Data, ...]:
        return () if self._is_head_wanted else (h11.Data(data=piece),)

    async def _send(self, *events: h11.Event) -> None:
        await self._sender.checkpoint_if_due()
        data = b"".join([self._h11.send(event) or b"" for event in events])
        try:
            await self._sender.send(data)
        except BaseException:
            self._h11.send_failed()
            raise
