"""`python -m mutate PATH… [jobs=2] [only=survivors] [line=N] [tests=test_rates] [also=test_x.py]`.

`only=survivors`: those that nothing found last time.
`tests`: only tests with one of these in their name.
`also`: test files marked `mlx` that compute in their own process, with commas.

Exits with 1 unless at least nine of ten mutants of each file are found, and each of the others is
explained in `mutate_equivalent.toml`.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from .mutants import Mutant, mutants_of, required_parameters, unchanged
from .record import SLOW_S, Map, recorded
from .run import Job, Verdict, import_libraries, verdicts

REQUIRED = 0.9
DECISIONS = (
    *("trio_worker/core/", "trio_worker/wire/", "trio_worker/protocol/", "trio_worker/config/"),
    *("trio_worker/monitoring/counters.py", "trio_worker/monitoring/heartbeat.py"),
    *("trio_worker/monitoring/metrics.py", "trio_worker/monitoring/snapshot.py"),
    *("trio_worker/nats/address.py", "trio_worker/nats/connection_life.py"),
    *("trio_worker/nats/outbox.py", "trio_worker/nats/parcel.py"),
    *("trio_worker/supervisor/load_patience.py", "trio_worker/supervisor/restart_budget.py"),
    "trio_worker/calling/attempts.py",
)
"""What is synchronous; the sweep over every step of a whole worker may notice its bugs."""
SWEEP = "tests/sim/test_cancel_sweep.py"
Reasons: TypeAlias = dict[str, dict[str, dict[str, str]]]
"""By path, line and operator."""


def main(arguments: list[str]) -> int:
    options = dict(each.split("=", 1) for each in arguments if "=" in each)
    root = Path(options.get("root", Path(__file__).parent.parent.parent)).resolve()
    sys.path[:0] = [str(root)]
    paths = [root / each for each in arguments if "=" not in each]
    if not paths or not all(path.exists() for path in paths):
        print(__doc__)
        return 2
    package = root / paths[0].relative_to(root).parts[0]
    files = sorted(
        {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    )
    lines = recorded(root, package, root / "tests", options.get("also", "").split(","))
    import_libraries(lines.libraries())
    required = required_parameters(package.rglob("*.py"))
    reasons = _reasons(root / "tests/mutate_equivalent.toml")
    jobs = int(options.get("jobs", "2"))
    chosen = range(int(options["line"]), int(options["line"]) + 1) if "line" in options else None
    chooser = Chooser(root, package, lines, only=options.get("tests", ""))
    tallies = []
    for file in files:
        tally = _Tally(root, file, reasons.get(file.relative_to(root).as_posix(), {}))
        tally.run(
            [
                each
                for each in mutants_of(file, required=required)
                if (chosen is None or each.line in chosen)
                and (options.get("only") != "survivors" or tally.survived_before(each))
            ],
            chooser,
            jobs=jobs,
        )
        partial = chosen is not None or "only" in options
        tally.report(partial=partial)
        tallies.append(tally)
    print("\n| file | found | of | explained |\n|---|---:|---:|---:|")
    for tally in tallies:
        print(tally.row())
    return 0 if all(tally.is_good for tally in tallies) else 1


def _reasons(path: Path) -> Reasons:
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Chooser:
    """Which tests may notice a mutant."""

    def __init__(self, root: Path, package: Path, lines: Map, *, only: str = "") -> None:
        self._only = only.split(",")
        self._root, self._package, self._map = root, package, lines
        self._seconds = {
            test: seconds for test, seconds in lines.seconds().items() if seconds <= SLOW_S
        }
        self._tried = set(_load(root / ".mutate/tried.json", []))
        self._by_names: dict[tuple[Path, frozenset[str]], set[str]] = {}

    def tests_for(self, mutant: Mutant) -> dict[str, float]:
        path = mutant.path.relative_to(self._root).as_posix()
        tests = self._map.at(path, mutant.lines)
        if mutant.names or "" in tests:
            key = mutant.path, mutant.names
            if key not in self._by_names:
                self._by_names[key] = self._who_uses(mutant.path, mutant.names)
            tests |= self._by_names[key]
        # A decision awaits nothing, so no cancellation can come in the middle of one.
        beside = SWEEP if path.startswith(DECISIONS) else "-"
        return {
            test: self._seconds[test]
            for test in tests
            if test in self._seconds
            and not test.startswith(beside)
            and any(each in test for each in self._only)
        }

    def try_without_mutant(self, root: Path, path: Path, module: str, work: list[Job]) -> None:
        """Run what has not been run yet as mutants will be; who fails then is believed no more."""
        tests = {test: s for job in work for test, s in job.tests.items()}
        marks = {
            test: f"{recording.key} {test}"
            for recording in self._map.recordings.values()
            for test in recording.tests
        }
        while untried := {test: s for test, s in tests.items() if marks[test] not in self._tried}:
            job = Job(mutant=unchanged(path), module=module, tests=untried)
            ((_, verdict),) = verdicts(root, [job], jobs=1)
            if not verdict.found:
                self._tried |= {marks[test] for test in untried}
                kept = sorted(self._tried & set(marks.values()))
                (root / ".mutate/tried.json").write_text(json.dumps(kept))
                return
            bad = {test for test in untried if test.startswith(verdict.test)}
            assert bad, verdict
            print(f"fails without a mutant, and is left out: {verdict.test} {verdict.how}")
            for test in bad:
                for each in (self._seconds, tests, *(job.tests for job in work)):
                    each.pop(test, None)

    def _who_uses(self, path: Path, names: frozenset[str]) -> set[str]:
        """What runs at import matters to who runs anything of that file, or has its names."""
        found = self._map.below(path.relative_to(self._root).as_posix())
        words = [re.escape(each) for each in names if each]
        if not words:
            return found
        word = re.compile(rf"\b(?:{'|'.join(words)})\b")
        for each in sorted(self._package.rglob("*.py")):
            text = each.read_text(encoding="utf-8").splitlines()
            lines = [number for number, line in enumerate(text, 1) if word.search(line)]
            found |= self._map.at(each.relative_to(self._root).as_posix(), lines)
        for name, recording in self._map.recordings.items():
            if word.search((self._root / "tests" / name).read_text(encoding="utf-8")):
                found |= set(recording.tests)
        return found


@dataclass(slots=True)
class _Tally:
    """One file: what was found, what was not, and what is said about it."""

    root: Path
    file: Path
    reasons: dict[str, dict[str, str]]
    found: int = 0
    total: int = 0
    explained: int = 0
    survivors: list[tuple[Mutant, Verdict]] = field(default_factory=list)
    mistaken: list[str] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = _load(self._kept, {})

    @property
    def name(self) -> str:
        return self.file.relative_to(self.root).as_posix()

    @property
    def _kept(self) -> Path:
        return self.root / ".mutate" / f"{self.name.replace('/', '.')}.verdicts.json"

    def survived_before(self, mutant: Mutant) -> bool:
        return self.before.get(_key(mutant), "") == ""

    def run(self, mutants: Iterable[Mutant], chooser: Chooser, *, jobs: int) -> None:
        """Try all of them, once it is sure that no test finds the file as it is."""
        module = self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        work = [
            Job(
                mutant=each,
                module=module,
                tests=chooser.tests_for(each),
                first=self.before.get(_key(each), ""),
            )
            for each in mutants
        ]
        chooser.try_without_mutant(self.root, self.file, module, work)
        excused: dict[tuple[str, str], bool] = {}
        for job, verdict in verdicts(self.root, work, jobs=jobs):
            mutant = job.mutant
            self.total += 1
            if sys.stderr.isatty():
                print(f"\r{self.name}: {self.total} of {len(work)}", end="\r", file=sys.stderr)
            self.before[_key(mutant)] = (verdict.test or verdict.how) if verdict.found else ""
            reason = self.reasons.get(mutant.old, {}).get(mutant.operator)
            at = mutant.old, mutant.operator
            if reason is not None:
                excused[at] = excused.get(at, False) or not verdict.found
            if verdict.found:
                self.found += 1
            elif reason is not None:
                self.explained += 1
            else:
                self.survivors.append((mutant, verdict))
        self._kept.write_text(json.dumps(self.before))
        for line, operators in self.reasons.items():
            for operator in operators:
                if not excused.get((line, operator), False):
                    what = "is found" if (line, operator) in excused else "is no mutant"
                    self.mistaken.append(f"{line}  ({operator}): explained, but {what}")

    def report(self, *, partial: bool) -> None:
        if partial:
            self.mistaken = [each for each in self.mistaken if "no mutant" not in each]
        for mutant, verdict in sorted(self.survivors, key=lambda each: each[0].line):
            why = f"  ({verdict.how})" if verdict.how else ""
            print(f"{self.name}:{mutant.line}  {mutant.operator}{why}")
            print(f"    - {mutant.old}\n    + {mutant.new}")
        for each in self.mistaken:
            print(f"mutate_equivalent.toml: {self.name}: {each}")
        print(f"{self.name}: {self.found} of {self.total} found", flush=True)

    def row(self) -> str:
        return f"| `{self.name}` | {self.found} | {self.total} | {self.explained} |"

    @property
    def is_good(self) -> bool:
        enough = self.found >= REQUIRED * self.total
        return enough and not self.survivors and not self.mistaken


def _load(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else otherwise


def _key(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.source).hexdigest()[:20]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
