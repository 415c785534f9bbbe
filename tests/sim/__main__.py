"""`python -m sim seeds=200` or `python -m sim seed=123`: see the justfile.

`python -m sim fleets=100` and `fleet=12` are the same of several workers.
`python -m sim digests=20` prints a fingerprint of each run: the same ones each time it is called.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import sys
import time
from collections import Counter

from .checkers import outcomes_of, violations
from .fleet_checkers import fleet_outcomes, fleet_violations
from .fleet_plan import make_fleet_plan
from .fleet_world import simulate_fleet
from .plan import make_plan
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
    for entry in record.entries:
        print(entry)
    found = violations(plan, record)
    for each in found:
        print(f"FAILED  {each}")
    return 1 if found else 0


def _sweep(first: int, count: int) -> int:
    began = time.monotonic()
    failed = 0
    outcomes: Counter[str] = Counter()
    requests = turns = preemptions = 0
    for seed in range(first, first + count):
        plan = make_plan(seed)
        try:
            record = simulate(plan)
            found = violations(plan, record)
        except Exception as exc:  # noqa: BLE001 - the other seeds are of interest all the same
            found = [f"{type(exc).__name__}: {exc}"]
        else:
            requests += len(record.admitted)
            turns += len(record.turns)
            preemptions += record.preemptions
            outcomes.update(outcomes_of(record))
        if found:
            failed += 1
            print(f"just sim seed={seed}")
            for each in found[:5]:
                print(f"    {each}")
    took_s = time.monotonic() - began
    print(
        f"{count} seeds, {failed} failed; {requests} requests, {turns} turns, "
        f"{preemptions} preemptions, {took_s:.1f} s"
    )
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 1 if failed else 0


def _replay_fleet(seed: int) -> int:
    plan = make_fleet_plan(seed)
    for member in plan.members:
        print(f"# {member.worker_id}: {' '.join(member.overrides)}")
    record = simulate_fleet(plan)
    for entry in record.entries:
        print(entry)
    found = fleet_violations(plan, record)
    for each in found:
        print(f"FAILED  {each}")
    return 1 if found else 0


def _sweep_fleets(first: int, count: int) -> int:
    began = time.monotonic()
    failed = 0
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        plan = make_fleet_plan(seed)
        try:
            record = simulate_fleet(plan)
            found = fleet_violations(plan, record)
        except Exception as exc:  # noqa: BLE001 - the other seeds are of interest all the same
            found = [f"{type(exc).__name__}: {exc}"]
        else:
            outcomes += fleet_outcomes(plan, record)
        if found:
            failed += 1
            print(f"just sim fleet={seed}")
            for each in found[:5]:
                print(f"    {each}")
    print(f"{count} fleets, {failed} failed, {time.monotonic() - began:.1f} s")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
