"""From bytes to a request that has been let in, or to an answer that says why not. Synchronous.

Every way by which requests reach a worker goes through here; what differs is the `Arrival`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import trio
from loguru import logger

from trio_worker.core.sequence import Sequence, sequences_of
from trio_worker.errors import WorkerError
from trio_worker.flow.reply import OpenReply, Reply
from trio_worker.flow.serving import Serving
from trio_worker.monitoring.counters import RequestCounters
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native
from trio_worker.wire.dialect import Dialect
from trio_worker.wire.native import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request as it came in, before it is read."""

    body: bytes
    subject: str
    """Where it came in: one of few, for requests are counted by it."""
    dialect: Dialect
    open_reply: OpenReply
    reply_subject: str = ""
    """Where its answer goes, as the server would name it to say that nobody listens there."""
    caller: str | None = None
    """Who asks, where that does not hang on what the request says of itself."""


class Admitted(NamedTuple):
    """What the task of an admitted request needs."""

    sequence: Sequence
    """Of a request with several choices, that of the first."""
    scope: trio.CancelScope
    reply: Reply


class Respond(Protocol):
    """Runs as one request's own task: stages/respond.py with everything else filled in."""

    def __call__(
        self, sequence: Sequence, scope: trio.CancelScope, reply: Reply
    ) -> Awaitable[None]: ...


class Reception:
    """Its state: how many requests have come in. One for each serving."""

    def __init__(self, serving: Serving, *, counters: RequestCounters, rng: random.Random) -> None:
        self._serving = serving
        self._counters = counters
        self._rng = rng
        self._arrivals = itertools.count()

    def read(self, arrival: Arrival) -> Fields | None:
        """The request's fields under their canonical names; None if it has been answered."""
        try:
            fields = arrival.dialect.parse_body(arrival.body, self._serving.limits)
        except WorkerError as error:
            self.refuse(arrival, error)
            return None
        if arrival.caller is not None:
            fields["caller"] = arrival.caller
        return fields

    def admit(self, arrival: Arrival, fields: Fields) -> Admitted | None:
        """What the request's task needs; None if there will be no task: it has been answered."""
        serving, dialect = self._serving, arrival.dialect
        request_id = dialect.request_id_of(fields) or self._draw_id()
        try:
            request = dialect.to_request(
                fields,
                serving.limits,
                request_id=request_id,
                draw_seed=lambda: self._rng.randrange(native.SEED_END),
            )
            now = trio.current_time()
            scope = trio.CancelScope(deadline=now + request.timeout_s)
            sequence = sequences_of(
                request,
                subject=arrival.subject,
                reply_subject=arrival.reply_subject,
                arrivals=self._arrivals,
                arrived_at=now,
                aging_s=serving.aging_s,
                scope=scope,
            )
            serving.door.admit(sequence)
        except WorkerError as error:
            self.refuse(arrival, error, request_id)
            return None
        logger.bind(request_id=request_id).debug(
            "Request admitted: model {}, priority {}, depth {}{}",
            serving.limits.model_name,
            request.priority,
            serving.door.admission.depth,
            "" if request.caller is None else f", caller {request.caller}",
        )
        return Admitted(sequence, scope, arrival.open_reply(request_id, is_admitted=True))

    def refuse(
        self, arrival: Arrival, error: WorkerError, request_id: RequestId | None = None
    ) -> None:
        """Answer a request that gets no task, with an id of its own if it has none."""
        request_id = request_id or self._draw_id()
        self._counters.answer(arrival.subject, error)
        self._counters.metrics.rejections.add(labels=(error.code.value,))
        logger.bind(request_id=request_id, outcome=error.code.value).debug(
            "Request refused: {}: {}", error.code, error.message
        )
        arrival.open_reply(request_id, is_admitted=False).fail(
            error, retry_after_ms=self._serving.door.admission.retry_after_ms()
        )

    def _draw_id(self) -> RequestId:
        return RequestId(f"{self._rng.getrandbits(128):032x}")
