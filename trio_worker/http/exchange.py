"""What an endpoint gets, and does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import trio

from trio_worker.http.line import Line
from trio_worker.http.messages import Answer, CallerGone, Refused, Request


class Exchange:
    """One request, and the way for its answer.

    An endpoint returns a whole `Answer`; or it says `begin`, sends pieces, and returns None.

    Nothing of this raises into an endpoint. Whatever ends an exchange before its time (the caller
    has left or does not read, its body is not to be had, the connection's time is up) cancels
    the endpoint instead, in whichever of its tasks that is noticed.
    """

    def __init__(self, request: Request, line: Line, scope: trio.CancelScope) -> None:
        self.request = request
        self.refusal: Answer | None = None
        """What is answered instead of what the endpoint would say."""
        self._is_cut = False
        self._line = line
        self._scope = scope
        self._head: tuple[int, Mapping[str, str]] | None = None
        self._has_all = trio.Event()
        if not request.has_body:
            self._has_all.set()

    @property
    def has_begun(self) -> bool:
        """Whether the status has been sent, so that nothing else can be answered any more."""
        return self._line.has_begun_to_answer

    @property
    def is_cut(self) -> bool:
        """Whether nothing more is to be sent."""
        return self._is_cut or self._line.is_broken

    async def read_body(
        self, *, limit_bytes: int | None = None, within_s: float | None = None
    ) -> bytes:
        """The body of the request, empty if there is none; within the server's bounds, or these."""
        if not self.request.has_body:
            return b""
        try:
            body = await self._line.read_body(limit_bytes=limit_bytes, within_s=within_s)
        except Refused as refused:
            self.refusal = refused.answer
            self._scope.cancel(reason="the body cannot be read")
        except CallerGone:
            self.cut("the caller is gone")
        else:
            self._has_all.set()
            return body
        return await _never()

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Answer in pieces. Both are sent with the first piece, and until then may be changed."""
        assert not self.has_begun
        self._head = (status, headers)

    async def send(self, piece: bytes) -> None:
        """Send a piece; not always a checkpoint.

        Cancelled in the middle of a piece: the connection is reset at the end of the exchange.
        """
        assert self._head is not None, "begin first"
        self._has_all.set()
        if self.is_cut:
            await trio.lowlevel.checkpoint()
            return
        try:
            if self.has_begun:
                await self._line.send_piece(piece)
            else:
                await self._line.begin(*self._head, piece)
        except CallerGone:
            self.cut("the caller is gone, or does not read")
            await trio.lowlevel.checkpoint()

    def cut(self, reason: str) -> None:
        """End the exchange where it is: the endpoint is cancelled, an answer begun is not ended.

        The caller sees a broken connection, and cannot take what it got for everything.
        """
        self._is_cut = True
        self._scope.cancel(reason=reason)

    async def wait_received(self) -> None:
        """Return when nobody reads the body any more."""
        await self._has_all.wait()

    def check(self, answer: Answer | None) -> None:
        """A fault of the endpoint's is an AssertionError."""
        if answer is None:
            assert self._head is not None, "an endpoint has answered nothing"
        else:
            assert not self.has_begun, "an answer in pieces cannot be whole, too"

    async def finish(self, answer: Answer | None) -> None:
        """Send what is left to be sent: a whole answer, or the end of the pieces.

        Raises:
            CallerGone: if the caller is.
        """
        if answer is not None:
            await self._line.answer(answer)
            return
        if self._head is not None and not self.has_begun:
            await self._line.begin(*self._head, b"")
        await self._line.end()


Endpoint: TypeAlias = Callable[[Exchange], Awaitable[Answer | None]]
"""Answers one request: returns the answer, or None if it has sent it in pieces."""


async def _never() -> bytes:
    """Wait for the cancellation that is under way."""
    await trio.sleep_forever()
    raise AssertionError
