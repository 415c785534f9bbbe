"""A load says how far it has come between its steps, and is silent only when it does nothing."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from trio_worker.engine.models import progress
from trio_worker.engine.models.progress import LoadProgress, measure_of

MB = 2**20
PATIENCE_S = 30


class Work:
    """What a step has left behind, as a test says; each look of the thread is waited for."""

    def __init__(self) -> None:
        self.done_bytes = 0
        self.said: queue.Queue[tuple[str, int, int, str]] = queue.Queue()
        self._looked = threading.Semaphore(0)

    def measure(self) -> int:
        self._looked.release()
        return self.done_bytes

    def say(self, *what: Any) -> None:
        self.said.put(what)

    def next(self) -> tuple[str, int, int, str]:
        return self.said.get(timeout=PATIENCE_S)

    def looks(self, count: int) -> None:
        for _ in range(count):
            assert self._looked.acquire(timeout=PATIENCE_S)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BEAT_S", 0.001)


def test_the_megabytes_of_a_step_are_said_as_they_come() -> None:
    work = Work()
    work.done_bytes = 500 * MB
    with LoadProgress(work.say, work.measure) as told:
        told("downloading it", 0, 0, "")
        assert work.next() == ("downloading it", 0, 0, "")
        work.done_bytes += 3 * MB + 5
        assert work.next() == ("downloading it", 3, 0, "MB")
        work.done_bytes += 20 * MB
        assert work.next() == ("downloading it", 23, 0, "MB")
        told("loading it", 0, 0, "")
        assert work.next() == ("loading it", 0, 0, "")
        work.done_bytes += MB
        assert work.next() == ("loading it", 1, 0, "MB")


def test_a_step_that_does_nothing_is_silent() -> None:
    work = Work()
    work.done_bytes = 10 * MB
    with LoadProgress(work.say, work.measure) as told:
        told("loading it", 0, 0, "")
        work.next()
        work.looks(5)
        work.done_bytes += MB - 1
        work.looks(5)
        assert work.said.empty()
        work.done_bytes = 0
        work.looks(5)
        assert work.said.empty()


def test_nothing_more_is_said_when_the_load_is_over() -> None:
    work = Work()
    before = threading.active_count()
    with LoadProgress(work.say, work.measure):
        work.looks(2)
    work.done_bytes += 100 * MB
    assert threading.active_count() == before
    assert work.said.empty()


def test_what_is_written_into_the_models_folders_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_WORKER_CACHE", str(tmp_path / "converted"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("mlx.core.get_active_memory", lambda: 7 * MB)
    measure = measure_of("someone/model")
    assert measure() == 7 * MB
    for name in (
        "converted/.it.unfinished/model.safetensors",
        "hub/models--someone--model/blobs/abc.incomplete",
    ):
        before = measure()
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * 1000)
        assert measure() == before + 1000
    other = tmp_path / "hub/models--someone--else"
    other.mkdir()
    (other / "blob").write_bytes(b"x" * 1000)
    assert measure() == 7 * MB + 2000
