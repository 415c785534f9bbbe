"""The dashboard's stream of events: one sample a second for everybody who looks.

Server-sent events carry it: the history first, then how things are, each second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec
import trio
import trio_util
from loguru import logger

from trio_worker.http.exchange import Exchange
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.snapshot import Snapshot

SAMPLE_S = 1.0
"""From one event of the page's stream to the next."""
HISTORY = 180
"""Samples that a new stream begins with: three minutes."""
IN_FLIGHT_SHOWN = 50
FLEET_SHOWN = 100
STREAMS_MAX = 8
"""Event streams at a time; the other connections stay free for probes."""
STREAM_S = 45.0
"""A stream ends by itself before its connection is cut; the page opens the next one."""


class EventFeed:
    """What the streams carry: sampled once for all of them, and a short history."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._streams = 0
        self._sampled = trio_util.RepeatedEvent()
        self._samples: deque[Mapping[str, float | None]] = deque(maxlen=HISTORY)
        self._event = b""
        self._is_broken = False

    @property
    def is_full(self) -> bool:
        """Whether another stream would be one too many."""
        return self._streams >= STREAMS_MAX

    async def run(self) -> None:
        """Sample every `SAMPLE_S` until cancelled."""
        async for _ in trio_util.periodic(SAMPLE_S):
            try:
                self.sample()
            except Exception as error:  # noqa: BLE001 - what is shown must not stop what it shows
                if not self._is_broken:
                    logger.opt(exception=error).error("sampling for the dashboard failed")
                self._is_broken = True
            else:
                self._is_broken = False

    def sample(self) -> None:
        """Add to the history, and wake the streams."""
        snapshot = self._observed.snapshot()
        self._samples.append(_sample_of(snapshot))
        self._event = self._state(snapshot) if self._streams else b""
        self._sampled.set()

    async def wait_sampled(self) -> None:
        """Return at the next sample; one that came before the call is not waited for again."""
        await self._sampled.wait()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A stream is open meanwhile."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def history(self) -> bytes:
        """The event that a stream begins with."""
        samples = msgspec.json.encode({"now": trio.current_time(), "samples": [*self._samples]})
        return b"retry: 1000\nevent: history\ndata: " + samples + b"\n\n"

    def event(self) -> bytes:
        """How things are; never older than the last sample."""
        return self._event or self._state(self._observed.snapshot())

    def _state(self, snapshot: Snapshot) -> bytes:
        state = msgspec.json.encode(
            {
                "now": trio.current_time(),
                "live": self._observed.liveness(),
                "ready": self._observed.readiness(),
                "snapshot": snapshot,
                "in_flight": self._observed.in_flight(IN_FLIGHT_SHOWN),
                "fleet": self._observed.fleet()[:FLEET_SHOWN],
                "sample": _sample_of(snapshot),
            }
        )
        return b"event: state\ndata: " + state + b"\n\n"


def _sample_of(snapshot: Snapshot) -> Mapping[str, float | None]:
    """One point of each of the page's charts."""
    requests = snapshot.requests
    return {
        "at": trio.current_time(),
        "tokens_per_second": snapshot.tokens.per_second,
        "running": snapshot.batch.running,
        "depth": snapshot.queue.depth,
        "first_p50": requests.time_to_first_token_ms.p50,
        "first_p95": requests.time_to_first_token_ms.p95,
        "gap_p50": requests.inter_token_ms.p50,
        "gap_p95": requests.inter_token_ms.p95,
        "memory_mb": snapshot.resources.memory_mb,
    }


async def tell_events(feed: EventFeed, exchange: Exchange, headers: Mapping[str, str]) -> None:
    """Answer with server-sent events until `STREAM_S` have passed.

    One event at most is under way to a client: the next one is taken when it has been sent.
    """
    exchange.begin(
        200,
        {
            **headers,
            "Content-Type": "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",
        },
    )
    if exchange.request.method == "HEAD":
        return
    with feed.watched(), trio.move_on_after(STREAM_S):
        await exchange.send(feed.history() + feed.event())
        while True:
            await feed.wait_sampled()
            await exchange.send(feed.event())
