"""Percentiles and rates of what came of late."""

from __future__ import annotations

from trio_worker.monitoring.counters import Samples, Throughput


def test_percentiles_and_throughput() -> None:
    samples = Samples()
    assert samples.percentiles().p50 is None
    for value in range(100):
        samples.add(value)
    assert (samples.percentiles().p50, samples.percentiles().p99) == (50, 99)
    throughput = Throughput()
    for second in range(20):
        throughput.add(30, now=second)
    assert throughput.per_second(now=19.5) == 30
    assert throughput.per_second(now=100) == 0
