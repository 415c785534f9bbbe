"""A worker on its edges: the only room that wires. `run_worker` is its nursery tree."""

from trio_worker.worker.tree import run_worker
from trio_worker.worker.world import ServeHttp, World

__all__ = ["ServeHttp", "World", "run_worker"]
