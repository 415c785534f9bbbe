"""Each mutant in a process of its own, forked from one that has imported everybody else's code."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from .mutants import Mutant
from .record import steady

TIMES_SLOWER = 10
GRACE_S = 5.0
"""A test that takes longer than so many times its normal time, and this, never ends."""
COLLECTING_S = 60.0
OPTIONS = (
    *("-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", ""),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # plugins are imported before
)
DATA_BYTES = 3 * 2**30
"""What an endless loop may fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`found` by `test`; the reason is in `how` where the test did not simply fail."""

    found: bool
    test: str = ""
    how: str = ""


def import_libraries(names: Iterable[str]) -> None:
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    mutant: Mutant
    module: str
    tests: dict[str, float]
    """Normal seconds by node id."""
    first: str = ""
    """The test to begin with: it has found this one before."""


def verdicts(root: Path, work: Sequence[Job], *, jobs: int) -> Iterator[tuple[Job, Verdict]]:
    """What became of each, as it becomes known; `jobs` run at a time."""
    waiting = list(reversed(work))
    with selectors.DefaultSelector() as selector:
        running: dict[int, tuple[Job, int, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    job = waiting.pop()
                    if not job.tests:
                        yield job, Verdict(found=False, how="no test runs it")
                        continue
                    pid, fd = _start(root, job)
                    limit_s = COLLECTING_S + 2 * sum(map(_limit, job.tests.values()))
                    running[fd] = job, pid, time.monotonic() + limit_s
                    selector.register(fd, selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(1.0)}
                now = time.monotonic()
                for fd in list(running):
                    job, pid, until = running[fd]
                    if fd in ready:
                        said = os.read(fd, 65536)
                    elif now > until:
                        said = json.dumps({"found": True, "how": "did not end"}).encode()
                    else:
                        continue
                    del running[fd]
                    selector.unregister(fd)
                    os.close(fd)
                    _end(pid)
                    answer = json.loads(said) if said else {"found": True, "how": "died"}
                    if "fault" in answer:
                        raise RuntimeError(answer["fault"])
                    yield job, Verdict(**answer)
        finally:
            for _, pid, _ in running.values():
                _end(pid)


def _limit(seconds: float) -> float:
    return TIMES_SLOWER * seconds + GRACE_S


def _end(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _start(root: Path, job: Job) -> tuple[int, int]:
    reading, writing = os.pipe()
    code = job.mutant.compiled()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.setpgid(0, 0)
        os.close(reading)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        os.chdir(root)
        _run(job, code, _Witness(job, writing))
    except Exception:  # noqa: BLE001 - what it is goes to the parent
        os.write(writing, json.dumps({"fault": traceback.format_exc()[-4000:]}).encode())
    finally:
        os._exit(0)


def _run(job: Job, code: CodeType, witness: _Witness) -> None:
    """In the child: file by file, the quickest first, until a test fails."""
    steady()
    sys.meta_path.insert(0, _Finder(job.module, job.mutant.path, code))
    files: dict[str, float] = {}
    for test, seconds in job.tests.items():
        file = test.partition("::")[0]
        files[file] = files.get(file, 0.0) + seconds
    before = job.first.partition("::")[0]
    for file in sorted(files, key=lambda each: (each != before, files[each])):
        witness.allow(COLLECTING_S)
        code_of_exit = pytest.main([file, *OPTIONS], plugins=[witness])
        if code_of_exit not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
            # A mutant that cannot even be imported is found by whoever imports it.
            witness.say(found=True, test=file, how="while collecting")
    witness.say(found=False)


class _Witness:
    """A pytest plugin: chooses and orders the tests, and says at once when one has failed."""

    def __init__(self, job: Job, fd: int) -> None:
        self._tests, self._first, self._fd = job.tests, job.first, fd
        self._current = ""
        signal.signal(signal.SIGALRM, self._late)

    def say(self, **answer: Any) -> None:
        """The last thing that this process does."""
        os.write(self._fd, json.dumps(answer).encode())
        os._exit(0)

    def allow(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _late(self, *_: Any) -> None:
        self.say(found=True, test=self._current, how="did not end")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [each for each in items if each.nodeid in self._tests]
        items.sort(key=lambda each: (each.nodeid != self._first, self._tests[each.nodeid]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._current = item.nodeid
        self.allow(_limit(self._tests[item.nodeid]))
        result = yield
        self.allow(COLLECTING_S)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.say(found=True, test=report.nodeid)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, and gives it other code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != self._name:
            return None
        loader = _Loader(fullname, str(self._path))
        loader.code = self._code
        return importlib.util.spec_from_file_location(fullname, self._path, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    code: CodeType

    def get_code(self, fullname: str) -> CodeType:
        del fullname
        return self.code
