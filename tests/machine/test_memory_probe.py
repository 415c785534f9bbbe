"""The memory probe on the machine that the tests run on."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from trio_worker.machine import memory_probe as psutil_probe
from trio_worker.machine.memory_probe import PsutilProbe
from trio_worker.ports import MemoryProbe

MIB = 2**20


def test_it_is_a_memory_probe() -> None:
    probe: MemoryProbe = PsutilProbe()
    reading = probe.read(None)
    assert MIB < reading.used < reading.total
    assert 0 < reading.available <= reading.total


def test_memory_that_is_touched_is_counted() -> None:
    probe = PsutilProbe()
    before = probe.read(None).used
    with mmap.mmap(-1, 64 * MIB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert probe.read(None).used - before > 60 * MIB
    assert probe.read(None).used - before < 30 * MIB


@pytest.mark.process
def test_the_engine_process_is_counted_until_it_has_vanished() -> None:
    probe = PsutilProbe()
    # The child has no memory worth counting before it says so.
    program = "b = bytearray(b'x') * (64 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        alone = probe.read(None).used
        assert probe.read(child.pid).used - alone > 60 * MIB
        child.stdin.close()
        child.wait()
        assert abs(probe.read(child.pid).used - probe.read(None).used) < 30 * MIB


@pytest.mark.process
def test_what_the_engine_has_started_is_counted_with_it() -> None:
    probe = PsutilProbe()
    program = "b = bytearray(b'x') * (64 << 20); print(flush=True); input()"
    engine = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        assert probe.read(child.pid).used - probe.read(None).used > 60 * MIB
        child.stdin.close()


@pytest.mark.process
def test_a_process_that_was_not_reaped_yet_counts_nothing() -> None:
    probe = PsutilProbe()
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        assert probe.read(child.pid).used - probe.read(None).used < 30 * MIB


class StubProcess:
    """A process whose sizes are known."""

    def __init__(self, *, rss: int, pss: int | None) -> None:
        self.pid = 1
        self.rss = rss
        self.pss = pss

    def memory_info(self) -> Any:
        return SimpleNamespace(rss=self.rss)

    def memory_full_info(self) -> Any:
        if self.pss is None:
            raise psutil.AccessDenied
        return SimpleNamespace(pss=self.pss)


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux has proportional sizes")
@pytest.mark.parametrize(
    ("process", "used"),
    [
        pytest.param(StubProcess(rss=50 * MIB, pss=30 * MIB), 30 * MIB, id="proportional"),
        pytest.param(StubProcess(rss=50 * MIB, pss=None), 50 * MIB, id="not readable"),
        pytest.param(StubProcess(rss=5000 * MIB, pss=4990 * MIB), 5000 * MIB, id="large"),
    ],
)
def test_the_proportional_size_is_used_where_it_is_cheap_and_readable(
    monkeypatch: pytest.MonkeyPatch, process: StubProcess, used: int
) -> None:
    monkeypatch.setattr(psutil, "Process", lambda *_: process)
    assert PsutilProbe().read(None).used == used


def test_the_footprint_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS; the process that cannot be read falls back to its resident size."""
    monkeypatch.setattr(psutil, "Process", lambda *_: StubProcess(rss=50 * MIB, pss=50 * MIB))
    for footprint, used in ((70 * MIB, 70 * MIB), (None, 50 * MIB)):
        monkeypatch.setattr(
            psutil_probe, "_open_footprint", lambda footprint=footprint: lambda _: footprint
        )
        assert PsutilProbe().read(None).used == used


def test_a_footprint_is_read_from_the_struct_that_the_system_fills() -> None:
    def proc_pid_rusage(pid: Any, flavor: Any, buffer: Any) -> int:
        assert (pid.value, flavor.value) == (7, 0)
        buffer._obj.phys_footprint = 123
        return 0

    assert psutil_probe._footprint(proc_pid_rusage, 7) == 123
    assert psutil_probe._footprint(lambda *_: -1, 7) is None
    assert psutil_probe._ResourceUsage.phys_footprint.offset == 16 + 7 * 8
