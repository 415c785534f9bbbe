"""One durable job's own task: from its delivery to the stored answer, or back into the stream.

A job is answered once, however often it is delivered: its answer is stored only where there is
none, and before anything is computed it is looked up whether there is one. While it is in hand the
stream hears of it three times in the time after which it would give it to somebody else. Whatever
ends this task, the stream is told: it is acknowledged when its answer is stored, else it goes back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio
from loguru import logger
from trio_util import move_on_when

from trio_worker.core import jobs
from trio_worker.errors import InternalError, MessageTooLarge, PayloadTooLarge
from trio_worker.flow.door import DoorState
from trio_worker.flow.job import Job, JobsHeld, JobStreams, Replies
from trio_worker.flow.kept_reply import KeptReply
from trio_worker.flow.reception import Arrival, Reception, Respond
from trio_worker.flow.serving import Serving
from trio_worker.flow.troubles import Troubles
from trio_worker.jetstream import api
from trio_worker.jetstream.api import Fault, JetStreamError
from trio_worker.jetstream.client import JetStream
from trio_worker.monitoring.counters import JobCounters
from trio_worker.wire import subjects
from trio_worker.wire.native import Fields
from trio_worker.wire.native.faults import streamed_job

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
"""Between two tries of what the stream refuses, doubled from one to the other."""
LAST_TRY_S = 2.0
"""For storing an answer that is there when the worker must end."""
PUBLISH_TRIES = 3

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMeans:
    """What the tasks of all jobs of a worker share."""

    jetstream: JetStream
    streams: JobStreams
    serving: Serving
    reception: Reception
    respond: Respond
    held: JobsHeld
    counters: JobCounters
    troubles: Troubles
    worker_id: str
    max_deliver: int
    ack_wait_s: float


async def do_job(job: Job, means: JobMeans) -> None:
    """Return when the job is answered, given back or given up; `means.held` counts it meanwhile.

    Cancelled, as at the end of a drain: an answer that is there is stored, in at most
    `LAST_TRY_S`; without one the job goes back at once.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say_progress, job, means.ack_wait_s / 3)
            await _Doing(job, means).run()
            nursery.cancel_scope.cancel(reason="the job is settled")
    finally:
        if not job.is_settled:
            job.give_back()
            means.counters.count("given back", job.level)
        means.held.add(-1)


async def _say_progress(job: Job, every_s: float) -> None:
    while True:
        await trio.sleep(every_s)
        job.progress()


class _Doing:
    """What becomes of one job. Its state: the answer to it."""

    def __init__(self, job: Job, means: JobMeans) -> None:
        self._job = job
        self._means = means
        self._replies: Replies = []
        self._arrival: Arrival = job.arrival(self._replies, means.worker_id)

    async def run(self) -> None:
        """Until the stream has been told."""
        means, job = self._means, self._job
        fields = means.reception.read(self._arrival)
        if fields is not None:
            job.take_id(fields)
        with logger.contextualize(request_id=job.request_id):
            until = trio.current_time() + means.ack_wait_s
            while not job.is_settled:
                if await self._is_over():
                    return
                if fields is not None:
                    await self._try(fields)
                await self._conclude(until)

    async def _is_over(self) -> bool:
        """Whether it must not be tried: it has been answered, or too often been tried in vain.

        Also where the worker begins to drain before that is known: then the job goes back.
        """
        means, job = self._means, self._job
        is_answered = await self._unless_closing(self._look_up)
        if is_answered is None:
            return True
        if is_answered:
            means.counters.count("found answered", job.level)
            job.acknowledge()
        elif job.tried >= means.max_deliver:
            await self._bury()
        return job.is_settled

    async def _unless_closing(self, look_up: Callable[[], Awaitable[bool]]) -> bool | None:
        found: bool | None = None
        async with move_on_when(self._means.serving.door.state.wait_value, DoorState.CLOSED):
            found = await self._persist("results", look_up)
        return found  # noqa: RET504 - None where the wait was cut short

    async def _look_up(self) -> bool:
        means = self._means
        subject = subjects.result(self._job.request_id)
        return await means.jetstream.get_last(means.streams.results, subject) is not None

    async def _try(self, fields: Fields) -> None:
        """Have it computed, if there is a place; its reply says what came of it."""
        means = self._means
        self._replies.clear()
        if fields.get("stream"):
            means.reception.refuse(self._arrival, streamed_job(), self._job.request_id)
            return
        admitted = means.reception.admit(self._arrival, self._as_job(fields))
        if admitted is None:
            return
        means.held.add(-1)
        try:
            await means.respond(*admitted)
        finally:
            means.held.add(+1)

    def _as_job(self, fields: Fields) -> Fields:
        """What the subject says counts; what is not said is the same at every delivery."""
        longest_ms = self._means.serving.limits.timeout_limit_ms
        return {
            "seed": jobs.seed_of(self._job.request_id),
            "timeout_ms": longest_ms,
            **fields,
            "request_id": self._job.request_id,
            "priority": self._job.level,
        }

    async def _conclude(self, until: float) -> None:
        """Store the answer, or give the job back, or wait for a better moment."""
        job, means = self._job, self._means
        reply = self._replies[-1]
        error = reply.error
        delay_s = (reply.retry_after_ms or 0) / 1000
        if error is not None and jobs.is_for_later(error):
            await self._wait_for_room(until, delay_s)
        elif error is not None and jobs.is_no_answer(error):
            means.counters.count("given back", job.level)
            # Of a fault of ours it is as well to have a pause; another worker may go on at once.
            job.give_back(delay_s if isinstance(error, InternalError) else 0.0)
        else:
            is_ours = await self._store(reply)
            means.counters.count("answered" if is_ours else "found answered", job.level)
            job.acknowledge()

    async def _wait_for_room(self, until: float, delay_s: float) -> None:
        """This worker cannot take it now; return when it is to be tried again, or has gone back.

        Giving it back counts as a delivery, of which it has few: so it stays for a while, and
        goes only if it has one to spare.
        """
        job, means = self._job, self._means
        closing = means.serving.door.state
        if trio.current_time() >= until and job.tried + 1 < means.max_deliver:
            means.counters.count("given back", job.level)
            job.give_back(delay_s)
            return
        with trio.move_on_after(max(delay_s, SHORTEST_PAUSE_S)):
            await closing.wait_value(DoorState.CLOSED)
            means.counters.count("given back", job.level)
            job.give_back()

    # --- storing --------------------------------------------------------------------------

    async def _store(self, reply: KeptReply) -> bool:
        """Return when there is an answer; False if it is somebody else's."""
        try:
            return await self._persist("results", lambda: self._store_once(reply))
        except trio.Cancelled:
            is_stored = False
            with trio.move_on_after(LAST_TRY_S, shield=True):
                try:
                    await self._store_once(reply)
                    is_stored = True
                except JetStreamError as error:
                    logger.warning("the answer of a job could not be stored: {}", error)
            if is_stored:
                self._job.acknowledge()
            raise

    async def _store_once(self, reply: KeptReply) -> bool:
        try:
            return await self._publish_result(reply)
        except JetStreamError as error:
            if error.fault is not Fault.TOO_LARGE or isinstance(reply.error, PayloadTooLarge):
                raise
            short = self._failed(PayloadTooLarge(f"the answer cannot be stored: {error}"))
        return await self._publish_result(short)

    async def _publish_result(self, reply: KeptReply) -> bool:
        subject = subjects.result(self._job.request_id)
        headers = reply.headers | {api.EXPECTED_LAST: "0"}
        try:
            await self._means.jetstream.publish(subject, reply.body, headers, tries=PUBLISH_TRIES)
        except MessageTooLarge as error:
            # The server takes less than when the answer was begun.
            raise JetStreamError(Fault.TOO_LARGE, str(error)) from error
        except JetStreamError as error:
            if error.fault is not Fault.WRONG_LAST:
                raise
            return False
        return True

    def _failed(self, error: InternalError | PayloadTooLarge) -> KeptReply:
        """The answer of a job that has this for an answer."""
        self._arrival.open_reply(self._job.request_id, is_admitted=False).fail(error)
        return self._replies[-1]

    async def _bury(self) -> None:
        """Put it among the dead, with the reason, and say so to who waits for its answer."""
        job, means = self._job, self._means
        reason = (
            f"delivered {job.tried} times without an answer: whoever did it died or gave it back"
        )
        error = InternalError(reason, details={"deliveries": job.tried}, retryable=False)
        await self._persist("dead letters", lambda: self._bury_once(reason))
        await self._store(self._failed(error))
        logger.error("A job is given up: {}", reason)
        means.counters.count("dead", job.level)
        job.end(reason)

    async def _bury_once(self, reason: str) -> None:
        job, jetstream = self._job, self._means.jetstream
        subject, headers = subjects.dead(job.message.subject), job.headers_when_dead(reason)
        body = job.message.body
        while True:
            try:
                await jetstream.publish(subject, body, headers, tries=PUBLISH_TRIES)
            except MessageTooLarge:
                if not body:
                    raise
                # With what is said of it, it is more than the server takes.
                headers["Dead-Omitted"] = f"a body of {len(body)} bytes"
                body = b""
            else:
                return

    async def _persist(self, place: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """What `attempt` returns once JetStream lets it; what stands in the way is said."""
        troubles, pause_s = self._means.troubles, SHORTEST_PAUSE_S
        while True:
            try:
                result = await attempt()
            except JetStreamError as error:
                troubles.note(place, str(error))
            else:
                troubles.clear(place)
                return result
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
