"""Where files and batches are kept: in a stream, of which every gateway reads the same.

A gateway itself holds nothing of them. What two change at a time is changed by the one that was
first, and the other one reads it again. Bounds: the stream's, `BYTES_MAX` and `keep_s`; and
`PART_BYTES` of a file are under way at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from trio_worker.gateway.batch_records import (
    TASKS,
    BatchRecord,
    FileRecord,
    Task,
    batch_subject,
    file_subject,
    part_subject,
    stream_config,
)
from trio_worker.jetstream.api import EXPECTED_LAST, NS, Fault, JetStreamError, Stored
from trio_worker.jetstream.client import JetStream
from trio_worker.wire import subjects

STREAM = "BATCHES"
CONSUMER = "batch-tasks"
KEEP_S = 30 * 86_400
"""As long as OpenAI keeps such files."""
BYTES_MAX = 2**30
PART_BYTES = 256 * 1024
TRIES = 3
CHANGES = 20
"""How often a change is tried again that somebody else came before."""
TASK_S = 30.0
"""A gateway that has not said for so long that it works on a task does not."""

_Record = TypeVar("_Record", FileRecord, BatchRecord)


class BatchStore:
    """Reads and writes; nothing of what it read is kept. All of it raises `JetStreamError`."""

    def __init__(self, jetstream: JetStream) -> None:
        self.jetstream = jetstream

    async def ensure(self) -> None:
        """Make the stream and its consumer where they are missing."""
        config = stream_config(STREAM, keep_s=KEEP_S, bytes_max=BYTES_MAX)
        await self.jetstream.ensure_stream(config)
        consumer = {
            "durable_name": CONSUMER,
            "filter_subject": TASKS,
            "ack_policy": "explicit",
            "ack_wait": round(TASK_S * NS),
            "max_deliver": -1,
        }
        await self.jetstream.ensure_consumer(STREAM, consumer)

    # --- files ------------------------------------------------------------------------------

    async def put_file(self, record: FileRecord, content: bytes) -> None:
        """Keep a file. It is there once all of it is: what was cut off in the middle is not."""
        await self._put_parts(record.id, _pieces(content))
        await self._put(record.subject, record)

    async def file(self, caller: str | None, file_id: str) -> FileRecord | None:
        found = await self._last(file_subject(caller, file_id))
        return None if found is None else msgspec.json.decode(found.body, type=FileRecord)

    async def files(self, caller: str | None) -> list[FileRecord]:
        return await self._all(file_subject(caller, "*"), FileRecord)

    async def content(self, owner: str, parts: int) -> AsyncIterator[bytes]:
        """The parts of a file, one after the other. Raises `JetStreamError` if one is missing."""
        for number in range(parts):
            found = await self._last(part_subject(owner, number))
            if found is None:
                raise JetStreamError(
                    Fault.OTHER, f"a part of {owner} is gone: it has been deleted meanwhile"
                )
            yield found.body

    async def delete_file(self, record: FileRecord) -> None:
        """Its name goes first, so that nobody finds a file without its parts."""
        for subject in (record.subject, part_subject(record.id, "*")):
            for each in await self._read(subject):
                try:
                    await self.jetstream.delete_message(STREAM, each.sequence)
                except JetStreamError as error:
                    # Somebody else deletes it, too.
                    if error.fault is not Fault.OTHER:
                        raise

    # --- batches ----------------------------------------------------------------------------

    async def begin(self, record: BatchRecord) -> bool:
        """Keep a new batch, and have a gateway begin it; false if there is one of its name."""
        try:
            await self._put(record.subject, record, last=0)
            is_new = True
        except JetStreamError as error:
            if error.fault is not Fault.WRONG_LAST:
                raise
            is_new = False
        # Also if it is not new: whoever kept it may have gone before it came to this.
        await self.ask_for(record.task())
        return is_new

    async def ask_for(self, task: Task) -> None:
        """Have one of the gateways do it; once, if it was asked for already."""
        try:
            await self._put(task.subject, task, last=0)
        except JetStreamError as error:
            if error.fault is not Fault.WRONG_LAST:
                raise

    async def batch(self, caller: str | None, batch_id: str) -> tuple[BatchRecord, int] | None:
        """A batch, with the number by which `change` knows whether it is still the same."""
        found = await self._last(batch_subject(caller, batch_id))
        if found is None:
            return None
        return msgspec.json.decode(found.body, type=BatchRecord), found.sequence

    async def batches(self, caller: str | None) -> list[BatchRecord]:
        return await self._all(batch_subject(caller, "*"), BatchRecord)

    async def change(
        self, record: BatchRecord, by: Callable[[BatchRecord], BatchRecord]
    ) -> BatchRecord:
        """The batch as `by` has changed it, from what it is now. One that is gone stays so."""
        for _ in range(CHANGES):
            found = await self.batch(record.caller, record.id)
            if found is None:
                return by(record)
            now, sequence = found
            changed = by(now)
            if changed == now or await self.replace(changed, sequence):
                return changed
        raise JetStreamError(Fault.BUSY, f"the batch {record.id} is changed all the time")

    async def replace(self, record: BatchRecord, sequence: int) -> bool:
        """Keep another version; false if somebody else has done so since it was read."""
        try:
            await self._put(record.subject, record, last=sequence)
        except JetStreamError as error:
            if error.fault is not Fault.WRONG_LAST:
                raise
            return False
        return True

    async def put_ids(self, batch_id: str, custom_ids: Sequence[str]) -> int:
        """Keep what the requests of a batch are called; returns in how many parts."""
        return await self._put_parts(batch_id, _id_parts(custom_ids))

    async def ids(self, record: BatchRecord) -> AsyncIterator[str]:
        """What its requests are called, in their order."""
        async for part in self.content(record.id, record.parts):
            for custom_id in msgspec.json.decode(part, type=list[str]):
                yield custom_id

    # --- messages ---------------------------------------------------------------------------

    async def _put(
        self, subject: str, value: FileRecord | BatchRecord | Task, *, last: int | None = None
    ) -> None:
        headers = {} if last is None else {EXPECTED_LAST: str(last)}
        body = msgspec.json.encode(value)
        await self.jetstream.publish(subject, body, headers, tries=1 if last else TRIES)

    async def _put_parts(self, owner: str, parts: Iterable[bytes]) -> int:
        count = 0
        for number, part in enumerate(parts):
            await self.jetstream.publish(part_subject(owner, number), part, tries=TRIES)
            count = number + 1
        return count

    async def _last(self, subject: str) -> Stored | None:
        return await self.jetstream.get_last(STREAM, subject)

    async def _all(self, subject: str, kind: type[_Record]) -> list[_Record]:
        return [msgspec.json.decode(each.body, type=kind) for each in await self._read(subject)]

    async def _read(self, subject: str) -> list[Stored]:
        found: list[Stored] = []
        sequence = 1
        while True:
            batch = await self.jetstream.read(STREAM, subject=subject, sequence=sequence)
            found += batch.messages
            if not batch.messages:
                return found
            sequence = batch.next_sequence


def parts_of(content: bytes) -> int:
    """In how many parts a file is kept."""
    return -(-len(content) // PART_BYTES)


def named(caller: str | None) -> str:
    """The caller in a record."""
    return caller or subjects.NOBODY


def _pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PART_BYTES):
        yield content[start : start + PART_BYTES]


def _id_parts(custom_ids: Sequence[str]) -> Iterator[bytes]:
    together: list[str] = []
    size = 0
    for custom_id in custom_ids:
        # No character takes more than six bytes of JSON, `\\u0000`.
        length = 6 * len(custom_id) + 3
        if together and size + length > PART_BYTES:
            yield msgspec.json.encode(together)
            together, size = [], 0
        together.append(custom_id)
        size += length
    if together:
        yield msgspec.json.encode(together)
