"""Memory in use by the worker, its engine process and that one's children, as the system counts it.

What counts as a process's memory:
 * Linux: its proportional set size, so that pages both processes map are not counted twice. The
   kernel walks all pages for it, so a large process is read as its resident size instead; it is
   too high by shared libraries, which do not matter at that size.
 * macOS: its physical footprint, which Activity Monitor shows and which, unlike the resident
   size, counts what the GPU uses. psutil does not have it; the system's own library does.
 * where neither can be read: the resident size.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Callable

import psutil

from trio_worker.core.memory import MemoryReading

_PSS_RESIDENT_BYTES_MAX = 2**30
"""About 10 ms of page walking."""


class PsutilProbe:
    """The `MemoryProbe` of a real machine."""

    def __init__(self) -> None:
        self._worker = psutil.Process()
        self._is_linux = platform.system() == "Linux"
        self._footprint = _open_footprint()

    def read(self, engine_pid: int | None) -> MemoryReading:
        """Read now. A vanished process counts nothing."""
        machine = psutil.virtual_memory()
        used = self._used_by(self._worker)
        if engine_pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine = psutil.Process(engine_pid)
                used += sum(map(self._used_by, (engine, *engine.children())))
        return MemoryReading(used=used, available=machine.available, total=machine.total)

    def _used_by(self, process: psutil.Process) -> int:
        try:
            if self._footprint is not None and (footprint := self._footprint(process.pid)):
                return footprint
            resident: int = process.memory_info().rss
            if self._is_linux and resident <= _PSS_RESIDENT_BYTES_MAX:
                return _proportional(process, otherwise=resident)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            # A process of ours lets us read it; the id was given to somebody else's meanwhile.
            return 0
        return resident


def _proportional(process: psutil.Process, *, otherwise: int) -> int:
    try:
        pss: int = process.memory_full_info().pss
    except psutil.AccessDenied:  # a hardened kernel, or a container without the right
        return otherwise
    return pss


class _ResourceUsage(ctypes.Structure):
    """`struct rusage_info_v0` of macOS's <sys/resource.h>."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("user_time", ctypes.c_uint64),
        ("system_time", ctypes.c_uint64),
        ("package_idle_wakeups", ctypes.c_uint64),
        ("interrupt_wakeups", ctypes.c_uint64),
        ("pageins", ctypes.c_uint64),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("start_time", ctypes.c_uint64),
        ("exit_time", ctypes.c_uint64),
    )


def _open_footprint() -> Callable[[int], int | None] | None:
    """A function from a process id to its physical footprint; None where there is none."""
    if platform.system() != "Darwin":
        return None
    try:
        usage_of = ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage
    except (OSError, AttributeError):
        return None
    return lambda pid: _footprint(usage_of, pid)


def _footprint(usage_of: Callable[..., int], pid: int) -> int | None:
    usage = _ResourceUsage()
    if usage_of(ctypes.c_int(pid), ctypes.c_int(0), ctypes.byref(usage)) != 0:
        return None
    return int(usage.phys_footprint)
