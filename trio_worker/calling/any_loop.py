"""What answers and clients are on Trio and on asyncio alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Any, Self

from trio_worker.calling.attempts import Chunk, Exchange, Persistence, check_caller, join

INBOX_MESSAGES = 8192
"""Messages of one answer that may wait to be read: more than any answer has by default."""
LEAVE_S = 1.0
"""How long leaving an answer, or a client, may take."""


class AnswerOnAnyLoop(ABC):
    """The answer to one request, while it arrives: an asynchronous iterator of its messages."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def request_id(self) -> str:
        return self._exchange.request_id

    @property
    def control_subject(self) -> str | None:
        """Known from the first message on; publishing `cancel` there ends the request."""
        return self._exchange.control_subject

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._exchange.ended

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> Chunk:
        """The next message."""

    async def text(self) -> str:
        """The whole text, of the first choice; reads to the end. Raises as iterating does."""
        return "".join([chunk.text async for chunk in self if chunk.choice == 0])


class ClientOnAnyLoop(ABC):
    """Asks over one connection; any number of answers at a time."""

    def __init__(self, persistence: Persistence, *, caller: str | None) -> None:
        """Raises `ValueError` if `caller` is no name of one."""
        if caller is not None:
            check_caller(caller)
        self._persistence = persistence
        self._caller = caller
        self._rng = Random()  # noqa: S311 - spreads retries; no secret

    @abstractmethod
    def ask(
        self, request: Mapping[str, Any], *, worker_id: str | None = None
    ) -> AbstractAsyncContextManager[AnswerOnAnyLoop]:
        """Send a request; yields its answer, which arrives meanwhile."""

    async def complete(self, request: Mapping[str, Any], *, worker_id: str | None = None) -> Chunk:
        """The whole answer in one piece, streamed or not. Raises as iterating it does.

        Cancelled: the request is cancelled at the worker.
        """
        async with self.ask(request, worker_id=worker_id) as answer:
            return join([chunk async for chunk in answer])

    def _exchange(
        self, request: Mapping[str, Any], *, request_id: str, worker_id: str | None, now: float
    ) -> Exchange:
        return Exchange(
            request,
            request_id=request_id,
            worker_id=worker_id,
            persistence=self._persistence,
            rng=self._rng,
            now=now,
            caller=self._caller,
        )
