"""The jobs of a file on their way into the queue, and their answers on the way back.

What is where is read off the streams, and nothing of it is kept anywhere else: a job is answered,
or waits or runs, or is not there. So whoever goes on with a file that was begun puts in what is
missing, and nothing twice. Bounds: `PUBLISHES` receipts are waited for at a time; of answers, no
more are read at a time than `LOOK_AT`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice

import trio

from trio_worker.exception_groups import sole_exceptions
from trio_worker.gateway.batch_jobs import Job
from trio_worker.jetstream.api import MESSAGE_ID, TIME_TO_LIVE, Fault, JetStreamError, Stored
from trio_worker.jetstream.client import JetStream
from trio_worker.ports import Message
from trio_worker.wire import subjects

PUBLISHES = 64
TRIES = 3
"""Of a publish without a receipt; its id keeps it from being stored twice."""
FULL_S = 2.0
"""Nobody tells when a full queue has room, so it is tried again."""
LOOK_AT = 60
"""Together no more than a subscription holds, also if each is as large as a message can be."""
LOOK_EVERY_S = 15.0
"""An answer that was said while nobody could hear is found this much later."""
LEAVE_S = 1.0

_TRY_AGAIN = {Fault.FULL, Fault.NO_STORAGE, Fault.BUSY}


@dataclass(frozen=True, slots=True)
class Streams:
    """Their names."""

    jobs: str
    results: str


@dataclass(slots=True)
class Submission:
    """What has become of a file's jobs so far."""

    total: int
    stored: int = 0
    """Put into the queue now."""
    were_there: int = 0
    """Found waiting, running or answered."""
    is_held_up: bool = False
    """The queue is full, and it is tried again."""

    @property
    def done(self) -> int:
        return self.stored + self.were_there


async def waiting_jobs(
    jetstream: JetStream, stream: str, jobs_subjects: Iterable[str]
) -> dict[str, int] | None:
    """The ids of the jobs on these subjects that wait or run, with their places in the stream.

    None where they cannot be seen: who may read the queue may read what others ask, so not
    everybody may. Raises `JetStreamError`.
    """
    found: dict[str, int] = {}
    for subject in sorted(set(jobs_subjects)):
        sequence = 1
        while True:
            try:
                batch = await jetstream.read(
                    stream, subject=subject, sequence=sequence, messages=LOOK_AT
                )
            except JetStreamError as error:
                if error.fault not in (Fault.NO_ANSWER, Fault.NOBODY):
                    raise
                return None
            for each in batch.messages:
                if (request_id := each.headers.get(MESSAGE_ID)) is not None:
                    found[request_id] = each.sequence
            if not batch.messages:
                break
            sequence = batch.next_sequence
    return found


async def answers_to(
    jetstream: JetStream, stream: str, request_ids: Sequence[str]
) -> dict[str, Stored]:
    """The answers there are to these jobs, `LOOK_AT` at most, by id. Raises `JetStreamError`."""
    assert len(request_ids) <= LOOK_AT
    found = await jetstream.last_of(stream, [subjects.result(each) for each in request_ids])
    return {subject.rpartition(".")[2]: each for subject, each in found.items()}


def slices(request_ids: Iterable[str]) -> Iterator[list[str]]:
    """Together no more than are looked at together."""
    rest = iter(request_ids)
    while some := list(islice(rest, LOOK_AT)):
        yield some


async def submit(
    jetstream: JetStream,
    streams: Streams,
    jobs: Sequence[Job],
    *,
    expires_s: int | None = None,
    on_progress: Callable[[Submission], None] = lambda _: None,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Submission:
    """Put jobs into the queue that are not there and not answered; returns when all are.

    While the queue is full it waits for room. Where the queue cannot be seen, a job that was put
    into it more than `DUPLICATES_S` ago and waits still is put there once more; it is answered once
    all the same. `expires_s` is how long a job may wait to be done.
    Raises `JetStreamError` for what waiting does not mend. Cancelled, or stopped by `may_go_on`:
    what is in stays in, and the next `submit` of the same jobs goes on there.
    """
    submission = Submission(total=len(jobs))
    # In this order: a job that leaves the queue meanwhile has been answered before.
    waiting = await waiting_jobs(jetstream, streams.jobs, (job.subject for job in jobs))
    there = set(waiting or ())
    for some in slices(job.request_id for job in jobs):
        there.update(await answers_to(jetstream, streams.results, some))
    missing = [job for job in jobs if job.request_id not in there]
    submission.were_there = len(jobs) - len(missing)
    on_progress(submission)
    headers = {} if expires_s is None else {TIME_TO_LIVE: str(max(1, expires_s))}
    rest = iter(missing)

    async def publish_some() -> None:
        for job in rest:
            while may_go_on():
                if await _is_published(jetstream, job, headers):
                    submission.stored += 1
                    submission.is_held_up = False
                    on_progress(submission)
                    break
                submission.is_held_up = True
                on_progress(submission)
                await trio.sleep(FULL_S)

    with sole_exceptions():
        async with trio.open_nursery() as nursery:
            for _ in range(min(PUBLISHES, len(missing))):
                nursery.start_soon(publish_some)
    return submission


async def _is_published(jetstream: JetStream, job: Job, headers: Mapping[str, str]) -> bool:
    """False if there is no room for it now."""
    said = {**headers, MESSAGE_ID: job.request_id}
    try:
        await jetstream.publish(job.subject, job.body, said, tries=TRIES)
    except JetStreamError as error:
        if error.fault not in _TRY_AGAIN:
            raise
        return False
    return True


class Collector:
    """Hears the answers to jobs. Its state: which are still to come, and which were heard of."""

    def __init__(self, jetstream: JetStream, stream: str, request_ids: Iterable[str]) -> None:
        self._jetstream = jetstream
        self._stream = stream
        self.pending = dict.fromkeys(request_ids)
        """In the order of the file."""
        self._heard: dict[str, None] = {}
        self._look_at = slices(list(self.pending))
        self._wake = trio.Event()

    def take(self, message: Message) -> None:
        """The sink of all answers: those to other jobs are passed over."""
        request_id = message.subject.rpartition(".")[2]
        if request_id in self.pending:
            self._heard[request_id] = None
            self._wake.set()

    async def more(self) -> dict[str, Stored]:
        """Answers that were not returned before, by id, one at least; empty if none is to come.

        Raises `JetStreamError`. Cancelled: nothing is lost.
        """
        while self.pending:
            some = await self._to_look_at()
            found = await answers_to(self._jetstream, self._stream, some)
            for request_id in found:
                del self.pending[request_id]
            if found:
                return found
        return {}

    async def look_over(self) -> dict[str, Stored]:
        """As `more`, of what is there now; empty if that is all."""
        for some in self._look_at:
            found = await answers_to(self._jetstream, self._stream, some)
            for request_id in found:
                del self.pending[request_id]
            if found:
                return found
        return {}

    async def _to_look_at(self) -> list[str]:
        """Of those that are to come, some that may have come; waits until there are any."""
        while True:
            if some := next(self._look_at, None):
                heard = self._unless_found(some)
            else:
                await self._wait_heard()
                some = list(islice(self._heard, LOOK_AT))
                heard = self._unless_found(some)
            for request_id in some:
                self._heard.pop(request_id, None)
            if heard:
                return heard

    def _unless_found(self, request_ids: Iterable[str]) -> list[str]:
        return [each for each in request_ids if each in self.pending]

    async def _wait_heard(self) -> None:
        """Return when one was heard of; after `LOOK_EVERY_S` all are to be looked at again."""
        if not self._heard:
            self._wake = trio.Event()
            with trio.move_on_after(LOOK_EVERY_S) as patience:
                await self._wake.wait()
            if patience.cancelled_caught:
                self._look_at = slices(list(self.pending))


@asynccontextmanager
async def open_collector(
    jetstream: JetStream, stream: str, request_ids: Iterable[str]
) -> AsyncIterator[Collector]:
    """Listens for answers while the block runs. Raises `ConfigError` if the server forbids it."""
    collector = Collector(jetstream, stream, request_ids)
    subscription = await jetstream.broker.subscribe(subjects.answer("*"), collector.take)
    try:
        yield collector
    finally:
        with trio.move_on_after(LEAVE_S, shield=True):
            await subscription.drain()
