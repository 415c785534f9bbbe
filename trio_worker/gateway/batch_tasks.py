"""What gateways do for batches: put the requests of their files into the queue, and take them out.

Each such task is a message that one gateway at a time has. It says that it works on it as long as
it lives; after `TASK_S` without that word another one is given the message, and goes on where the
streams say that the first one was. So a gateway may go at any moment, and nothing has to be kept in
it. Bound: `TASKS_MAX` of them at a time on a gateway, each with its file in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
import trio
from loguru import logger
from msgspec.structs import replace

from trio_worker.exception_groups import sole_exceptions
from trio_worker.gateway.batch_jobs import Job, Terms, jobs_of
from trio_worker.gateway.batch_queue import Streams, submit, waiting_jobs
from trio_worker.gateway.batch_records import BatchRecord, Fault, Task
from trio_worker.gateway.batch_store import CONSUMER, STREAM, TASK_S, BatchStore
from trio_worker.gateway.fields import Rules
from trio_worker.gateway.keys import Key
from trio_worker.gateway.models import Limits
from trio_worker.jetstream.api import ACK, PROGRESS, JetStreamError, delivery_of, nak, status_of
from trio_worker.jetstream.api import Fault as JetStreamFault
from trio_worker.jetstream.client import Pulls
from trio_worker.ports import Message
from trio_worker.wire import subjects
from trio_worker.wire.batch_file import BadLine

TASKS_MAX = 4
PULL_S = 30.0
PULL_SLACK_S = 2.0
"""So much later a pull whose end was not heard of is over."""
AGAIN_S = 5.0
"""What was not to be had is asked for again, and how often a batch is looked at for a cancel."""
DELIVERIES_MAX = 20
"""A task that was begun so often fails its batch."""
FAULTS_MAX = 100
"""Lines of a file that a batch says are wrong."""
LINES_AT_ONCE = 8
"""Read between one turn of others and the next."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTasks:
    """Does what is asked for; its tasks are those of `keep`."""

    store: BatchStore
    streams: Streams
    rules: Rules
    limits_of: Callable[[str | None], Limits]
    now: Callable[[], float]
    """Seconds since 1970."""

    async def keep(self) -> None:
        """Do tasks until cancelled. What is under way then is given back."""
        await self._ensure()
        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                for _ in range(TASKS_MAX):
                    nursery.start_soon(self._keep_one)

    async def _ensure(self) -> None:
        await self._once_possible(self.store.ensure, "Batches are not to be had: {}")

    async def _once_possible(self, attempt: Callable[[], Awaitable[_T]], complaint: str) -> _T:
        """What `attempt` returns once JetStream lets it; each obstacle is complained of once."""
        said = None
        while True:
            try:
                return await attempt()
            except JetStreamError as error:
                if str(error) != said:
                    logger.warning(complaint, error)
                said = str(error)
            await trio.sleep(AGAIN_S)

    async def _keep_one(self) -> None:
        while True:
            async with self.store.jetstream.open_pulls() as pulls:
                await self._pull(pulls)
            for message in pulls.left:
                self._reply(message, nak())

    async def _pull(self, pulls: Pulls) -> None:
        """Do tasks until a pull was not answered."""
        while (message := await self._next(pulls)) is not None:
            status = status_of(message)
            if status is None:
                await self._do(message)
            elif not status.is_usual:
                await trio.sleep(AGAIN_S)
                await self._ensure()

    async def _next(self, pulls: Pulls) -> Message | None:
        """A task, or what has become of the pull for one; None if nothing was heard of it."""
        pulls.ask(STREAM, CONSUMER, priority=0, expires_s=PULL_S)
        with trio.move_on_after(PULL_S + PULL_SLACK_S):
            return await pulls.receive()
        return None

    # --- one task ---------------------------------------------------------------------------

    async def _do(self, message: Message) -> None:
        """Acknowledges it when it is done; otherwise it comes again, here or elsewhere."""
        reply = nak()
        try:
            with sole_exceptions():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._say_it_is_worked_on, message)
                    reply = ACK if await self._is_done(message) else nak(AGAIN_S)
                    nursery.cancel_scope.cancel(reason="done")
        finally:
            self._reply(message, reply)

    async def _is_done(self, message: Message) -> bool:
        """Tries until nothing stands in the way; false if it is for later."""
        return await self._once_possible(partial(self._try, message), "A batch waits: {}")

    async def _say_it_is_worked_on(self, message: Message) -> None:
        while True:
            await trio.sleep(TASK_S / 3)
            self._reply(message, PROGRESS)

    def _reply(self, message: Message, body: bytes) -> None:
        if message.reply is not None:
            self.store.jetstream.broker.publish(Message(subject=message.reply, body=body))

    async def _try(self, message: Message) -> bool:
        task = msgspec.json.decode(message.body, type=Task)
        found = await self.store.batch(task.caller, task.batch)
        if found is None:
            return True
        record = found[0]
        delivery = delivery_of(message.reply)
        if task.what == "begin":
            if delivery is not None and delivery.delivered > DELIVERIES_MAX:
                what = f"it was begun {DELIVERIES_MAX} times without coming to an end"
                await self._fail(record, [Fault(code="server_error", message=what)])
                return True
            return await self._begin(record)
        return await self._cancel(record)

    async def _begin(self, record: BatchRecord) -> bool:
        is_late = int(self.now()) >= record.expires_at
        if record.submitted_at is not None or record.is_over or is_late:
            return True
        jobs = await self._jobs(record)
        if jobs is None:
            return True
        if record.cancelling_at is None:
            await self._submit(record, jobs)
        await self.store.change(record, lambda now: replace(now, submitted_at=int(self.now())))
        return True

    async def _submit(self, record: BatchRecord, jobs: Sequence[Job]) -> None:
        is_cancelled = False

        async def look_for_a_cancel() -> None:
            nonlocal is_cancelled
            while not is_cancelled:
                await trio.sleep(AGAIN_S)
                found = await self.store.batch(record.caller, record.id)
                is_over = int(self.now()) >= record.expires_at
                is_cancelled = found is None or found[0].cancelling_at is not None or is_over

        with sole_exceptions():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look_for_a_cancel)
                await submit(
                    self.store.jetstream,
                    self.streams,
                    jobs,
                    expires_s=record.expires_at - int(self.now()),
                    may_go_on=lambda: not is_cancelled,
                )
                nursery.cancel_scope.cancel(reason="submitted")

    async def _jobs(self, record: BatchRecord) -> list[Job] | None:
        """The batch's jobs; None if its file is wrong, and it has failed."""
        file = await self.store.file(record.caller, record.input_file_id)
        if file is None:
            what = f"the file {record.input_file_id} has been deleted"
            await self._fail(record, [Fault(code="file_not_found", message=what)])
            return None
        parts = [part async for part in self.store.content(file.id, file.parts)]
        jobs: list[Job] = []
        faults: list[Fault] = []
        lines = jobs_of(
            b"".join(parts), self._terms(record), batch_id=record.id, url=record.endpoint
        )
        for number, each in enumerate(lines):
            if isinstance(each, Job):
                jobs.append(each)
            elif len(faults) < FAULTS_MAX:
                faults.append(_fault_of(each))
            if number % LINES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if not jobs and not faults:
            faults = [Fault(code="empty_file", message="there is no request in the file")]
        if faults:
            await self._fail(record, faults)
            return None
        parts_kept = await self.store.put_ids(record.id, [job.custom_id for job in jobs])
        total = len(jobs)
        await self.store.change(
            record,
            lambda now: replace(
                now,
                total=total,
                parts=parts_kept,
                in_progress_at=now.in_progress_at or int(self.now()),
            ),
        )
        return jobs

    def _terms(self, record: BatchRecord) -> Terms:
        caller = None if record.caller == subjects.NOBODY else record.caller
        return Terms(
            key=Key(caller=caller, most_urgent=record.most_urgent),
            rules=self.rules,
            priority=record.priority,
            limits_of=self.limits_of,
            message_bytes=self.store.jetstream.broker.max_payload,
        )

    async def _fail(self, record: BatchRecord, faults: Sequence[Fault]) -> None:
        logger.info("Batch {} has failed: {}", record.id, faults[0].message)
        second = int(self.now())
        await self.store.change(
            record, lambda now: replace(now, failed_at=second, errors=tuple(faults))
        )

    async def _cancel(self, record: BatchRecord) -> bool:
        """Take out what waits. What runs is finished, and is answered."""
        if record.is_over:
            return True
        if record.submitted_at is None:
            # Whoever puts it in has to have stopped.
            return False
        waiting = await waiting_jobs(
            self.store.jetstream,
            self.streams.jobs,
            [subjects.JOBS],
        )
        for request_id, sequence in (waiting or {}).items():
            if request_id.rpartition("-")[0] == record.id:
                await self._take_out(sequence)
        await self.store.change(record, lambda now: replace(now, cancelled_at=int(self.now())))
        return True

    async def _take_out(self, sequence: int) -> None:
        try:
            await self.store.jetstream.delete_message(self.streams.jobs, sequence)
        except JetStreamError as error:
            # It has been answered, and is not there any more.
            if error.fault is not JetStreamFault.OTHER:
                raise


def _fault_of(line: BadLine) -> Fault:
    return Fault(code="invalid_request", message=line.message, line=line.line, param=line.where)
