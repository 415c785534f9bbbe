"""Counts and samples, written where things happen and read by the statistics; never awaited.

What `monitoring/metrics.py` counts already is not counted here again: the snapshot reads it there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from trio_worker.errors import WorkerError
from trio_worker.monitoring.metrics import JOB_EVENTS, HistogramMetric, Metrics
from trio_worker.monitoring.snapshot import Percentiles
from trio_worker.protocol.turn import EngineMemory

WINDOW_S = 10.0


class Samples:
    """The last 1024 values of something."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=1024)

    def add(self, value: float, count: int = 1) -> None:
        self._values.extend((value,) * count)

    def percentiles(self) -> Percentiles:
        """Nearest rank."""
        ordered = sorted(self._values)

        def rank(share: float) -> float | None:
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None

        return Percentiles(p50=rank(0.50), p95=rank(0.95), p99=rank(0.99))


class Latency:
    """One kind of waiting, kept for both who ask: the latest values, and the histogram of all."""

    def __init__(self, histogram: HistogramMetric) -> None:
        self._histogram = histogram
        self._latest_ms = Samples()

    def observe(self, seconds: float, *labels: str, count: int = 1) -> None:
        """It has taken `seconds`, `count` times; `labels` are the histogram's."""
        self._latest_ms.add(1000 * seconds, count)
        self._histogram.observe(seconds, labels, count)

    def percentiles_ms(self) -> Percentiles:
        """Of the last 1024 values, in milliseconds."""
        return self._latest_ms.percentiles()


class Throughput:
    """Events per second over the last `WINDOW_S`, in buckets of a second."""

    def __init__(self) -> None:
        self._buckets: deque[list[float]] = deque(maxlen=int(WINDOW_S) + 1)

    def add(self, count: int, *, now: float) -> None:
        second = float(int(now))
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1][1] += count
        else:
            self._buckets.append([second, count])

    def per_second(self, *, now: float) -> float:
        return sum(count for second, count in self._buckets if second > now - WINDOW_S) / WINDOW_S


class SubjectCounters:
    """What became of the requests that came in on one subject."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        """Of those answered."""
        self.processing_s = 0.0
        """From arrival to the terminal message, summed up."""
        self.last_error = ""


class RequestCounters:
    """What became of the requests, and all that is exported."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.by_subject: defaultdict[str, SubjectCounters] = defaultdict(SubjectCounters)
        """Bound: the subjects that are subscribed to."""
        self.by_outcome: Counter[str] = Counter()
        """`ok` or the error's code."""
        self.dropped = 0
        self.queue_wait = Latency(self.metrics.queue_wait)
        self.time_to_first_token = Latency(self.metrics.time_to_first_token)
        self.inter_token = Latency(self.metrics.inter_token)
        self.request = Latency(self.metrics.request_seconds)
        self.cancel = Latency(self.metrics.cancel_latency)
        """From the end of a request before its answer's end to its slot being free."""
        self.throughput = Throughput()

    def answer(self, subject: str, error: WorkerError | None, *, after_s: float = 0.0) -> None:
        """A request that came in on `subject` has got its terminal message."""
        self.by_outcome[error.code if error is not None else "ok"] += 1
        of_subject = self.by_subject[subject]
        of_subject.answered += 1
        of_subject.processing_s += after_s
        if error is not None:
            of_subject.failed += 1
            of_subject.last_error = f"{error.number}:{error.code}"


class JobCounters:
    """What became of the durable jobs that were given to this worker, by level."""

    def __init__(self, metrics: Metrics) -> None:
        self._metric = metrics.jobs

    def count(self, what: str, level: str) -> None:
        """`what` is one of `JOB_EVENTS`."""
        assert what in JOB_EVENTS, what
        self._metric.add(labels=(what, level))

    def total(self, what: str) -> int:
        """Over all levels."""
        return sum(count for (event, _), count in self._metric.values.items() if event == what)


class BatchCounters:
    """What the batcher did."""

    def __init__(self) -> None:
        self.turns = 0
        self.decode_turns = 0
        self.decoded = 0
        self.max_batch_seen = 0
        self.last_formation_ms = 0.0
        self.by_trigger: Counter[str] = Counter()
        self.engine_memory = EngineMemory(active=0, cache=0)
        """As of the last turn."""
