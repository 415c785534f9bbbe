"""Taking durable jobs from their stream: one for each slot that is free, the most urgent first.

Rules:

1. It asks only while a slot is free that no request has been admitted to, and tells the server how
   busy this worker is, which serves the freest first.
2. It asks for one job at a time: level by level for what is there, and where nothing is, all
   levels at once for what comes. Then the inbox is left, and with it every pull that waits.
3. Nobody says that pulls are gone because the connection was; so each round ends by a clock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio
from loguru import logger
from trio_util import move_on_when, wait_any

from trio_worker.core.jobs import Rounds, free_slots, pull_priority
from trio_worker.core.priority import NAMES
from trio_worker.flow.door import DoorState
from trio_worker.flow.job import Job, JobsHeld, JobStreams, job_of
from trio_worker.flow.serving import Serving
from trio_worker.flow.troubles import Troubles
from trio_worker.jetstream import api, streams
from trio_worker.jetstream.api import Fault, JetStreamError, Json
from trio_worker.jetstream.client import JetStream, Pulls
from trio_worker.monitoring.counters import JobCounters
from trio_worker.ports import Message
from trio_worker.wire import subjects

OPEN_S = 10.0
"""How long pulls wait at the server."""
GRACE_S = 2.0
"""How much later than that its word about them may come."""
LOOK_S = 0.5
"""How often it is looked whether the connection was another one: the port has no event for it."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
"""Between two tries of what cannot be done, doubled from one to the other."""


async def run_jobs(
    requests: trio.Nursery,
    *,
    jetstream: JetStream,
    names: JobStreams,
    keep_results_s: int,
    ack_wait_s: float,
    serving: Serving,
    held: JobsHeld,
    do_job: Callable[[Job], Awaitable[None]],
    counters: JobCounters,
    troubles: Troubles,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take jobs until the door closes; each becomes a task in `requests`.

    Makes the streams and consumers if they are missing and the server lets it; what stands in the
    way is told to `troubles`, and tried again for ever: requests that come directly go on
    meanwhile. When it returns no pull is open, and what a pull has brought too late is given back.
    """
    seeking = _Seeking(
        requests,
        jetstream=jetstream,
        names=names,
        keep_results_s=keep_results_s,
        ack_wait_s=ack_wait_s,
        serving=serving,
        held=held,
        do_job=do_job,
        counters=counters,
        troubles=troubles,
    )
    task_status.started()
    async with move_on_when(serving.door.state.wait_value, DoorState.CLOSED):
        await seeking.run()
    logger.debug("No more jobs are taken")


class _Seeking:
    """Its state: which levels come first in the next round, and why the last one had to end."""

    def __init__(
        self,
        requests: trio.Nursery,
        *,
        jetstream: JetStream,
        names: JobStreams,
        keep_results_s: int,
        ack_wait_s: float,
        serving: Serving,
        held: JobsHeld,
        do_job: Callable[[Job], Awaitable[None]],
        counters: JobCounters,
        troubles: Troubles,
    ) -> None:
        self._requests = requests
        self._jetstream = jetstream
        self._names = names
        self._keep_results_s = keep_results_s
        self._ack_wait_s = ack_wait_s
        self._door = serving.door
        self._model = serving.limits.model_name
        self._held = held
        self._do_job = do_job
        self._counters = counters
        self._troubles = troubles
        self._rounds = Rounds()
        self._missing: str | None = None
        """What the server said is not there to pull from."""

    async def run(self) -> None:
        """Until cancelled."""
        if not subjects.can_be_in_one(self._model):
            self._troubles.note(
                "the model",
                f"the model's name {self._model!r} cannot be part of a subject, so there are no "
                "jobs for it: set worker.model_name",
            )
            await trio.sleep_forever()
        pause_s = SHORTEST_PAUSE_S
        while True:
            try:
                await self._prepare()
                pause_s = await self._take_jobs(pause_s)
            except JetStreamError as error:
                self._troubles.note("taking jobs", str(error))
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _take_jobs(self, pause_s: float) -> float:
        """Round after round, until there is nothing to pull from; returns the pause then due."""
        while True:
            await self._round()
            if self._missing is not None:
                self._troubles.note("taking jobs", self._missing)
                return pause_s
            pause_s = SHORTEST_PAUSE_S

    # --- room -----------------------------------------------------------------------------

    @property
    def _free(self) -> int:
        admission = self._door.admission
        if self._door.state.value is not DoorState.OPEN:
            return 0
        return free_slots(
            slots=admission.slots, in_flight=len(admission.in_flight), beside=self._held.beside
        )

    @property
    def _has(self) -> int:
        return len(self._door.admission.in_flight) + self._held.beside

    @property
    def _may_wait(self) -> bool:
        """Whether a job that comes now would be begun."""
        return self._missing is None and self._free > 0

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """A checkpoint, also where it is so already."""
        await trio.lowlevel.checkpoint()
        while not condition():
            await wait_any(self._door.changed.wait, self._held.changed.wait)

    # --- one round ------------------------------------------------------------------------

    async def _round(self) -> None:
        """Take what is there, as slots become free, and then one that comes, if one does in time.

        Cancelled: what has come by then is given back.
        """
        self._missing = None
        pulls: Pulls | None = None
        try:
            async with self._jetstream.open_pulls() as pulls:
                while await self._take_one(pulls):
                    pass
                if self._may_wait:
                    await self._wait_for_one(pulls)
        finally:
            for message in () if pulls is None else pulls.left:
                # What came while the interest was being withdrawn.
                self._begin(message)

    async def _take_one(self, pulls: Pulls) -> bool:
        """Once a slot is free, take a job that is there; False if there is none."""
        await self._wait_until(lambda: self._free > 0)
        for level in self._rounds.next():
            self._ask(pulls, level)
            with trio.move_on_after(GRACE_S) as silence:
                if self._take(await pulls.receive()):
                    return True
            if silence.cancelled_caught and self._jetstream.broker.statistics().connected:
                asked = api.next_message(self._names.jobs, self._consumer(level))
                self._troubles.note("taking jobs", str(api.no_answer(asked)))
            if not self._may_wait:
                break
        return False

    def _ask(self, pulls: Pulls, level: str, *, expires_s: float | None = None) -> None:
        priority = pull_priority(self._has)
        pulls.ask(self._names.jobs, self._consumer(level), priority=priority, expires_s=expires_s)

    def _consumer(self, level: str) -> str:
        return streams.consumer_name(level, self._model)

    async def _wait_for_one(self, pulls: Pulls) -> None:
        """Ask all levels, and take the first job that comes while a slot is free."""
        async with move_on_when(self._wait_until, lambda: self._free <= 0):
            reconnects, is_open = self._reconnects, len(NAMES)
            gives_up_at = trio.current_time() + OPEN_S + GRACE_S
            for level in NAMES:
                self._ask(pulls, level, expires_s=OPEN_S)
            while is_open and trio.current_time() < gives_up_at:
                with trio.move_on_after(LOOK_S):
                    said = await pulls.receive()
                    if self._take(said):
                        return
                    status = api.status_of(said)
                    is_open -= status is None or status.ends_the_pull
                if self._missing is not None or self._reconnects != reconnects:
                    return

    @property
    def _reconnects(self) -> int:
        return self._jetstream.broker.statistics().reconnects

    def _take(self, message: Message) -> bool:
        """Begin the message if it is a job; of a word that nothing is there `_missing` is kept."""
        status = api.status_of(message)
        if status is None or status.number == 404:
            self._troubles.clear("taking jobs")
        if status is None:
            self._begin(message)
        elif status.consumer_is_gone:
            self._missing = (
                f"the stream {self._names.jobs} or a consumer of it is not there"
                f" ({status.number} {status.text or 'no responders'}): it is made if the server"
                " lets this user; else make it, or start the server with JetStream"
            )
        elif not status.is_usual:
            logger.warning("A pull for jobs was refused: {} {}", status.number, status.text)
        return status is None

    def _begin(self, message: Message) -> None:
        """Start the job's task, or give it back where there is no slot for it."""
        job = job_of(self._jetstream.broker, message)
        if job is None:
            logger.warning("What came from {} is no job", self._names.jobs)
            return
        self._counters.count("redelivered" if job.is_redelivered else "taken", job.level)
        if self._free <= 0:
            self._counters.count("given back", job.level)
            job.give_back()
            return
        self._held.add(+1)
        self._requests.start_soon(self._do_job, job)

    # --- streams and consumers ------------------------------------------------------------

    async def _prepare(self) -> None:
        """See to the streams and consumers, as far as the server lets this user.

        Raises `JetStreamError` if one is there and unfit, or cannot be made.
        """
        names = self._names
        wanted = (
            streams.jobs_stream(names.jobs),
            streams.results_stream(names.results, keep_s=self._keep_results_s),
            streams.dead_stream(names.dead),
        )
        await self._as_permitted([partial(self._see_to_stream, config) for config in wanted])
        consumers = (
            streams.job_consumer(level, self._model, ack_wait_s=self._ack_wait_s) for level in NAMES
        )
        await self._as_permitted(
            [partial(self._jetstream.ensure_consumer, names.jobs, config) for config in consumers]
        )

    async def _see_to_stream(self, config: Json) -> None:
        found = (await self._jetstream.ensure_stream(config)).config
        for complaint in streams.complaints_about(found, config):
            logger.warning("{}", complaint)

    async def _as_permitted(self, steps: list[Callable[[], Awaitable[None]]]) -> None:
        """Take the steps; who may not take the first may not take the others."""
        for step in steps:
            try:
                await step()
            except JetStreamError as error:
                if error.fault is not Fault.NO_ANSWER:
                    raise
                logger.info("Streams and consumers are taken as they are: {}", error)
                return
