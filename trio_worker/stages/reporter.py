"""Says regularly how things are: one line in the log, one message on the statistics subject."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio
import trio_util
from loguru import logger

from trio_worker.errors import MessageTooLarge
from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.monitoring.snapshot import Snapshot
from trio_worker.ports import Broker, Message
from trio_worker.wire import subjects


async def run_reporter(
    *,
    broker: Broker,
    worker_id: str,
    snapshot: Callable[[], Snapshot],
    heartbeat: Heartbeat,
    interval_s: float,
) -> None:
    """Report every `interval_s` until cancelled; the log line only if something happened.

    The first report comes after one interval. A message is put into the outbox or left out as a
    whole; cancellation leaves nothing behind.
    """
    subject = subjects.stats(worker_id)
    reported: tuple[int, int] | None = None
    async for elapsed, _ in trio_util.periodic(interval_s):
        heartbeat.beat(trio.current_time())
        if elapsed == 0:
            continue
        now = snapshot()
        is_published = True
        try:
            broker.publish(Message(subject=subject, body=msgspec.json.encode(now)))
        except MessageTooLarge:
            is_published = False
        news = (now.requests.completed, now.tokens.generated)
        if news != reported or now.requests.in_flight:
            reported = news
            _log(now, is_published=is_published)


def _log(now: Snapshot, *, is_published: bool) -> None:
    logger.info(
        "{} completed, {} in flight, {} queued, {} in the batch, {:.1f} tokens/s, {:.0f} MB{}",
        now.requests.completed,
        now.requests.in_flight,
        now.queue.depth,
        now.batch.running,
        now.tokens.per_second,
        now.resources.memory_mb,
        "" if is_published else "; the snapshot is over the server's max_payload",
    )
