"""Every part of `trio-worker bench`, by its name."""

from __future__ import annotations

from collections.abc import Mapping

from trio_worker.bench.ahead import device, requests
from trio_worker.bench.baseline import bare
from trio_worker.bench.fleet import alike, unlike
from trio_worker.bench.gateway import behind, calls, events, fronts
from trio_worker.bench.latency import newcomer, prefix
from trio_worker.bench.overhead import overhead
from trio_worker.bench.priorities import preemption, priority
from trio_worker.bench.setup import Part
from trio_worker.bench.throughput import batching, forms, mixing, seeds
from trio_worker.bench.tiny import tiny

PARTS: Mapping[str, Part] = {
    each.__name__: each
    for each in (
        *(batching, bare, prefix, seeds, newcomer, mixing, forms),
        *(overhead, priority, preemption),
        *(device, tiny, requests),
        *(events, calls, fronts, behind),
        *(alike, unlike),
    )
}
