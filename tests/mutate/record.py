"""Which tests run which lines, and how long they take: measured once, kept in `.mutate/`.

Kept by test file, each under a key of what it was measured on, so that another test costs the
recording of its own file, and a change of the package all of them. Loaded by pytest as a plugin in
the measuring process.
"""

# ruff: noqa: T201 - part of a command

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

SLOW_S = 5.0
MARKS = "not mlx and not nats and not browser and not systemd"
_MARKED = re.compile(r"^pytestmark = .*mark\.(mlx|nats|browser|systemd)\b", re.MULTILINE)
LEFT_OUT = {
    "test_sim.py": "what only a lucky seed finds is not held",
    "test_mutations.py": "its findings are of bugs that it plants itself",
    "test_packaging.py": "runs a copy",
    "test_layers.py": "reads the source rather than running it",
    "test_mutate.py": "about this",
}


@dataclass(slots=True)
class Recording:
    """What is known of one test file."""

    key: str
    tests: dict[str, float]
    """Seconds by node id; those that failed are left out."""
    lines: dict[str, dict[int, list[str]]]
    """The tests that run a line, by file of the package; "" for the import."""
    libraries: list[str]
    """Modules of others that were imported."""


@dataclass(slots=True)
class Map:
    """All recordings."""

    recordings: dict[str, Recording] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        return {
            test: seconds
            for each in self.recordings.values()
            for test, seconds in each.tests.items()
        }

    def libraries(self) -> list[str]:
        """In an order in which they were imported: some change others."""
        return list(
            dict.fromkeys(name for each in self.recordings.values() for name in each.libraries)
        )

    def at(self, path: str, lines: Iterable[int]) -> set[str]:
        """The tests that run one of these lines; "" among them if an import does."""
        return {
            test
            for each in self.recordings.values()
            for line in lines
            for test in each.lines.get(path, {}).get(line, ())
        }

    def below(self, path: str) -> set[str]:
        """The tests that run anything of this file."""
        found: set[str] = set()
        for each in self.recordings.values():
            found.update(*each.lines.get(path, {}).values())
        return found - {""}


def recorded(root: Path, package: Path, tests: Path, also: Iterable[str] = ()) -> Map:
    """The map for the tree as it is; measures what is new. `also`: test files marked `mlx`."""
    folder = root / ".mutate"
    folder.mkdir(exist_ok=True)
    support = [path for path in _sources(tests) if not path.name.startswith("test_")]
    common = _digest(
        [*_sources(package), *(each for each in support if "mutate" not in each.parts)]
    )
    result, stale = Map(), []
    for path in sorted(tests.rglob("test_*.py")):
        marked = path.name in also
        real = _MARKED.search(path.read_text(encoding="utf-8")) is not None
        if path.name in LEFT_OUT or (real and not marked):
            continue
        key = f"{common}-{_digest([path])}{'-all' if marked else ''}"
        kept = _load(folder / f"{path.stem}.json")
        if kept is not None and (kept.key == key or kept.key == f"{key}-all"):
            result.recordings[_name(path, tests)] = kept
        else:
            stale.append((path, key, marked))
    if stale:
        print(f"recording which lines {len(stale)} test files run …", flush=True)
    for path, key, marked in stale:
        if (new := _measure(root, package, path, key, marked=marked)) is not None:
            result.recordings[_name(path, tests)] = new
    return result


def _name(path: Path, tests: Path) -> str:
    return path.relative_to(tests).as_posix()


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _load(path: Path) -> Recording | None:
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    kept["lines"] = {
        name: {int(line): tests for line, tests in lines.items()}
        for name, lines in kept["lines"].items()
    }
    return Recording(**kept)


def _measure(root: Path, package: Path, path: Path, key: str, *, marked: bool) -> Recording | None:
    out = root / ".mutate" / f"{path.stem}.json"
    out.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(root)]),
        "COVERAGE_CORE": "ctrace",
        "MUTATE": json.dumps({"package": str(package), "out": str(out), "key": key}),
    }
    marks = [] if marked else ["-m", MARKS]
    command = [sys.executable, "-m", "pytest", str(path), "-p", "mutate.record", "-q", *marks]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--tb=short"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        print(f"Without any mutant, tests of {path.name} fail; they are left out.")
        print("\n".join(done.stdout.splitlines()[-15:]))
    return _load(out)


def steady() -> None:
    """The same examples each time, and no time spent on shrinking one."""
    settings.register_profile(
        "mutate",
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutate")


# --- in the measuring process -------------------------------------------------------------------


class _Recorder:
    def __init__(self, package: Path, out: Path, key: str) -> None:
        import coverage  # noqa: PLC0415 - where nothing is measured nothing is missing

        self._package, self._out, self._key = package, out, key
        self._seconds: dict[str, float] = defaultdict(float)
        self._failed: set[str] = set()
        self._coverage = coverage.Coverage(
            data_file=None, source=[str(package)], messages=False, config_file=False
        )
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        tests = {test: s for test, s in self._seconds.items() if test not in self._failed}
        lines = {
            str(Path(name).relative_to(self._package.parent)): data.contexts_by_lineno(name)
            for name in data.measured_files()
        }
        recording = {
            "key": self._key,
            "tests": tests,
            "lines": lines,
            "libraries": list(_libraries(self._package.parent)),
        }
        self._out.write_text(json.dumps(recording))


def _libraries(root: Path) -> Iterator[str]:
    """Modules that are nobody's here; without those that start threads when imported."""
    for name, module in sys.modules.items():
        path = Path(getattr(module, "__file__", None) or "/")
        ours = path.is_relative_to(root) and not path.is_relative_to(sys.prefix)
        heavy = re.match(r"mlx|transformers|tokenizers|huggingface_hub|torch|coverage|__", name)
        if not ours and not heavy:
            yield name


def pytest_configure(config: pytest.Config) -> None:
    if "MUTATE" in os.environ:
        steady()
        options = json.loads(os.environ["MUTATE"])
        recorder = _Recorder(Path(options["package"]), Path(options["out"]), options["key"])
        config.pluginmanager.register(recorder)
