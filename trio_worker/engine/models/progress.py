"""Says how far a load has come, in steps and bytes: so a long one is told from one that hangs.

A step such as a download or the reading of weights is one call of a library, which says nothing
until it is done. Meanwhile a thread looks once a second at what the step leaves behind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import mlx.core as mx
from huggingface_hub import constants

from trio_worker.engine.models import ProgressSink
from trio_worker.engine.models.store import cache_folder

MB = 2**20
BEAT_S = 1.0


class LoadProgress:
    """A `ProgressSink` that says more, from any thread, for as long as its context lasts.

    Between two steps `say` is called with the megabytes that `measure` has grown by since the
    step began, whenever that is more than was said. When the context is left, nothing more comes.
    """

    def __init__(self, say: ProgressSink, measure: Callable[[], int]) -> None:
        self._say = say
        self._measure = measure
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load progress", daemon=True)
        self._step = "starting"
        self._began_at_bytes = measure()
        self._said_mb = 0

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        began_at_bytes = self._measure()
        with self._lock:
            if step != self._step:
                self._step, self._began_at_bytes, self._said_mb = step, began_at_bytes, 0
            self._say(step, done, total, unit)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            now_bytes = self._measure()
            with self._lock:
                done_mb = (now_bytes - self._began_at_bytes) // MB
                if done_mb > self._said_mb:
                    self._said_mb = done_mb
                    self._say(self._step, done_mb, 0, "MB")


def measure_of(model: str) -> Callable[[], int]:
    """What grows while `model` is fetched, converted or read, in bytes.

    That is what lies in the folders that may be written, and what MLX holds.
    """
    folders = [cache_folder(), Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}")]
    return partial(_bytes_of, folders)


def _bytes_of(folders: list[Path]) -> int:
    return mx.get_active_memory() + sum(map(_size_of, folders))


def _size_of(folder: Path) -> int:
    """Bytes of all files below; what vanishes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118
            except OSError:
                continue
    return total
