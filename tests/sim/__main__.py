"""`python -m sim seeds=200` or `python -m sim seed=123`: see the justfile.

`python -m sim fleets=100` and `fleet=12` are the same of several workers.
`python -m sim digests=20` prints a fingerprint of each run: the same ones each time it is called.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from .checkers import outcomes_of, violations
from .fleet_checkers import fleet_outcomes, fleet_violations
from .fleet_plan import make_fleet_plan
from .fleet_world import simulate_fleet
from .plan import make_plan
from .record import Entry
from .world import simulate


def main(arguments: list[str]) -> int:
    options = dict(each.split("=", 1) for each in arguments)
    if "seed" in options:
        return _replay(int(options["seed"]))
    if "digests" in options:
        for seed in range(int(options["digests"])):
            print(simulate(make_plan(seed)).digest())
        return 0
    if "fleet" in options:
        return _replay_fleet(int(options["fleet"]))
    if "fleets" in options:
        return _sweep_fleets(int(options.get("from", 0)), int(options["fleets"]))
    return _sweep(int(options.get("from", 0)), int(options.get("seeds", 200)))


def _replay(seed: int) -> int:
    plan = make_plan(seed)
    for override in plan.overrides:
        print(f"# {override}")
    print(f"# {plan.faults}")
    record = simulate(plan)
    return _tell(record.entries, violations(plan, record))


def _replay_fleet(seed: int) -> int:
    plan = make_fleet_plan(seed)
    for member in plan.members:
        print(f"# {member.worker_id}: {' '.join(member.overrides)}")
    record = simulate_fleet(plan)
    return _tell(record.entries, fleet_violations(plan, record))


def _tell(entries: Iterable[Entry], found: Sequence[str]) -> int:
    """The whole log of one run, and what was wrong with it."""
    for entry in entries:
        print(entry)
    for each in found:
        print(f"FAILED  {each}")
    return 1 if found else 0


def _sweep(first: int, count: int) -> int:
    totals: Counter[str] = Counter()

    def run(seed: int, outcomes: Counter[str]) -> list[str]:
        plan = make_plan(seed)
        record = simulate(plan)
        found = violations(plan, record)
        totals.update(
            requests=len(record.admitted),
            turns=len(record.turns),
            preemptions=record.preemptions,
        )
        outcomes.update(outcomes_of(record))
        return found

    return _sweep_all("seed", range(first, first + count), run, totals)


def _sweep_fleets(first: int, count: int) -> int:
    def run(seed: int, outcomes: Counter[str]) -> list[str]:
        plan = make_fleet_plan(seed)
        record = simulate_fleet(plan)
        found = fleet_violations(plan, record)
        outcomes.update(fleet_outcomes(plan, record))
        return found

    return _sweep_all("fleet", range(first, first + count), run, Counter())


def _sweep_all(
    what: str,
    seeds: Sequence[int],
    run: Callable[[int, Counter[str]], list[str]],
    totals: Counter[str],
) -> int:
    """`run` returns what was wrong with one; it adds to the outcomes and to `totals`."""
    began = time.monotonic()
    failed = 0
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        try:
            found = run(seed, outcomes)
        except Exception as exc:  # noqa: BLE001 - the other seeds are of interest all the same
            found = [f"{type(exc).__name__}: {exc}"]
        if found:
            failed += 1
            print(f"just sim {what}={seed}")
            for each in found[:5]:
                print(f"    {each}")
    told = "".join(f" {count} {name}," for name, count in totals.items())
    took_s = time.monotonic() - began
    print(f"{len(seeds)} {what}s, {failed} failed;{told} {took_s:.1f} s")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
